"""Fits the classical recogniser to the batches of a run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hccr_jax import sharding
from hccr_jax.data.input_pipeline import Feed, call_lengths, gather
from hccr_jax.data.splits import Split
from hccr_jax.models.gradient_features import gradient_features
from hccr_jax.models.mqdf import class_rows, fit_discriminant, fit_lda, fit_scale
from hccr_jax.models.registry import Apply
from hccr_jax.train_state import AUGMENT
from hccr_jax.train_step import row_keys, to_float

SCALE_IMAGES = 4096  # of the validation split; their logits for 3,755 classes take 62 MB
IMAGES_AT_ONCE = 256


def fit_mqdf(
    params: Any,
    apply: Apply,
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
      apply: the recogniser as a pure function.
      feed: of the training images.
      num_steps: batches to fit to.
      augment: from `augment.make_augment`; draws as the training step does.
      validation: the scale of the logits is fitted to it.
    """
    num_classes, dims, eigenvectors = params["discriminant"]["vectors"].shape
    features, labels = read_features(feed, num_steps, augment)
    groups = class_rows(labels, num_classes)
    lda = fit_lda(features, *groups, dims)
    reduced = jnp.dot(features, lda["weight"], precision="highest") + lda["bias"][None]
    minor = jnp.asarray(jax.device_get(params["discriminant"]["minor_variance"]))
    discriminant = fit_discriminant(reduced, *groups, eigenvectors, minor)

    rows = np.linspace(0, len(validation.labels) - 1, SCALE_IMAGES).astype(np.int64)
    images, labels = gather(validation, np.unique(rows))

    @jax.jit
    def evaluate(params, images):
        def one(image):
            return apply(params, {}, to_float(image)[None, ..., None])[0][0]

        return jax.lax.map(one, images, batch_size=IMAGES_AT_ONCE)

    logits = evaluate({"lda": lda, "discriminant": discriminant}, images)
    discriminant["scale"] = fit_scale(logits, labels)
    fitted = jax.device_get({"lda": lda, "discriminant": discriminant})
    return sharding.put_whole(fitted, feed.mesh)


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
        return gradient_features(augment(keys, to_float(images))), labels

    parts, step = [], 0
    for call in feed.calls(0, list(call_lengths(0, num_steps, feed.longest, []))):
        for index in range(call.num_steps):
            batch = compute(call.arrays, np.int32(index), np.int32(step + index))
            parts.append(jax.device_get(batch))
        step += call.num_steps
    features, labels = map(np.concatenate, zip(*parts, strict=True))
    return features, labels
