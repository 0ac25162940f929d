"""The operations, in all their implementations, against float64 NumPy and JAX's own gradients."""

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from hccr_jax.ops import native
from hccr_jax.ops.batch_norm import (
    batch_norm,
    batch_norm_train,
    batch_statistics,
    one_pass_statistics,
)
from hccr_jax.ops.depthwise import depthwise_conv, grouped_conv, shifted_sum
from hccr_jax.ops.depthwise_block import depthwise_block, depthwise_block_train
from hccr_jax.ops.pointwise import pointwise_conv

EPSILON = 1e-3
IMPLEMENTATIONS = {"chosen": depthwise_conv, "shifted": shifted_sum, "grouped": grouped_conv}

# (batch, height, width, channels): whole groups of 16 channels, a rest, too few for the kernels.
SHAPES = [(1, 8, 8, 16), (33, 5, 7, 24), (2, 9, 4, 40), (3, 1, 2, 32), (2, 7, 6, 8)]


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def taps(padded: np.ndarray, i: int, j: int, out: tuple[int, ...], stride: int) -> np.ndarray:
    """A view of the input of tap (i, j) of the filter, for every output position."""
    return padded[:, i : i + stride * out[1] : stride, j : j + stride * out[2] : stride]


def padding(x: np.ndarray, stride: int) -> np.ndarray:
    return np.pad(x.astype(np.float64), ((0, 0), (1, stride), (1, stride), (0, 0)))


