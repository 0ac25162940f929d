"""Fits MQDF: to the batches of a run, or as the ensemble member of a network to its images."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from tqdm import tqdm

from hccr_jax.data.splits import Split, gather, padded_rows, rows_spread
from hccr_jax.inference.steps import to_float
from hccr_jax.models.mqdf import discriminate, extract_features
from hccr_jax.ops import cross_entropy
from hccr_jax.runtime import distributed, sharding
from hccr_jax.runtime.rng import AUGMENT, row_keys
from hccr_jax.train.input_pipeline import BatchSource, chunk_lengths

SCALE_IMAGES = 4096  # that the scale is fitted to; their logits for 3,755 classes take 62 MB
IMAGES_AT_ONCE = 256


def fit_mqdf(
    params: Any,
    batches: BatchSource,
    num_steps: int,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    validation: Split,
) -> Any:
    """Returns fitted parameters of `models.mqdf.MQDF`.

    The features of all images are held in memory, 2 KiB each. Every process fits by itself, to the
    same numbers.

    Args:
      params: initial ones, of the shapes and minor variance to fit.
      batches: of the training images.
      num_steps: batches to fit to.
      augment: from `augment.make_augment`; draws as the training step does.
      validation: the scale of the logits is fitted to it.
    """
    fitted = _fit_discriminants(params, *read_features(batches, num_steps, augment))
    images, labels = gather(validation, rows_spread(len(validation.labels), SCALE_IMAGES))
    _set_scale(fitted, _read_images(images), labels)
    return sharding.replicate(jax.device_get(fitted), batches.mesh)


def fit_mqdf_member(params: Any, split: Split, mesh: Mesh) -> Any:
    """Returns parameters of `models.mqdf.MQDF`, fitted to a split's images as they are.

    The scale of the logits is that of discriminants which have not seen a tenth of the writers, on
    the characters of these.

    Args:
      params: initial ones, of the shapes and minor variance to fit.
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
    return sharding.replicate(jax.device_get(fitted), mesh)


def _read_images(images: np.ndarray) -> np.ndarray:
    """Returns the features, float32 (N, 512), of images uint8 (N, S, S)."""
    compute = jax.jit(lambda images: extract_features(to_float(images)))
    count, parts = len(images), []
    batches, silent = list(padded_rows(count, IMAGES_AT_ONCE)), not distributed.is_primary()
    for rows in tqdm(batches, "features for MQDF", leave=False, unit="batch", disable=silent):
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
    """Returns fitted parameters of `models.mqdf.MQDF`, unscaled, from features (N, 512)."""
    num_classes, dims, eigenvectors = params["discriminant"]["vectors"].shape
    groups = class_rows(labels, num_classes)
    lda = fit_lda(features, *groups, dims)
    reduced = jnp.dot(features, lda["weight"], precision="highest") + lda["bias"][None]
    minor = jnp.asarray(jax.device_get(params["discriminant"]["minor_variance"]))
    return {"lda": lda, "discriminant": fit_discriminant(reduced, *groups, eigenvectors, minor)}


def read_features(
    batches: BatchSource, num_steps: int, augment: Callable[[jax.Array, jax.Array], jax.Array]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features float32 (N, 512) and labels int32 (N,) of a run's first `num_steps` batches.

    Args:
      batches: of the training images.
      num_steps: batches to read.
      augment: from `augment.make_augment`.
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated(batches.mesh))
    def compute(arrays, index, step):
        images, labels, *_ = batches.get_batch(arrays, index)
        keys = row_keys(batches.seed, AUGMENT, step, len(labels))
        return extract_features(augment(keys, to_float(images))), labels

    parts, step = [], 0
    for chunk in batches.chunks(0, list(chunk_lengths(0, num_steps, batches.max_steps, []))):
        for index in range(chunk.num_steps):
            batch = compute(chunk.arrays, np.int32(index), np.int32(step + index))
            parts.append(jax.device_get(batch))
        step += chunk.num_steps
    features, labels = map(np.concatenate, zip(*parts, strict=True))
    return features, labels


RIDGE = 0.2  # added to the within-class variances, in units of their mean


