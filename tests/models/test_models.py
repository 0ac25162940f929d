"""The networks against published counts, the paper's cost formula and their contracts."""

import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hccr_jax.errors import InputError
from hccr_jax.models import alexnet
from hccr_jax.models.blocks import DepthwiseSeparable, InvertedResidual, scaled_channels
from hccr_jax.models.costs import count_costs, recording, summarize
from hccr_jax.models.functional import count_parameters, split_model
from hccr_jax.models.layers import (
    AveragePool,
    BatchNorm,
    Classifier,
    Conv,
    ConvNorm,
    MaxPool,
    he_uniform,
    xavier_uniform,
)
from hccr_jax.models.registry import MODELS, create_model, network_options
from hccr_jax.models.resnet import BasicBlock, Bottleneck


@pytest.fixture
def small_alexnet(monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns the width of AlexNet's dense layers, small here: drawing 4,096² weights is slow."""
    monkeypatch.setattr(alexnet, "DENSE_CHANNELS", 512)
    return 512


def describe(name: str, image_px: int, **arguments) -> tuple[int, str, int]:
    """Returns a network's parameter count, its table and its multiply-adds."""
    network = create_model(name, rngs=nnx.Rngs(0), **arguments)
    table, multiply_adds = summarize(network, image_px, arguments["channels"])
    return count_parameters(split_model(network)[1]), table, multiply_adds


@pytest.mark.parametrize(
    ("name", "num_classes", "channels", "image_px", "parameters", "millions"),
    [
        ("mobilenet_v1", 3755, 1, 64, 7_055_275, 49.60),
        ("mobilenet_v2", 3755, 1, 64, 7_033_451, 28.67),
        # For ImageNet; the two papers round to 4.2 M and 569 M, and to 3.4 M and 300 M.
        ("mobilenet_v1", 1000, 3, 224, 4_231_976, 568.74),
        ("mobilenet_v2", 1000, 3, 224, 3_504_872, 300.77),
    ],
)
def test_sizes_are_the_published_ones(name, num_classes, channels, image_px, parameters, millions):
    arguments = {"num_classes": num_classes, "channels": channels}
    counted, table, multiply_adds = describe(name, image_px, **arguments)
    assert counted == parameters
    assert multiply_adds / 1e6 == pytest.approx(millions, abs=0.005)
    assert table.splitlines()[-1].split() == ["total", f"{parameters:,}", f"{multiply_adds:,}"]


@pytest.mark.parametrize(("name", "millions"), [("mobilenet_v1", 187), ("mobilenet_v2", 100)])
def test_strides_of_one_double_the_maps_and_keep_the_weights(name, millions):
    def build(**strides):
        network = create_model(name, num_classes=3755, rngs=nnx.Rngs(0), **strides)
        weights = jax.tree.map(jnp.shape, split_model(network)[1:])
        return weights, [cost for cost in count_costs(network, 64) if cost.multiply_adds]

    weights, costs = build()
    *maps, (classes,) = [cost.output for cost in costs]
    assert classes == 3755
    for strides, larger in (
        ({"stem_stride": 1}, lambda side: True),
        ({"first_stride": 1}, lambda side: side < 32),  # all but the first
    ):
        enlarged_weights, enlarged = build(**strides)
        assert enlarged_weights == weights
        for cost, before, (side, _, channels) in zip(enlarged[:-1], costs[:-1], maps, strict=True):
            times = 2 if larger(side) else 1
            assert cost.output == (times * side, times * side, channels)
            assert cost.multiply_adds == times**2 * before.multiply_adds
        assert enlarged[-1].multiply_adds == costs[-1].multiply_adds
        assert enlarged[-2].output[:2] == (4, 4)
        if "stem_stride" in strides:
            total = sum(cost.multiply_adds for cost in enlarged)
            assert total / 1e6 == pytest.approx(millions, abs=0.5)


@pytest.mark.parametrize(("name", "width", "parameters"), [
    ("mobilenet_v1", 0.25, 470_072),
    ("mobilenet_v1", 0.5, 1_331_592),
    ("mobilenet_v2", 0.35, 1_677_128),
    ("mobilenet_v2", 1.4, 6_108_776),
])  # fmt: skip
def test_width_multipliers_have_the_sizes_of_keras_applications(name, width, parameters):
    counted, _, _ = describe(name, 32, num_classes=1000, channels=3, width=width)
    assert counted == parameters


def formula_resnet(repeats: tuple[int, ...], bottleneck: bool, side: int) -> int:
    """Returns multiply-adds for a square RGB image and 1,000 classes, layer by layer.

    Table 1 of https://arxiv.org/abs/1512.03385; strides in the 3×3 convolutions.
    """
    side, current, total = side // 2, 64, (side // 2) ** 2 * 49 * 3 * 64
    side //= 2
    for stage, count in enumerate(repeats):
        width = 64 * 2**stage
        outputs = 4 * width if bottleneck else width
        for index in range(count):
            before = side
            side = side // 2 if stage > 0 and index == 0 else side
            if bottleneck:
                total += before**2 * current * width + side**2 * width * (9 * width + outputs)
            else:
                total += side**2 * 9 * (current * width + width * width)
            if index == 0 and (stage > 0 or bottleneck):
                total += side**2 * current * outputs
            current = outputs
    return total + current * 1000


# Parameters and 10⁹ multiply-adds as torchvision publishes them with its weights.
@pytest.mark.parametrize(("name", "parameters", "billions", "repeats", "bottleneck"), [
    ("resnet18", 11_689_512, 1.814, (2, 2, 2, 2), False),
    ("resnet34", 21_797_672, 3.664, (3, 4, 6, 3), False),
    ("resnet50", 25_557_032, 4.089, (3, 4, 6, 3), True),
])  # fmt: skip
def test_resnets_have_the_published_sizes(name, parameters, billions, repeats, bottleneck):
    counted, _, multiply_adds = describe(name, 224, num_classes=1000, channels=3)
    assert counted == parameters
    assert multiply_adds == formula_resnet(repeats, bottleneck, 224)
    assert multiply_adds / 1e9 == pytest.approx(billions, abs=0.0005)


def test_alexnet_has_the_published_size():
    arguments = {"num_classes": 1000, "channels": 3, "image_px": 224, "stem_stride": 4}
    network = create_model("alexnet", rngs=nnx.Rngs(0), **arguments)
    assert count_parameters(split_model(network)[1]) == 61_100_840  # torchvision, in one column
    _, multiply_adds = summarize(network, 224, 3)
    # Published: 714,188,480, with a first map of 55×55 (padded by 2); here it is 56×56.
    assert multiply_adds - (56**2 - 55**2) * 11**2 * 3 * 64 == 714_188_480


def test_lenet5_has_the_published_size():
    network = create_model("lenet5", num_classes=10, image_px=32, rngs=nnx.Rngs(0))
    costs = count_costs(network, 32)
    # C1, S2, C3 (all maps seeing all), S4, C5, F6 and the output: LeCun 1998, section II.B.
    assert [cost.parameters for cost in costs] == [156, 0, 2416, 0, 48_120, 10_164, 850]
    assert sum(cost.parameters for cost in costs) == 61_706
    assert [cost.output for cost in costs[:4]] == [
        (28, 28, 6),
        (14, 14, 6),
        (10, 10, 16),
        (5, 5, 16),
    ]
    assert [cost.multiply_adds for cost in costs] == [
        28**2 * 25 * 6, 0, 10**2 * 25 * 6 * 16, 0, 400 * 120, 120 * 84, 84 * 10,
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "outputs"), [
    ("lenet5", [(60, 60, 6), (30, 30, 6), (26, 26, 16), (13, 13, 16)]),
    ("alexnet", [(32, 32, 64), (15, 15, 64), (15, 15, 192), (7, 7, 192), (7, 7, 384), (7, 7, 256),
                 (7, 7, 256), (3, 3, 256)]),
    ("resnet18", [(32, 32, 64), (32, 32, 64), (16, 16, 64), (16, 16, 64)]),
])  # fmt: skip
def test_first_maps_of_64_px_images(name, outputs, small_alexnet):
    costs = count_costs(create_model(name, num_classes=5, rngs=nnx.Rngs(0)), 64)
    assert [cost.output for cost in costs[: len(outputs)]] == outputs


