"""The roofline: layers counted by hand, and the figures known for one accelerator."""

import math

import jax.numpy as jnp
import pytest
from flax import nnx

from hccr_jax.bench.roofline import Layer, Speeds, count_layers, forward_rate, training_rate
from hccr_jax.models.layers import Classifier, ConvNorm
from hccr_jax.models.registry import create_model

NO_WEIGHTS = 10**15  # a batch so large that moving the weights costs an image nothing


class SmallNetwork(nnx.Module):
    """8×8 images → 3×3 convolution with stride 2 → 1×1 convolution → 10 classes."""

    def __init__(self) -> None:
        common = {"epsilon": 1e-3, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        self.stem = ConvNorm(1, 16, 3, 2, **common)
        self.pointwise = ConvNorm(16, 8, 1, **common)
        self.classifier = Classifier(8, 10, 0.0, rngs=nnx.Rngs(0))

    def __call__(self, images):
        x = self.pointwise(self.stem(images, False, None), False, None)
        return self.classifier(x, False, None)


def small_layers() -> list[Layer]:
    return count_layers(SmallNetwork(), 8)


def test_layers_by_hand():
    assert small_layers() == [
        Layer("first", 8 * 8, 4 * 4 * 16, 9 * 16, 4 * 4 * 9 * 16),
        Layer("convolution", 4 * 4 * 16, 4 * 4 * 8, 16 * 8, 4 * 4 * 16 * 8),
        Layer("dense", 4 * 4 * 8, 10, 8 * 10 + 10, 8 * 10),
    ]


# Two bytes a value, four a logit: first layer + convolution + dense layer.
@pytest.mark.parametrize(
    ("level", "moved"),
    [
        ("unfused", 2 * (2 * 64 + 10 * 256) + 2 * (3 * 256 + 11 * 128) + (6 * 128 + 20 * 10)),
        ("fused", 2 * (2 * 64 + 3 * 256) + 2 * (4 * 256 + 5 * 128) + (6 * 128 + 20 * 10)),
        (
            "one backward kernel",
            2 * (2 * 64 + 3 * 256) + 2 * (3 * 256 + 3 * 128) + (6 * 128 + 16 * 10),
        ),
    ],
)
def test_traffic_of_training_by_hand(level: str, moved: int):
    memory_bound = Speeds(bandwidth=1.0, operations=math.inf)
    rate = training_rate(small_layers(), memory_bound, NO_WEIGHTS, 2, level)
    assert rate == pytest.approx(1 / moved, rel=1e-6)


def test_weights_move_once_a_step():
    memory_bound = Speeds(bandwidth=1.0, operations=math.inf)
    fast, slow = (training_rate(small_layers(), memory_bound, b, 2) for b in (NO_WEIGHTS, 4))
    assert 1 / slow - 1 / fast == pytest.approx((144 + 128 + 90) * 40 / 4)


def test_operations_by_hand():
    compute_bound = Speeds(bandwidth=math.inf, operations=1.0)
    rate = training_rate(small_layers(), compute_bound, 1, 2)
    assert rate == pytest.approx(1 / (2 * (2 * 2304 + 3 * 2048 + 3 * 80)))
    rate = forward_rate(small_layers(), compute_bound, 1, 2)
    assert rate == pytest.approx(1 / (2 * (2304 + 2048 + 80)))


def test_forward_traffic_by_hand():
    memory_bound = Speeds(bandwidth=1.0, operations=math.inf)
    rate = forward_rate(small_layers(), memory_bound, NO_WEIGHTS, 4)
    assert rate == pytest.approx(1 / (4 * (64 + 256 + 256 + 128 + 128 + 10)), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds", "thousands"),
    [
        ("mobilenet_v1", 7_055_275, 49.60e6, (372, 585, 856)),
        ("mobilenet_v2", 7_033_451, 28.67e6, (279, 438, 642)),
    ],
)
def test_known_networks(
    name: str, parameters: int, multiply_adds: float, thousands: tuple[int, ...]
):
    layers = count_layers(create_model(name, num_classes=3755, rngs=nnx.Rngs(0)), 64)
    assert sum(layer.multiply_adds for layer in layers) == pytest.approx(multiply_adds, abs=5e3)
    # All parameters but the scales and biases of batch norm, less than one in a hundred.
    assert 0.99 * parameters < sum(layer.weights for layer in layers) < parameters
    # An independent estimate for large batches in bfloat16 on one NVIDIA H200.
    h200 = Speeds(4.3e12, 790e12)
    levels = ("unfused", "fused", "one backward kernel")
    rates = [training_rate(layers, h200, NO_WEIGHTS, 2, level) / 1e3 for level in levels]
    assert rates == pytest.approx(thousands, rel=0.08)