def class_rows(labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of each class, int32 (K, n), and their weights, float32 (K, n).

    n is the size of the largest class; smaller ones are filled up with rows of weight 0.

    >>> rows, weights = class_rows(np.array([1, 0, 1]), 2)
    >>> rows.tolist(), weights.tolist()
    ([[1, 0], [0, 2]], [[1.0, 0.0], [1.0, 1.0]])
    """
    counts = np.bincount(labels, minlength=num_classes)
    filled = np.arange(counts.max()) < counts[:, None]
    rows = np.zeros(filled.shape, np.int32)
    rows[filled] = np.argsort(labels, kind="stable")
    return rows, filled.astype(np.float32)


def _centre(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the count () and mean (d,) of weighted rows (n, d), and the rows without it."""
    count = weights.sum()
    mean = (x * weights[:, None]).sum(0) / jnp.maximum(count, 1.0)
    return count, mean, (x - mean[None]) * weights[:, None]


@functools.partial(jax.jit, static_argnames="dims")
def fit_lda(x: jax.Array, rows: jax.Array, weights: jax.Array, dims: int) -> dict[str, jax.Array]:
    """Returns Fisher's linear discriminants as the parameters of a `Projection`.

    What they give has mean 0 and, over all classes, unit variance within the classes, without
    correlation.

    Args:
      x: float32 (N, D).
      rows, weights: from `class_rows`.
      dims: how many discriminants, the best ones first.
    """
    with jax.default_matmul_precision("highest"):

        def add(within, group):
            count, mean, centred = _centre(x[group[0]], group[1])
            return within + centred.T @ centred, (count, mean)

        zeros = jnp.zeros((x.shape[1], x.shape[1]))
        within, (counts, means) = lax.scan(add, zeros, (rows, weights))
        shares = (counts / counts.sum())[:, None]
        mean = (means * shares).sum(0)
        between = (means - mean[None]).T @ ((means - mean[None]) * shares)
        within /= counts.sum()
        ridge = RIDGE * jnp.trace(within) / len(within)
        values, vectors = jnp.linalg.eigh(within + ridge * jnp.eye(len(within)))
        whiten = vectors / jnp.sqrt(values)[None]
        _, turn = jnp.linalg.eigh(whiten.T @ between @ whiten)
        weight = whiten @ turn[:, ::-1][:, :dims]
        return {"weight": weight, "bias": -mean @ weight}


@functools.partial(jax.jit, static_argnames="eigenvectors")
def fit_discriminant(
    x: jax.Array, rows: jax.Array, weights: jax.Array, eigenvectors: int, minor_variance: jax.Array
) -> dict[str, jax.Array]:
    """Returns the parameters of a `QuadraticDiscriminant`, unscaled.

    Args:
      x: float32 (N, d).
      rows, weights: from `class_rows`.
      eigenvectors: k, of each class.
      minor_variance: δ; no own variance of a class is taken to be smaller.
    """

    def one(group):
        count, mean, centred = _centre(x[group[0]], group[1])
        values, vectors = jnp.linalg.eigh(centred.T @ centred / jnp.maximum(count, 1.0))
        return mean, vectors[:, ::-1][:, :eigenvectors], values[::-1][:eigenvectors]

    # One class at a time: on a CPU of few threads, XLA's eigenvectors of a batch can wait forever.
    with jax.default_matmul_precision("highest"):
        mean, vectors, values = lax.map(one, (rows, weights))
    return {
        "mean": mean,
        "vectors": vectors,
        "variances": jnp.maximum(values, minor_variance),
        "minor_variance": minor_variance,
        "scale": jnp.ones(()),
    }


@jax.jit
def fit_scale(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the factor, from 2⁻⁸ to 2², that makes logits (N, K) most likely to give labels (N,).

    Features of one image go together, so the Gaussians are far too sure of themselves.
    """
    scales = 2.0 ** jnp.linspace(-8.0, 2.0, 161)
    means = lax.map(
        lambda scale: cross_entropy.cross_entropy(scale * logits, labels).mean(), scales
    )
    return scales[means.argmin()]