@pytest.mark.parametrize(("image_px", "stem_stride", "fits"), [
    (29, 2, True), (28, 2, False), (15, 1, True), (14, 1, False)
])  # fmt: skip
def test_alexnet_refuses_images_too_small_for_its_poolings(
    image_px, stem_stride, fits, small_alexnet
):
    arguments = {"num_classes": 2, "image_px": image_px, "stem_stride": stem_stride}
    context = contextlib.nullcontext() if fits else pytest.raises(InputError, match="too small")
    with context:
        network = create_model("alexnet", rngs=nnx.Rngs(0), **arguments)
        assert summarize(network, image_px)[1] > 0


def test_poolings_agree_with_numpy():
    x = jnp.abs(normal(2, 7, 9, 3))
    windows = np.lib.stride_tricks.sliding_window_view
    expected = windows(np.asarray(x), (3, 3), (1, 2))[:, ::2, ::2].max((-2, -1))
    np.testing.assert_array_equal(MaxPool()(x), expected)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = windows(padded, (3, 3), (1, 2))[:, ::2, ::2].max((-2, -1))
    np.testing.assert_array_equal(MaxPool(padding=1)(x), expected)
    expected = windows(np.asarray(x), (2, 2), (1, 2))[:, ::2, ::2].mean((-2, -1))
    np.testing.assert_allclose(AveragePool()(x), expected, rtol=1e-6)


