"""The Pallas kernels of whole blocks, interpreted on a CPU, and their lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from hccr_jax.ops import blocks, one_pass_gradients, pallas, product_gradients, products, sums
from hccr_jax.ops.batch_norm import batch_norm_train
from hccr_jax.ops.depthwise import depthwise_conv
from hccr_jax.ops.pallas import ALIGNMENT, ROWS, Weight
from hccr_jax.ops.product_gradients import OutputGradient

EPSILON = 1e-3


def drawn(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32).astype(dtype)


def norm_of(seed, channels):
    return jnp.stack(
        [drawn(seed, channels), 1 + 0.3 * drawn(seed + 1, channels), drawn(seed + 2, channels) + 1]
    )


def wide(array):
    return np.asarray(array, np.float64)


def active(x, norm, dtype):
    """Returns ReLU6 of normalised x, rounded to a dtype, and where its gradient is not 0."""
    x, norm = wide(x), wide(norm)
    scaled = (x - norm[0]) * norm[1] + norm[2]
    rounded = wide(jnp.asarray(np.clip(scaled, 0.0, 6.0), jnp.float32).astype(dtype))
    return rounded, (scaled > 0.0) & (scaled < 6.0)


def close(ours, theirs, dtype, scale=1.0):
    """Asserts agreement to the rounding of a dtype, relative to the largest value."""
    rounding = scale * (2e-6 if dtype == jnp.float32 else 1e-2)
    np.testing.assert_allclose(
        wide(ours), theirs, rtol=rounding, atol=rounding * np.abs(theirs).max()
    )


@pytest.mark.parametrize(("dtype", "has_norm"), [(jnp.float32, False), (jnp.bfloat16, True)])
def test_product_and_its_moments_agree_with_float64(dtype, has_norm, monkeypatch):
    monkeypatch.setattr(products, "PROGRAMS", 3)  # so that each takes several tiles of rows
    x, w = drawn(0, 5 * ROWS + 7, 24, dtype=dtype), drawn(1, 24, 40, dtype=dtype)
    norm = norm_of(2, 24) if has_norm else None
    y, moments = products.product.__wrapped__(x, norm, Weight.of(w))
    inputs = active(x, norm, dtype)[0] if has_norm else wide(x)
    close(y, inputs @ wide(w), dtype)
    assert y.dtype == dtype
    scale, bias = drawn(7, 40), drawn(8, 40)
    each = products.product_rows(*y.shape).each
    norm, statistics = sums.finish_moments(
        moments, each, len(y), Weight.of(scale), Weight.of(bias), EPSILON
    )
    mean, variance = wide(y).mean(0), wide(y).var(0)
    close(statistics, np.stack([mean, variance]), jnp.float32)
    slope = wide(scale) / np.sqrt(variance + EPSILON)
    close(norm, np.stack([mean, slope, wide(bias)]), jnp.float32)


def output_gradient(seed, rows, columns, dtype, has_norm):
    """Returns an `OutputGradient`, and its sum."""
    g, y = (drawn(seed + k, rows, columns, dtype=dtype) for k in range(2))
    statistics = jnp.stack([drawn(seed + 2, columns), jnp.ones(columns)])
    flow, norm = rows * drawn(seed + 3, 2, columns), norm_of(seed + 4, columns)
    slope = wide(norm[1]) if has_norm else 1.0
    d_y = (
        slope * wide(g)
        + (wide(flow[0]) + 2 * wide(flow[1]) * (wide(y) - wide(statistics[0]))) / rows
    )
    after = OutputGradient(g, y, statistics, flow, norm if has_norm else None)
    return after, wide(jnp.asarray(d_y, jnp.float32).astype(dtype))


@pytest.mark.parametrize(
    ("depth", "width", "dtype"), [(24, 40, jnp.bfloat16), (72, 144, jnp.float32)]
)
def test_gradients_of_a_product_after_a_norm_agree_with_float64(depth, width, dtype, monkeypatch):
    monkeypatch.setattr(product_gradients, "PROGRAMS", 3)
    monkeypatch.setattr(one_pass_gradients, "PROGRAMS", 3)
    count = 4 * ROWS + 5
    u, norm = drawn(0, count, depth, dtype=dtype), norm_of(1, depth)
    w = drawn(4, depth, width, dtype=dtype)
    after, d_y = output_gradient(5, count, width, dtype, has_norm=width == 40)
    inputs, is_open = active(u, norm, dtype)
    expected = (d_y @ wide(w).T) * is_open

    def agree(dx, found, parts):
        close(dx, expected, dtype)
        stored = wide(dx)
        deviated = (stored * (wide(u) - wide(norm[0]))).sum(0)
        close(wide(found).sum(1), np.stack([stored.sum(0), deviated]), jnp.float32, 5.0)
        close(sums.sum_parts(parts), inputs.T @ d_y, jnp.float32, 5.0)

    before = u, norm
    dx, found = product_gradients.input_gradient.__wrapped__(after, Weight.of(w), count, before)
    agree(dx, found, product_gradients.weight_gradient.__wrapped__(u, norm, after, count))
    if width <= blocks.NARROW_OUTPUT:
        agree(*one_pass_gradients.narrow_gradients.__wrapped__(u, norm, after, Weight.of(w), count))


@pytest.mark.parametrize(("dtype", "has_shortcut"), [(jnp.float32, False), (jnp.bfloat16, True)])
def test_gradients_of_a_product_of_few_inputs_agree_with_float64(has_shortcut, dtype, monkeypatch):
    monkeypatch.setattr(product_gradients, "PROGRAMS", 3)
    monkeypatch.setattr(one_pass_gradients, "PROGRAMS", 3)
    count, depth, width = 4 * ROWS + 5, 24, 144
    x, w = drawn(0, count, depth, dtype=dtype), drawn(1, depth, width, dtype=dtype)
    after, _ = output_gradient(2, count, width, dtype, has_norm=False)
    y = wide(jnp.asarray(wide(x) @ wide(w), jnp.float32).astype(dtype))
    mean, flow = wide(after.statistics[0]), wide(after.d_statistics)
    d_y = wide(after.g) + (flow[0] + 2 * flow[1] * (y - mean)) / count
    d_y = wide(jnp.asarray(d_y, jnp.float32).astype(dtype))
    shortcut = drawn(9, count, depth, dtype=dtype) if has_shortcut else None
    expected = d_y @ wide(w).T + (wide(shortcut) if has_shortcut else 0.0)
    computed = after._replace(y=jnp.asarray(y, jnp.float32).astype(dtype))
    found = [
        one_pass_gradients.wide_gradients.__wrapped__(
            x, Weight.of(w), after.g, after.statistics, after.d_statistics, count, True, shortcut
        ),
        (
            product_gradients.input_gradient(computed, Weight.of(w), count, None, shortcut)[0],
            product_gradients.weight_gradient(x, None, computed, count),
        ),
    ]
    for dx, parts in found:
        close(dx, expected, dtype)
        close(sums.sum_parts(parts), wide(x).T @ d_y, dtype, 5.0 if dtype == jnp.float32 else 0.2)


def test_gradients_of_a_norm_agree_with_their_formulas():
    g, y, norm = drawn(0, 3 * ROWS + 9, 24), drawn(1, 3 * ROWS + 9, 24), norm_of(2, 24)
    statistics, parts = jnp.stack([norm[0], 1 + drawn(5, 24) ** 2]), drawn(6, 70, 5, 30)
    found = sums.gradient_sums(g, y, norm)
    found = jnp.concatenate([drawn(7, 1, *found.shape[1:]), found])
    totals, flow, whole = sums.finish_gradients(found, norm, statistics, EPSILON, parts)
    passed, deviated = wide(g).sum(0), (wide(g) * (wide(y) - wide(norm[0]))).sum(0)
    inverse, slope = 1 / np.sqrt(wide(statistics[1]) + EPSILON), wide(norm[1])
    close(totals, np.stack([wide(found[0]).sum(0), passed, deviated * inverse]), jnp.float32, 5.0)
    close(flow, np.stack([-slope * passed, -slope * inverse**2 * deviated / 2]), jnp.float32, 5.0)
    close(whole, wide(parts).sum(0), jnp.float32)


def parameters_of(depth, hidden, width):
    """Returns parameters of a `pointwise` and of a `block` after it."""
    scales = [
        (1 + 0.1 * drawn(k, n), 0.5 + 0.3 * drawn(k + 1, n))
        for k, n in ((1, hidden), (3, hidden), (5, width))
    ]
    matrix, filters, last = (
        0.3 * drawn(7, depth, hidden),
        0.4 * drawn(8, 3, 3, hidden),
        0.3 * drawn(9, hidden, width),
    )
    return (matrix, *scales[0]), (*scales[0], filters, *scales[1], last, *scales[2])


def composed(x, first, second, stride, linear, axis_name=None):
    """Returns what `fused` does, of separate operations."""
    y, *one = batch_norm_train(x @ first[0], *second[:2], True, EPSILON, axis_name)
    u, *two = batch_norm_train(
        depthwise_conv(y, second[2], stride, "shifted"), *second[3:5], True, EPSILON, axis_name
    )
    out, *three = batch_norm_train(u @ second[5], *second[6:], not linear, EPSILON, axis_name)
    has_shortcut = linear and out.shape == x.shape
    return (x + out if has_shortcut else out), [jnp.stack(s) for s in (one, two, three)]


def packed(parameters):
    """Returns parameters where they lie in one vector, after others."""
    values = [parameter.reshape(-1) for parameter in parameters]
    offsets = np.cumsum([ALIGNMENT, *map(len, values)])
    vector = jnp.concatenate([drawn(0, ALIGNMENT), *values])
    return tuple(
        Weight.at(vector, int(offset), parameter.shape)
        for offset, parameter in zip(offsets, parameters, strict=False)
    )


def ordinary(parameters):
    return tuple(map(Weight.of, parameters))


def fused(x, first, second, stride, linear, axis_name=None, weights=ordinary):
    has_shortcut = linear and stride == 1 and x.shape[-1] == second[5].shape[1]
    options = blocks.Options(
        EPSILON, axis_name, stride=stride, linear=linear, shortcut=has_shortcut
    )
    hidden = blocks.pointwise(x, first, weights(first), options)
    hidden, shortcut = hidden if has_shortcut else (hidden, None)
    out, *statistics = blocks.block(hidden, shortcut, second, weights(second), options)
    if not linear:
        out = blocks.activate(out, *second[6:], EPSILON)
    return out, [hidden.statistics, *statistics]


def run(function, x, first, second):
    """Returns the output, the statistics and all gradients of a weighted sum of the output."""

    def loss(x, first, second):
        out, statistics = function(x, first, second)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * weights).sum(), (out, statistics)

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, first, second)


def agree(ours, theirs, tolerance):
    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))

    jax.tree.map(one, ours, theirs)


# MobileNet V2, narrow and with a shortcut; MobileNet V1, wide; odd sizes.
@pytest.mark.parametrize(
    ("shape", "hidden", "width", "stride", "linear", "weights"),
    [
        ((3, 5, 4, 16), 40, 16, 1, True, ordinary),
        ((2, 5, 3, 40), 48, 72, 2, False, packed),
    ],
)
def test_blocks_are_what_they_are_composed_of(shape, hidden, width, stride, linear, weights):
    first, second = parameters_of(shape[-1], hidden, width)
    x = drawn(0, *shape) + 0.3
    ours = functools.partial(fused, stride=stride, linear=linear, weights=weights)
    theirs = functools.partial(composed, stride=stride, linear=linear)
    found, expected = (jax.jit(functools.partial(run, f))(x, first, second) for f in (ours, theirs))
    agree(found, expected, 2e-5)


def test_statistics_are_of_all_devices():
    first, second = parameters_of(16, 32, 16)
    x = drawn(0, 4, 3, 3, 16) + 0.3
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, everywhere = PartitionSpec("data"), PartitionSpec()

    def sharded(x, first, second):
        def one(x, first, second):
            return fused(x, first, second, 1, True, axis_name="data")

        return jax.shard_map(
            one, mesh=mesh, in_specs=(rows, everywhere, everywhere), out_specs=(rows, everywhere),
            check_vma=False,
        )(x, first, second)  # fmt: skip

    ours = jax.jit(functools.partial(run, sharded))(x, first, second)
    whole = functools.partial(composed, stride=1, linear=True)
    agree(ours, jax.jit(functools.partial(run, whole))(x, first, second), 2e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("depth", "hidden", "width", "dtype"),
    [(24, 144, 24, jnp.float32), (64, 384, 96, jnp.bfloat16)],
)
def test_blocks_lower_for_cuda(depth, hidden, width, dtype, monkeypatch):
    monkeypatch.setattr(pallas, "interprets", lambda: False)
    first, second = parameters_of(depth, hidden, width)
    kinds = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (first, second))
    x = jax.ShapeDtypeStruct((64, 8, 8, depth), dtype)

    def rounded(parameters):
        return tuple(Weight.of(p.astype(dtype) if p.ndim > 1 else p) for p in parameters)

    function = functools.partial(fused, stride=1, linear=True, weights=rounded)
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        run_it = jax.jit(lambda x, *p: run(lambda *a: astype(function(*a)), x, *p))
        text = run_it.trace(x, *kinds).lower(lowering_platforms=("cuda",)).as_text()
    # Forward: three maps, and each one's moments. Backward: sums of the last norm; two products,
    # each gradient in one kernel or in two; the depthwise convolution; each one's finish.
    assert text.count("__gpu$xla.gpu.triton") >= 12


def astype(results):
    out, statistics = results
    return out.astype(jnp.float32), statistics
