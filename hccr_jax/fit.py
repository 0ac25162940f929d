"""Fits the classical recogniser: to the batches of a run, or to its images beside a network."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hccr_jax import processes, sharding
from hccr_jax.data.input_pipeline import Feed, call_lengths, gather
from hccr_jax.data.splits import Split, rows_spread
from hccr_jax.models.mqdf import (
    class_rows,
    discriminate,
    extract_features,
    fit_discriminant,
    fit_lda,
    fit_scale,
)
from hccr_jax.train_state import AUGMENT
from hccr_jax.train_step import row_keys, to_float

SCALE_IMAGES = 4096  # that the scale is fitted to; their logits for 3,755 classes take 62 MB
IMAGES_AT_ONCE = 256


def fit_mqdf(
    params: Any,
    feed: Feed,
    num_steps: int,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    validation: Split,
) -> Any:
    """Returns fitted parameters of `models.mqdf.MQDF`.

    The features of all images lie in memory, 2 KiB each. Every process fits by itself, to the same
    numbers.

    Args:
      params: initial ones; tell the shapes and the minor variance.
      feed: of the training images.
      num_steps: batches to fit to.
      augment: from `augment.make_augment`; draws as the training step does.
      validation: the scale of the logits is fitted to it.
    """
    fitted = _fit_discriminants(params, *read_features(feed, num_steps, augment))
    images, labels = gather(validation, rows_spread(len(validation.labels), SCALE_IMAGES))
    _set_scale(fitted, _read_images(images), labels)
    return sharding.put_whole(jax.device_get(fitted), feed.mesh)


def fit_beside(params: Any, split: Split, mesh: Mesh) -> Any:
    """Returns parameters of `models.mqdf.MQDF`, fitted to a split's images as they are.

    The scale of the logits is that of discriminants which have not seen a tenth of the writers, on
    the characters of these.

    Args:
      params: initial ones; tell the shapes and the minor variance.
      split: the training split.
      mesh: from `sharding.create_mesh`.
    """
    features, labels = _read_images(split.images), np.asarray(split.labels)
    held = np.unique(split.writers, return_inverse=True)[1] % 10 == 0
    if held.all():  # one writer
        held = np.arange(len(labels)) % 10 == 0
    unseen = np.flatnonzero(held)
    unseen = unseen[rows_spread(len(unseen), SCALE_IMAGES)]
    partly, fitted = (
        _fit_discriminants(params, features[rows], labels[rows]) for rows in (~held, slice(None))
    )
    _set_scale(partly, features[unseen], labels[unseen])
    fitted["discriminant"]["scale"] = partly["discriminant"]["scale"]
    return sharding.put_whole(jax.device_get(fitted), mesh)


def _read_images(images: np.ndarray) -> np.ndarray:
    """Returns the features, float32 (N, 512), of images uint8 (N, S, S)."""
    compute = jax.jit(lambda images: extract_features(to_float(images)))
    count, parts = len(images), []
    starts, silent = range(0, count, IMAGES_AT_ONCE), not processes.is_first()
    for start in tqdm(starts, "features for MQDF", leave=False, unit="batch", disable=silent):
        rows = np.minimum(np.arange(start, start + IMAGES_AT_ONCE), count - 1)
        parts.append(jax.device_get(compute(images[rows])))
    return np.concatenate(parts)[:count]


def _set_scale(fitted: Any, features: np.ndarray, labels: np.ndarray) -> None:
    """Fits the scale of the logits to features (N, 512) of images that the fit has not seen."""

    @jax.jit
    def evaluate(fitted, features):
        # Not all at once: each takes 200 kB for each thousand classes.
        return jax.lax.map(
            lambda one: discriminate(fitted, one[None])[0], features, batch_size=IMAGES_AT_ONCE
        )

    fitted["discriminant"]["scale"] = fit_scale(evaluate(fitted, features), labels)


def _fit_discriminants(params: Any, features: np.ndarray, labels: np.ndarray) -> Any:
    """Returns fitted parameters of `models.mqdf.MQDF`, unscaled; arguments as for `fit_beside`."""
    num_classes, dims, eigenvectors = params["discriminant"]["vectors"].shape
    groups = class_rows(labels, num_classes)
    lda = fit_lda(features, *groups, dims)
    reduced = jnp.dot(features, lda["weight"], precision="highest") + lda["bias"][None]
    minor = jnp.asarray(jax.device_get(params["discriminant"]["minor_variance"]))
    return {"lda": lda, "discriminant": fit_discriminant(reduced, *groups, eigenvectors, minor)}


def read_features(
    feed: Feed, num_steps: int, augment: Callable[[jax.Array, jax.Array], jax.Array]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features float32 (N, 512) and labels int32 (N,) of a run's first `num_steps` batches.

    Args:
      feed: of the training images.
      num_steps: batches to read.
      augment: from `augment.make_augment`.
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated(feed.mesh))
    def compute(arrays, index, step):
        images, labels, *_ = feed.pick(arrays, index)
        keys = row_keys(feed.seed, AUGMENT, step, len(labels))
        return extract_features(augment(keys, to_float(images))), labels

    parts, step = [], 0
    for call in feed.calls(0, list(call_lengths(0, num_steps, feed.longest, []))):
        for index in range(call.num_steps):
            batch = compute(call.arrays, np.int32(index), np.int32(step + index))
            parts.append(jax.device_get(batch))
        step += call.num_steps
    features, labels = map(np.concatenate, zip(*parts, strict=True))
    return features, labels