def test_the_two_dropouts_of_alexnet_draw_different_masks(small_alexnet):
    network = create_model(
        "alexnet", num_classes=2, image_px=29, dropout_rate=0.5, rngs=nnx.Rngs(0)
    )
    # Ones behind `hidden1`, which both masks then act on: the logit counts what passes.
    network.hidden1.weight[...] = jnp.zeros(network.hidden1.weight.shape)
    network.hidden1.bias[...] = jnp.ones(small_alexnet)
    network.hidden2.weight[...] = jnp.eye(small_alexnet)
    network.classifier.weight[...] = jnp.ones((small_alexnet, 2))
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jax.jit(lambda x: network(x, True, keys))(jnp.zeros((3, 29, 29, 1)))
    seen = np.asarray(logits)[:, 0]
    # A share of 1/4 passes two masks of 1/2 each (1/2 passes one used twice), each scaled by 2.
    np.testing.assert_allclose(seen / 4 / small_alexnet, 0.25, atol=0.08)
    assert len(set(seen)) == 3


def make_block(block: type[nnx.Module], *sizes: int, dtype=jnp.float32):
    return block(*sizes, epsilon=1e-3, dtype=dtype, rngs=nnx.Rngs(0))


def normal(*shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(1).normal(size=shape), jnp.float32)