def reference_forward(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    out = (len(x), -(-x.shape[1] // stride), -(-x.shape[2] // stride))
    padded = padding(x, stride)
    products = (taps(padded, i, j, out, stride) * weight[i, j] for i in range(3) for j in range(3))
    return functools.reduce(np.add, products)


def reference_backward(
    x: np.ndarray, weight: np.ndarray, gradient: np.ndarray, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    padded, out = padding(x, stride), gradient.shape
    dx, dw = np.zeros_like(padded), np.zeros(weight.shape)
    for i in range(3):
        for j in range(3):
            taps(dx, i, j, out, stride)[...] += gradient * weight[i, j].astype(np.float64)
            seen = taps(padded, i, j, out, stride)
            dw[i, j] = np.einsum("bhwc,bhwc->c", seen, gradient.astype(np.float64))
    return dx[:, 1 : 1 + x.shape[1], 1 : 1 + x.shape[2]], dw


def value_and_pull(function, *arguments_and_gradient):
    *arguments, gradient = arguments_and_gradient
    y, pull = jax.vjp(function, *arguments)
    return y, *pull(gradient)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depthwise_agrees_with_float64(shape, stride, implementation):
    x, weight = normal(shape), normal((3, 3, shape[-1]), 1)
    expected = reference_forward(x, weight, stride)
    gradient = normal(expected.shape, 2)

    convolve = functools.partial(IMPLEMENTATIONS[implementation], stride=stride)
    y, dx, dw = jax.jit(functools.partial(value_and_pull, convolve))(x, weight, gradient)
    expected_dx, expected_dw = reference_backward(x, weight, gradient, stride)
    np.testing.assert_allclose(y, expected, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(dx, expected_dx, atol=4e-6, rtol=4e-6)
    np.testing.assert_allclose(dw, expected_dw, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_is_xlas_grouped_convolution(stride):
    x, weight = normal((3, 7, 6, 24)), normal((3, 3, 24), 1)

    def by_xla(x, weight):
        return lax.conv_general_dilated(
            x, weight.reshape(3, 3, 1, 24), (stride, stride), [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=24,
        )  # fmt: skip

    def results(convolve):
        gradients = jax.grad(lambda x, w: jnp.sin(convolve(x, w)).sum(), argnums=(0, 1))
        return jax.jit(lambda x, w: (convolve(x, w), gradients(x, w)))(x, weight)

    ours = results(lambda x, weight: depthwise_conv(x, weight, stride))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, results(by_xla))


def test_the_kernels_support_float32_of_16_channels_on_a_cpu():
    if not native.available():
        pytest.skip("no C++ compiler here")
    if jax.default_backend() != "cpu":
        pytest.skip("the kernels are for CPUs")

    def is_native(channels, dtype=jnp.float32):
        x = jax.ShapeDtypeStruct((2, 4, 4, channels), dtype)
        weight = jax.ShapeDtypeStruct((3, 3, channels), dtype)
        pair = (jax.ShapeDtypeStruct((channels,), jnp.float32),) * 2
        run = jax.jit(functools.partial(depthwise_block, stride=1, epsilon=EPSILON))
        return "hccr_block_inference" in run.lower(x, pair, pair, weight, pair, pair).as_text()

    assert is_native(16)
    assert is_native(24)
    assert not is_native(15)
    assert not is_native(16, jnp.bfloat16)


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e3])
@pytest.mark.parametrize("shape", [(33, 5, 7, 24), (4, 9, 9, 16), (50, 40), (2, 5, 5, 8), (1, 16)])
def test_batch_statistics_agree_with_float64(shape, mean):
    x = normal(shape) + np.float32(mean)
    ours_mean, ours_variance = batch_statistics(jnp.array(x), None)
    axes = tuple(range(x.ndim - 1))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(ours_mean, exact.mean(axes), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours_variance, exact.var(axes), rtol=2e-5, atol=1e-6)


def test_the_variance_of_a_constant_is_zero():
    mean, variance = batch_statistics(jnp.full((7, 3, 3, 16), 1234.567, jnp.float32), None)
    exact = native.available()  # XLA's own mean of equal values may be off in the last digit
    np.testing.assert_allclose(mean, np.float32(1234.567), rtol=0 if exact else 1e-6)
    np.testing.assert_allclose(variance, 0, atol=0 if exact else 1e-5)


def plain_batch_norm(x, scale, bias, relu6):
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    row = (1,) * (x.ndim - 1) + (-1,)
    y = (x - mean) / jnp.sqrt(variance + EPSILON) * scale.reshape(row) + bias.reshape(row)
    return jnp.clip(y, 0, 6) if relu6 else y


@pytest.mark.parametrize("relu6", [False, True])
@pytest.mark.parametrize("shape", [(33, 5, 7, 24), (9, 6, 6, 16), (4, 5, 5, 8), (70, 40)], ids=str)
def test_batch_norm_train_agrees_with_float64(shape, relu6):
    x, gradient = 3 * normal(shape) + 2, normal(shape, 1)
    scale, bias = 2 * normal(shape[-1:], 2), normal(shape[-1:], 3) + 2
    with jax.enable_x64(True):
        wide = [np.float64(value) for value in (x, scale, bias, gradient)]
        plain = functools.partial(plain_batch_norm, relu6=relu6)
        run = jax.jit(functools.partial(value_and_pull, plain))
        expected = [np.asarray(value) for value in run(*wide)]
    assert not relu6 or 0.1 < ((expected[0] > 0) & (expected[0] < 6)).mean() < 0.9

    def ours(x, scale, bias):
        return batch_norm_train(x, scale, bias, relu6, EPSILON, None)[0]

    results = jax.jit(functools.partial(value_and_pull, ours))(x, scale, bias, gradient)
    for name, mine, exact in zip(("y", "dx", "d_scale", "d_bias"), results, expected, strict=True):
        scale_of_error = np.abs(exact).max()
        np.testing.assert_allclose(mine, exact, atol=5e-6 * scale_of_error, err_msg=name)


def test_batch_norm_with_batch_statistics_is_batch_norm_train():
    x, scale, bias = (jnp.array(normal(s, i)) for i, s in enumerate([(5, 4, 4, 16), (16,), (16,)]))
    y, mean, variance = batch_norm_train(x, scale, bias, True, EPSILON, None)
    np.testing.assert_array_equal(batch_norm(x, mean, variance, scale, bias, True, EPSILON), y)


def test_batch_norm_computes_in_float32_whatever_the_type_of_x():
    x = jnp.array(normal((9, 3, 3, 16)), jnp.bfloat16)
    one = jnp.ones(16, jnp.float32)
    y, mean, variance = batch_norm_train(x, one, one, True, EPSILON, None)
    assert (y.dtype, mean.dtype, variance.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, np.asarray(x, np.float64).mean((0, 1, 2)), atol=1e-6)


def test_sharded_batch_norm_is_that_of_the_whole_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    # Each device's rows have a mean of their own, so that statistics of a part would be wrong.
    x = normal((8, 3, 5, 24)) + np.repeat(np.arange(4, dtype=np.float32), 2).reshape(8, 1, 1, 1)
    scale, bias, gradient = normal((24,), 1), normal((24,), 2) + 2, normal(x.shape, 3)

    def run(x, scale, bias, gradient, axis_name):
        def value(x, scale, bias):
            y, *statistics = batch_norm_train(x, scale, bias, True, EPSILON, axis_name)
            return y, statistics

        y, pull, statistics = jax.vjp(value, x, scale, bias, has_aux=True)
        dx, *d_vectors = pull(gradient)
        return y, dx, statistics, d_vectors

    def split(x, scale, bias, gradient):
        y, dx, statistics, d_vectors = run(x, scale, bias, gradient, "data")
        return y, dx, statistics, lax.psum(d_vectors, "data")

    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        split, mesh=mesh, in_specs=(rows, whole, whole, rows),
        out_specs=(rows, rows, whole, whole), check_vma=False,
    )  # fmt: skip
    expected = jax.jit(functools.partial(run, axis_name=None))(x, scale, bias, gradient)
    ours = jax.jit(sharded)(x, scale, bias, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 1e-5), ours, expected)


def plain_block(inputs, matrix, scale, bias, weight, scale_after, bias_after, stride):
    """The block by its definition, with XLA's grouped convolution."""
    active = plain_batch_norm(inputs @ matrix, scale, bias, True)
    y = grouped_conv(active, weight, stride)
    return plain_batch_norm(y, scale_after, bias_after, True)


def our_block(inputs, matrix, scale, bias, weight, scale_after, bias_after, stride, axis_name=None):
    affine, affine_after = (scale, bias), (scale_after, bias_after)
    return depthwise_block_train(
        pointwise_conv(inputs, matrix), affine, weight, affine_after, stride, EPSILON,
        axis_name,
    )  # fmt: skip


def block_arguments(shape, stride):
    """Returns inputs, parameters and an output gradient; ReLU6 clips on both sides."""
    *batch_and_size, channels = shape
    vectors = [normal((channels,), seed) for seed in range(4)]
    scale, scale_after = 2 * vectors[0], 3 * vectors[1]
    bias, bias_after = vectors[2] + 2, vectors[3] + 3
    inputs, matrix = normal((*batch_and_size, 6), 4) + 1, normal((6, channels), 5)
    weight = normal((3, 3, channels), 6)
    batch, height, width = batch_and_size
    out = (batch, -(-height // stride), -(-width // stride), channels)
    return [inputs, matrix, scale, bias, weight, scale_after, bias_after, normal(out, 7)]


BLOCK_NAMES = ("out", "inputs", "matrix", "scale", "bias", "weight", "scale_after", "bias_after")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape", [(33, 5, 7, 24), (9, 8, 6, 16), (3, 7, 4, 40), (4, 5, 5, 8)], ids=str
)
def test_the_depthwise_block_agrees_with_float64(shape, stride):
    arguments = block_arguments(shape, stride)
    with jax.enable_x64(True):
        wide = [np.float64(value) for value in arguments]
        plain = functools.partial(plain_block, stride=stride)
        expected = [
            np.asarray(value) for value in jax.jit(functools.partial(value_and_pull, plain))(*wide)
        ]
    assert 0.1 < ((expected[0] > 0) & (expected[0] < 6)).mean() < 0.9

    def ours(*arguments):
        return our_block(*arguments, stride)[0]

    results = jax.jit(functools.partial(value_and_pull, ours))(*arguments)
    for name, mine, exact in zip(BLOCK_NAMES, results, expected, strict=True):
        np.testing.assert_allclose(mine, exact, atol=2e-5 * np.abs(exact).max(), err_msg=name)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_the_depthwise_block_is_accurate_far_from_zero(offset):
    # Before the convolution the offset goes with the mean. After it: all is active at 6 but one
    # channel's worth of noise, so that the mean is large against the deviation.
    x = normal((8, 6, 6, 16)) + np.float32(offset)
    one = np.ones(16, np.float32)
    weight = np.zeros((3, 3, 16), np.float32)
    weight[1, 1] = 1e3
    _, statistics, after = depthwise_block_train(
        jnp.array(x), (0.01 * one, 3 * one), weight, (one, one), 1, EPSILON, None
    )
    exact = x.astype(np.float64)
    mean, variance = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    np.testing.assert_allclose(statistics[0], mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(statistics[1], variance, rtol=2e-5)
    y = 1e3 * ((exact - mean) / np.sqrt(variance + EPSILON) * 0.01 + 3)
    np.testing.assert_allclose(after[0], y.mean((0, 1, 2)), rtol=2e-6)
    np.testing.assert_allclose(after[1], y.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_depthwise_block_with_given_statistics_is_the_composition(shape, stride):
    channels = shape[-1:]
    vectors = [jnp.array(normal(channels, seed)) for seed in range(6)]
    mean, scale, bias, mean_after, scale_after, bias_after = vectors
    statistics, affine = (mean, jnp.square(scale) + 0.5), (scale, bias + 2)
    after, affine_after = (mean_after, jnp.square(bias) + 0.5), (scale_after, bias_after + 2)
    x, weight = jnp.array(normal(shape)), jnp.array(normal((3, 3, *channels), 1))
    ours = depthwise_block(x, statistics, affine, weight, after, affine_after, stride, EPSILON)
    active = batch_norm(x, *statistics, *affine, True, EPSILON)
    y = grouped_conv(active, weight, stride)
    parts = batch_norm(y, *after, *affine_after, True, EPSILON)
    np.testing.assert_allclose(ours, parts, atol=2e-5)


def test_the_sharded_depthwise_block_is_that_of_the_whole_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    inputs, *others, gradient = block_arguments((8, 3, 5, 24), 2)
    inputs += np.repeat(np.arange(4, dtype=np.float32), 2).reshape(8, 1, 1, 1)

    def run(inputs, others, gradient, axis_name):
        def value(inputs, others):
            out, *statistics = our_block(inputs, *others, 2, axis_name)
            return out, statistics

        out, pull, statistics = jax.vjp(value, inputs, others, has_aux=True)
        d_inputs, d_others = pull(gradient)
        return out, d_inputs, statistics, d_others

    def split(inputs, others, gradient):
        out, d_inputs, statistics, d_others = run(inputs, others, gradient, "data")
        return out, d_inputs, statistics, lax.psum(d_others, "data")

    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        split, mesh=mesh, in_specs=(rows, whole, rows), out_specs=(rows, rows, whole, whole),
        check_vma=False,
    )  # fmt: skip
    expected = jax.jit(functools.partial(run, axis_name=None))(inputs, others, gradient)
    ours = jax.jit(sharded)(inputs, others, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 3e-5), ours, expected)


# The last two have rows enough for the kernel: whole tiles of 8 by 32, and a rest of either.
@pytest.mark.parametrize("shape", [(2, 3, 5, 8, 6), (10, 8, 9, 16, 64), (33, 5, 7, 9, 40)], ids=str)
def test_pointwise_conv_has_the_gradients_of_a_matrix_product(shape):
    *batch_and_size, inputs, outputs = shape
    x, weight = normal((*batch_and_size, inputs)), normal((inputs, outputs), 1)
    gradient = normal((*batch_and_size, outputs), 2)
    y, dx, d_weight = jax.jit(functools.partial(value_and_pull, pointwise_conv))(
        x, weight, gradient
    )
    rows = x.reshape(-1, inputs).astype(float)
    gradient_rows = gradient.reshape(-1, outputs).astype(float)
    np.testing.assert_allclose(y.reshape(-1, outputs), rows @ weight, atol=5e-6)
    np.testing.assert_allclose(dx.reshape(-1, inputs), gradient_rows @ weight.T, atol=1e-5)
    np.testing.assert_allclose(d_weight, rows.T @ gradient_rows, atol=1e-4)


def test_pointwise_conv_keeps_bfloat16():
    x, weight = (jnp.array(normal(s), jnp.bfloat16) for s in [(4, 8), (8, 6)])
    y, pull = jax.vjp(pointwise_conv, x, weight)
    assert {y.dtype} | {d.dtype for d in pull(y)} == {jnp.dtype(jnp.bfloat16)}


# For processes of their own: the number of threads and the choice of kernels are fixed in each.
DIGEST = """
import hashlib
import jax, numpy as np
from hccr_jax.ops.batch_norm import batch_norm_train
from hccr_jax.ops.depthwise_block import depthwise_block_train
from hccr_jax.ops.pointwise import pointwise_conv

@jax.jit
def run(x, weight, scale):
    def loss(x, weight, scale):
        y, *statistics = batch_norm_train(x, scale, scale, True, 1e-3, None)
        pair = scale, scale
        y = pointwise_conv(y, jax.numpy.eye(40, dtype=y.dtype) * scale[None])
        for stride in 1, 2:
            y, *more = depthwise_block_train(y, pair, weight, pair, stride, 1e-3, None)
            statistics += more
        return (y ** 2).sum(), statistics
    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weight, scale)

rng = np.random.default_rng(0)
inputs = [rng.normal(size=s).astype(np.float32) for s in [(33, 9, 9, 40), (3, 3, 40), (40,)]]
for _ in range(2):
    arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run(*inputs)[1])]
    arrays += [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run(*inputs)[0][1])]
    print(hashlib.sha256(b"".join(arrays)).hexdigest())
"""

LOGITS = """
import sys
import jax, numpy as np
from flax import nnx
from hccr_jax.models.functional import split_model
from hccr_jax.models.registry import create_model

network = create_model("mobilenet_v1", num_classes=7, width=0.25, rngs=nnx.Rngs(0))
apply, params, stats = split_model(network)
images = np.random.default_rng(0).random((16, 32, 32, 1), np.float32)
logits, _ = jax.jit(lambda p, s, x: apply(p, s, x, True))(params, stats, images)
np.save(sys.argv[1], logits)
"""


def start(script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return output


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot restrict a process here")
def test_the_kernels_are_deterministic_on_any_number_of_threads():
    if not native.available():  # built now, so that the two processes need not both do it
        pytest.skip("no C++ compiler here")
    core = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, {{{core}}})\n"
    both = [start(DIGEST), start(pin + DIGEST)]
    digests = {line for process in both for line in finish(process).splitlines()}
    assert len(digests) == 1


def test_networks_have_the_same_logits_without_the_kernels(tmp_path):
    native.available()
    files = {flag: str(tmp_path / f"logits{flag}.npy") for flag in "01"}
    both = [start(LOGITS, file, HCCR_CPU_KERNELS=flag) for flag, file in files.items()]
    assert [finish(process) for process in both] == ["", ""]
    with_kernels, without = np.load(files["1"]), np.load(files["0"])
    assert np.ptp(with_kernels) > 0.1
    np.testing.assert_allclose(without, with_kernels, atol=1e-4)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("target", "wider"),
    [pytest.param("x86-64", "", marks=pytest.mark.slow), ("x86-64-v3", " avx512f ")],
)
def test_the_kernels_of_narrower_processors_agree_with_float64(target, wider):
    """Runs the tests above in a process whose kernels are built for an earlier processor."""
    machine = platform.system(), platform.machine()
    if not native.available() or machine != ("Linux", "x86_64"):
        pytest.skip("no C++ compiler here, or another kind of machine")
    if wider not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no wider vectors")
    script = f"""
import sys
import pytest
from hccr_jax.ops import native
native.FLAGS = tuple(f.replace("-march=native", "-march={target}") for f in native.FLAGS)
names = "(depthwise_block or batch_norm_train or pointwise) and float64 or gradients_of_a_matrix"
sys.exit(pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "-k", names, sys.argv[1]]))
"""
    finish(start(script, __file__))


@pytest.mark.parametrize("mean", [0.0, 3.0, -1000.0])
def test_statistics_in_one_pass_agree_with_float64(mean):
    x = np.random.default_rng(0).normal(mean, 2.0, (7, 5, 5, 24)).astype(np.float32)
    ours_mean, ours_variance = one_pass_statistics(jnp.array(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(ours_mean, exact.mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours_variance, exact.var((0, 1, 2)), rtol=2e-5)
