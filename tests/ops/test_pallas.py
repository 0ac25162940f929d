"""The depthwise block's Pallas kernels: their numbers, interpreted on a CPU, and their lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from hccr_jax.models import mobilenet_v1, mobilenet_v2
from hccr_jax.ops import depthwise_pallas, pallas
from hccr_jax.ops.batch_norm import batch_norm_train, norm_gradient_sums
from hccr_jax.ops.depthwise import grouped_conv
from hccr_jax.ops.depthwise_pallas import block_backward, block_forward

EPSILON = 1e-3


def kinds(shape, stride, dtype):
    """Returns shape and dtype of x, norm, weight, y, norm_after and gradient."""
    batch, height, width, channels = shape
    out = (batch, -(-height // stride), -(-width // stride), channels)
    kind = jax.ShapeDtypeStruct
    return (
        kind(shape, dtype), kind((3, channels), jnp.float32), kind((3, 3, channels), dtype),
        kind(out, dtype), kind((5, channels), jnp.float32), kind(out, dtype),
    )  # fmt: skip


def random(kind, seed=0):
    values = np.random.default_rng(seed).normal(size=kind.shape)
    return jnp.asarray(values, jnp.float32).astype(kind.dtype)


def arguments(shape, stride, dtype):
    return [random(kind, seed) for seed, kind in enumerate(kinds(shape, stride, dtype))]


def activate(x, norm):
    """Returns x normalised, and activated, and where ReLU6 lets a gradient through."""
    scaled = (x - norm[0]) * norm[1] + norm[2]
    return np.clip(scaled, 0.0, 6.0), (scaled > 0.0) & (scaled < 6.0)


def taps(padded, i, j, out, stride):
    return padded[:, i : i + stride * out[1] : stride, j : j + stride * out[2] : stride]


def reference_forward(x, norm, weight, stride):
    active, _ = activate(x, norm)
    padded = np.pad(active, ((0, 0), (1, stride), (1, stride), (0, 0)))
    out = (len(x), -(-x.shape[1] // stride), -(-x.shape[2] // stride))
    return sum(taps(padded, i, j, out, stride) * weight[i, j] for i in range(3) for j in range(3))


def reference_backward(x, norm, weight, y, norm_after, gradient, stride):
    active, open_ = activate(x, norm)
    mean, slope, _, p, q = norm_after
    d_y = slope * gradient * activate(y, norm_after)[1] - p - q * (y - mean)
    padded = np.pad(active, ((0, 0), (1, stride), (1, stride), (0, 0)))
    d_active, sums = np.zeros_like(padded), []
    for i in range(3):
        for j in range(3):
            taps(d_active, i, j, y.shape, stride)[...] += d_y * weight[i, j]
            sums.append((taps(padded, i, j, y.shape, stride) * d_y).sum((0, 1, 2)))
    passed = d_active[:, 1 : 1 + x.shape[1], 1 : 1 + x.shape[2]] * open_
    sums += [passed.sum((0, 1, 2)), (passed * (x - norm[0])).sum((0, 1, 2))]
    return passed * norm[1], np.stack(sums)


def wide(arrays):
    return [np.asarray(array, np.float64) for array in arrays]


# Odd sizes; images, columns and channels that leave a program partly without work.
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((37, 5, 7, 24), jnp.float32), ((5, 3, 2, 40), jnp.bfloat16)]
)
def test_block_agrees_with_float64(shape, dtype, stride, monkeypatch):
    # Few programs, so that each takes images in several passes, as in a large batch.
    monkeypatch.setattr(depthwise_pallas, "MIN_PROGRAMS", 4)
    inputs = arguments(shape, stride, dtype)
    rounding = float(jnp.finfo(dtype).eps) / 2 + 1e-6

    y, mean, variance = jax.jit(functools.partial(block_forward, stride=stride))(*inputs[:3])
    expected = reference_forward(*wide(inputs[:3]), stride)
    assert y.dtype == dtype
    np.testing.assert_allclose(*wide([y, expected]), rtol=rounding, atol=1e-5)
    np.testing.assert_allclose(mean, wide([y])[0].mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, wide([y])[0].var((0, 1, 2)), rtol=1e-5)

    dx, sums = jax.jit(functools.partial(block_backward, stride=stride))(*inputs)
    expected_dx, expected_sums = reference_backward(*wide(inputs), stride)
    assert dx.dtype == dtype
    np.testing.assert_allclose(*wide([dx, expected_dx]), rtol=rounding, atol=1e-5)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_block_is_norm_convolution_norm(stride):
    x, norm, weight, _, affine, gradient = arguments((6, 3, 2, 16), stride, jnp.float32)
    scale, bias = affine[1], affine[2]

    def composed(x, norm, weight):
        mean, slope, bias_before = (row[None, None, None] for row in norm)
        active = jnp.clip((x - mean) * slope + bias_before, 0.0, 6.0)
        y = grouped_conv(active, weight, stride)
        return batch_norm_train(y, scale, bias, True, EPSILON, None)

    def fused(x, norm, weight, gradient):
        y, mean, variance = block_forward(x, norm, weight, stride)
        inverse = lax.rsqrt(variance + EPSILON)
        d_bias, d_scale = norm_gradient_sums(y, gradient, mean, inverse, scale, bias, True)
        slope, share = scale * inverse, y.shape[-1] / y.size
        p, q = slope * d_bias * share, slope * inverse * d_scale * share
        norm_after = jnp.stack([mean, slope, bias, p, q])
        dx, sums = block_backward(x, norm, weight, y, norm_after, gradient, stride)
        d_norm = jnp.stack([-norm[1] * sums[9], sums[10], sums[9]])
        return mean, variance, dx, d_norm, sums[:9].reshape(3, 3, -1)

    (_, *statistics), pull = jax.vjp(composed, x, norm, weight)
    zeros = jnp.zeros_like(scale)
    expected = (*statistics, *pull((gradient, zeros, zeros)))
    for ours, theirs in zip(jax.jit(fused)(x, norm, weight, gradient), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_statistics_keep_their_digits_far_from_zero():
    x = random(jax.ShapeDtypeStruct((300, 1, 1, 16), jnp.float32))
    norm = jnp.tile(jnp.asarray([0.0, 1e-4, 3.0])[:, None], (1, 16))
    y, mean, variance = block_forward(x, norm, jnp.ones((3, 3, 16)), 1)
    stored = np.asarray(y, np.float64)
    np.testing.assert_allclose(mean, stored.mean((0, 1, 2)), rtol=2e-7)
    np.testing.assert_allclose(variance, stored.var((0, 1, 2)), rtol=1e-3)


def layers():
    """Returns size, channels and stride of each kind of depthwise layer at 64 pixels."""
    found, size, channels = set(), 32, 32
    for following, stride in mobilenet_v1.BLOCKS:
        found.add((size, channels, stride))
        size, channels = size // stride, following
    size, channels = 32, 32
    for expansion, following, repeats, first_stride in mobilenet_v2.STAGES:
        for index in range(repeats):
            stride = first_stride if index == 0 else 1
            found.add((size, channels * expansion, stride))
            size, channels = size // stride, following
    return sorted(found)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_every_layer_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(pallas, "interprets", lambda: False)
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        for size, channels, stride in layers():
            inputs = kinds((4096, size, size, channels), stride, jnp.bfloat16)
            for function, count in [(block_forward, 3), (block_backward, 6)]:
                traced = jax.jit(functools.partial(function, stride=stride)).trace(*inputs[:count])
                text = traced.lower(lowering_platforms=("cuda",)).as_text()
                assert text.count("__gpu$xla.gpu.triton") == 1