def cost_of(layer, shape: tuple[int, ...]) -> int:
    with recording() as costs:
        jax.eval_shape(lambda x: layer(x, False, None), jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(cost.multiply_adds for cost in costs)


@pytest.mark.parametrize(("block", "inner", "shortcut"), [
    (BasicBlock, 8, True), (BasicBlock, 16, False), (Bottleneck, 2, True), (Bottleneck, 8, False)
])  # fmt: skip
def test_a_residual_block_of_scale_zero_is_its_shortcut(block, inner, shortcut):
    built = make_block(block, 8, inner, 1)
    built.last.norm.scale[...] = jnp.zeros(built.last.norm.scale.shape)
    x = normal(2, 4, 4, 8)
    expected = x if shortcut else built.projection(x, False, None)
    np.testing.assert_array_equal(built(x, False, None), np.maximum(expected, 0))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_separable_block_has_the_cost_of_section_3_2(stride):
    inputs, outputs, kernel = 24, 56, 3
    before = make_block(ConvNorm, 1, inputs, 1)
    block = make_block(DepthwiseSeparable, inputs, outputs, stride)

    def both(x, train, axis_name):
        return block.pointwise(block(x, before, train, axis_name), train, axis_name)

    height, width = 12 // stride, 16 // stride
    expected = height * width * inputs * (kernel**2 + outputs)
    assert cost_of(both, (1, 12, 16, 1)) == 12 * 16 * inputs + expected


def test_an_inverted_residual_has_the_cost_of_its_three_layers():
    block = make_block(InvertedResidual, 16, 24, 2, 6)
    expand, depthwise, project = 10 * 10 * 16 * 96, 5 * 5 * 9 * 96, 5 * 5 * 96 * 24
    assert cost_of(block, (1, 10, 10, 16)) == expand + depthwise + project


@pytest.mark.parametrize(("stride", "channels_out", "shortcut"), [
    (1, 16, True), (1, 24, False), (2, 16, False)
])  # fmt: skip
def test_an_inverted_residual_of_scale_zero_is_its_shortcut(stride, channels_out, shortcut):
    block = make_block(InvertedResidual, 16, channels_out, stride, 2)
    block.project.norm.scale[...] = jnp.zeros(channels_out)
    x = normal(2, 6, 6, 16)
    expected = x if shortcut else jnp.zeros((2, 6 // stride, 6 // stride, channels_out))
    np.testing.assert_array_equal(block(x, False, None), expected)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("channels_out", [24, 16])
def test_a_first_block_fused_with_the_stem_is_the_composition(channels_out, train):
    stem, first = (
        make_block(ConvNorm, 3, 16, 3, 2),
        make_block(InvertedResidual, 16, channels_out, 1, 1),
    )
    images = normal(4, 9, 9, 3)
    apart = first(stem(images, train, None), train, None)
    together = first(images, train, None, stem=stem)
    np.testing.assert_allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize(("channels", "kernel", "stride"), [
    (1, 3, 2), (3, 3, 2), (3, 3, 1), (8, 3, 2), (8, 5, 1), (8, 1, 2), (8, 1, 1), (1, 5, 2)
])  # fmt: skip
@pytest.mark.parametrize("height", [9, 3])  # the lower ones are smaller than some filters
@pytest.mark.parametrize("padding", [None, 0])
def test_conv_is_a_convolution_in_each_implementation(channels, kernel, stride, height, padding):
    if padding == 0 and kernel > height:
        pytest.skip("the filter is larger than the map")
    conv = Conv(channels, 6, kernel, stride, padding=padding, rngs=nnx.Rngs(0))
    x = normal(2, height, 7, channels)
    border = kernel // 2 if padding is None else padding
    expected = jax.lax.conv_general_dilated(
        x, conv.weight[...], (stride, stride), [(border, border)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(conv(x), expected, atol=2e-6)
    conv = Conv(channels, 6, kernel, stride, padding=padding, bias=True, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(6.0)
    shifted = np.asarray(expected) + np.arange(6.0)
    np.testing.assert_allclose(conv(x), shifted, atol=2e-6)


@pytest.mark.parametrize(("initial", "variance"), [
    (xavier_uniform, 2 / (300 + 100)), (he_uniform, 2 / 300)
])  # fmt: skip
def test_initial_weights_have_the_variance_of_their_source(initial, variance):
    weights = np.asarray(initial(jax.random.key(0), (300, 100), 300, 100))
    np.testing.assert_allclose([weights.mean(), weights.var()], [0, variance], rtol=0.02, atol=1e-3)
    assert np.abs(weights).max() <= np.sqrt(3 * variance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mqdf"}))
def test_logits_parameters_and_statistics_are_float32(name, dtype, small_alexnet):
    options = {"width": 0.25} if "width" in network_options(name) else {}
    network = create_model(
        name, num_classes=5, image_px=32, dtype=dtype, rngs=nnx.Rngs(0), **options
    )
    apply, params, batch_stats = split_model(network)
    images = jax.ShapeDtypeStruct((3, 32, 32, 1), jnp.float32)
    for train in (False, True):
        logits, after = jax.eval_shape(
            lambda p, s, x, train=train: apply(p, s, x, train), params, batch_stats, images
        )
        assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, after))} == {jnp.dtype("float32")}
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, batch_stats)


def test_a_block_in_bfloat16_rounds_to_8_bits():
    x = normal(4, 6, 6, 16)

    def output(dtype):
        block = make_block(InvertedResidual, 16, 24, 1, 2, dtype=dtype)
        y = jax.jit(lambda x: block(x, False, None))(x)
        assert y.dtype == dtype
        return np.asarray(y, np.float32)

    exact = output(jnp.float32)
    error = np.abs(output(jnp.bfloat16) - exact).max() / np.abs(exact).max()
    assert 2**-10 < error < 2**-6


def test_batch_norm_stores_batch_statistics_in_training_and_uses_them_afterwards():
    norm = BatchNorm(16, relu6=False, epsilon=0.0)
    x = 3 * normal(8, 5, 5, 16) + 2
    y = norm(x, True, None)
    np.testing.assert_allclose(norm.mean[...], np.mean(x, (0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(norm.variance[...], np.var(x, (0, 1, 2)), rtol=1e-4)
    np.testing.assert_array_equal(norm(x, False, None), y)


def test_a_dropout_mask_depends_on_its_own_key_alone():
    classifier = Classifier(64, 64, 0.5, rngs=nnx.Rngs(0))
    classifier.weight[...] = jnp.eye(64)  # so that the logits are the features that were kept
    ones, keys = jnp.ones((6, 2, 2, 64)), jax.random.split(jax.random.key(3), 6)
    features = np.asarray(classifier(ones, True, keys))
    assert set(np.unique(features)) == {0.0, 2.0}
    assert 0.4 < (features > 0).mean() < 0.6
    assert len(np.unique(features, axis=0)) == 6
    np.testing.assert_array_equal(classifier(ones[3:5], True, keys[3:5]), features[3:5])
    np.testing.assert_array_equal(classifier(ones, True, keys[::-1]), features[::-1])
    np.testing.assert_array_equal(classifier(ones, False, None), np.ones((6, 64)))


@pytest.mark.parametrize("channels", [8, 16, 24, 32, 64, 96, 160, 320, 1280])
def test_scaled_channels_obeys_its_three_rules(channels):
    assert scaled_channels(channels, 1.0) == channels
    for width in np.linspace(0.05, 2, 40):
        scaled = scaled_channels(channels, width)
        assert scaled % 8 == 0
        assert scaled >= max(8, 0.9 * channels * width)
        assert scaled <= max(8, channels * width + 8)


def test_names_are_known_without_importing_jax():
    code = "import sys, hccr_jax.models.registry; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_network_is_refused():
    with pytest.raises(KeyError, match="mobilenet_v9"):
        create_model("mobilenet_v9", num_classes=2, rngs=nnx.Rngs(0))
