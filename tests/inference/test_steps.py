"""The evaluation step against NumPy: one view and several, on one device and on four."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from scipy.special import log_softmax

from hccr_jax.inference.steps import (
    EnsembleMember,
    Variables,
    combine_tta,
    make_eval_step,
    make_logits_step,
    stage_names,
    to_float,
)
from hccr_jax.inference.tta import create_tta_views
from hccr_jax.ops.warp import warp
from hccr_jax.runtime.sharding import DATA_AXIS

NUM_CLASSES, IMAGE_PX = 7, 12


def mesh_of(count: int) -> Mesh:
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def make_batch(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, IMAGE_PX, IMAGE_PX), np.uint8)
    return images, rng.integers(0, NUM_CLASSES, rows).astype(np.int32)


def assert_near(ours, expected, atol: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), ours, expected
    )


def linear_network(num_classes: int):
    """Returns a network of one matrix, and its weights: NumPy can compute its logits."""
    weight = np.random.default_rng(1).normal(size=(IMAGE_PX**2, num_classes)).astype(np.float32)

    def apply(weight, statistics, images, *training):
        return images.reshape(len(images), -1) @ weight, {}

    return apply, weight


def assert_ranked(ranking, logs: np.ndarray, labels: np.ndarray) -> None:
    """Compares an evaluation step's output with log-probabilities float64 (B, K)."""
    losses, classes, probabilities = ranking
    best = np.argsort(-logs, axis=1)[:, :5]
    np.testing.assert_array_equal(classes, best)
    np.testing.assert_allclose(losses, -logs[np.arange(8), labels], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        probabilities, np.exp(np.take_along_axis(logs, best, axis=1)), rtol=1e-4, atol=1e-6
    )
    assert probabilities.sharding.is_fully_replicated


def combine(logs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the logarithm of the mean of the views' probabilities (V, B, K), in NumPy."""
    entropy = -(np.exp(logs) * logs).sum(axis=2, keepdims=True)
    weights = weights[:, None, None] * (1 - entropy / np.log(logs.shape[2]))
    return np.log((weights * np.exp(logs)).sum(axis=0) / weights.sum(axis=0))


@pytest.mark.parametrize("num_classes", [3, 50])
def test_the_eval_step_ranks_as_numpy_does(num_classes):
    images, labels = make_batch(8)
    labels %= num_classes
    network, weight = linear_network(num_classes)
    (ranking,) = make_eval_step(network, mesh_of(4))(Variables(weight, {}), images, labels)
    logs = log_softmax(images.reshape(8, -1) / 255.0 @ weight.astype(np.float64), axis=1)
    assert_ranked(ranking, logs, labels)


@pytest.mark.parametrize("devices", [1, 4])
def test_each_component_is_scored_as_numpy_does(devices):
    """Network alone, with views weighted by their certainty, and with an ensemble member."""
    images, labels = make_batch(8)
    network, weight = linear_network(NUM_CLASSES)
    member_weight = np.random.default_rng(2).normal(size=weight.shape).astype(np.float32)
    views = create_tta_views(3, flips=True, upright_prior=0.4)
    seen = []
    for view in views.maps:
        maps = jnp.tile(jnp.array(view)[None], (8, 1, 1))
        seen.append(np.asarray(warp(to_float(images), maps, jnp.zeros((8, 2))), np.float64))
    inputs = np.stack(seen).reshape(len(seen), 8, -1)
    logs = log_softmax(inputs @ weight.astype(np.float64), axis=2)
    member_logs = log_softmax(inputs @ member_weight.astype(np.float64), axis=2)

    def added(logs, member_logs):  # the sum of log-probabilities, normalised
        return log_softmax(logs + 0.5 * member_logs, axis=-1)

    member = EnsembleMember(network, member_weight, 0.5)
    ensemble = combine(added(logs, member_logs), views.weights)
    for tta, joined, expected in (
        (views, None, {"network": logs[0], "tta": combine(logs, views.weights)}),
        (None, member, {"network": logs[0], "ensemble": added(logs[0], member_logs[0])}),
        (views, member, {
            "network": logs[0], "tta": combine(logs, views.weights), "ensemble": ensemble,
        }),
    ):  # fmt: skip
        step = make_eval_step(network, mesh_of(devices), views=tta, member=joined)
        variables = Variables(weight, {}, member_weight if joined else None)
        rankings = step(variables, images, labels)
        assert stage_names(tta, joined) == tuple(expected)
        for ranking, one in zip(rankings, expected.values(), strict=True):
            assert_ranked(ranking, one, labels)
        (headline,) = make_logits_step(network, mesh_of(devices), tta, joined)(variables, images)
        normalised = log_softmax(np.asarray(headline, np.float64), axis=1)
        np.testing.assert_allclose(normalised, list(expected.values())[-1], rtol=1e-4, atol=1e-4)


def test_mirrored_views_make_the_prediction_invariant_to_mirroring():
    images, labels = make_batch(8)
    network, weight = linear_network(NUM_CLASSES)
    step = make_eval_step(network, mesh_of(4), views=create_tta_views(2, flips=True))
    variables = Variables(weight, {})
    prediction = step(variables, images, labels)[-1]
    for mirrored in (images[:, ::-1], images[:, :, ::-1], images[:, ::-1, ::-1]):
        assert_near(step(variables, mirrored, labels)[-1], prediction)
    turned = step(variables, images.swapaxes(1, 2), labels)[-1]
    assert np.abs(turned[0] - prediction[0]).max() > 0.1


def test_one_view_is_the_image_alone():
    images, labels = make_batch(8)
    network, weight = linear_network(NUM_CLASSES)
    alone, seen = (
        make_eval_step(network, mesh_of(4), views=views)(Variables(weight, {}), images, labels)[-1]
        for views in (None, create_tta_views(1, flips=False))
    )
    assert_near(seen, alone)


def test_a_view_without_information_has_no_weight():
    sure, flat = np.array([[4.0, 0.0, 1.0]], np.float32), np.zeros((1, 3), np.float32)
    combined = combine_tta(jnp.array(np.stack([sure, flat])), jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(combined, log_softmax(sure, axis=1), atol=1e-4)
