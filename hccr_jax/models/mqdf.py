"""The classical recogniser: gradient features, LDA, modified quadratic discriminant function.

It is called like the networks, but fitted in closed form (`train.fit_mqdf`).

Source: Kimura, Takashina, Tsuruoka and Miyake, "Modified quadratic discriminant functions and the
application to Chinese character recognition", IEEE TPAMI 9 (1987), there MQDF2. The whole system:
Liu, Yin, Wang and Wang, "Online and offline handwritten Chinese character recognition: benchmarking
on new databases", Pattern Recognition 46 (2013).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.costs import record_cost
from hccr_jax.models.gradient_features import (
    DIRECTIONS,
    GRID,
    NUM_FEATURES,
    equalize_density,
    gradient_features,
)


def extract_features(images: jax.Array) -> jax.Array:
    """Returns the features of images (B, S, S) with equalised density, float32 (B, 512)."""
    return gradient_features(equalize_density(images))


class GradientFeatures(nnx.Module):
    """`extract_features` as a layer without parameters."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (B, S, S, C) to (B, 512); several channels are averaged."""
        features = extract_features(images.mean(axis=3))
        size = images.shape[1]
        # Two matrix products, two Sobel filters of six taps, the blur of columns and of rows.
        blur = DIRECTIONS * GRID * (size * size + GRID * size)
        cost = 2 * size**3 + 2 * 6 * size**2 + blur
        record_cost(self, "gradient features", features, cost)
        return features


class Projection(nnx.Module):
    """An affine map to fewer dimensions."""

    def __init__(self, dims_in: int, dims: int) -> None:
        self.weight = nnx.Param(jnp.zeros((dims_in, dims)))
        self.bias = nnx.Param(jnp.zeros(dims))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, D) to (B, d)."""
        y = jnp.dot(x, self.weight[...], precision="highest") + self.bias[...][None]
        record_cost(self, "linear discriminants", y, self.weight.size)
        return y


class QuadraticDiscriminant(nnx.Module):
    """Scaled log-likelihoods of Gaussians with k variances per class and one for the rest.

    Args:
      num_classes: K.
      dims: d, size of the input.
      eigenvectors: k, principal directions of each class.
      minor_variance: δ, the variance of every other direction.
    """

    def __init__(
        self, num_classes: int, dims: int, eigenvectors: int, minor_variance: float
    ) -> None:
        self.mean = nnx.Param(jnp.zeros((num_classes, dims)))
        self.vectors = nnx.Param(jnp.zeros((num_classes, dims, eigenvectors)))
        self.variances = nnx.Param(jnp.ones((num_classes, eigenvectors)))
        self.minor_variance = nnx.Param(jnp.full((), minor_variance, jnp.float32))
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, d) to logits (B, K), −½ · scale · MQDF2."""
        mean, vectors, variances = self.mean[...], self.vectors[...], self.variances[...]
        minor, (_, dims, leading) = self.minor_variance[...], vectors.shape
        einsum = functools.partial(jnp.einsum, precision="highest")
        # x − mean is never materialised: it would be B × K × d.
        distances = (x**2).sum(1)[:, None] - 2 * einsum("bd,kd->bk", x, mean)
        distances += (mean**2).sum(1)[None]
        offsets = einsum("bd,kdj->bkj", x, vectors) - einsum("kd,kdj->kj", mean, vectors)[None]
        principal = einsum("bkj,kj->bk", offsets**2, 1 / variances - 1 / minor)
        log_determinants = jnp.log(variances).sum(1) + (dims - leading) * jnp.log(minor)
        logits = -0.5 * self.scale[...] * (principal + distances / minor + log_determinants[None])
        record_cost(
            self, "quadratic discriminants", logits, mean.size + vectors.size + variances.size
        )
        return logits


class MQDF(nnx.Module):
    """Gradient features, linear discriminant analysis, modified quadratic discriminant function.

    Args:
      num_classes: K.
      lda_dims: number of discriminants, at most K − 1.
      eigenvectors: principal directions of each class.
      minor_variance: δ, in units of the mean variance within the classes.
    """

    def __init__(
        self, *, num_classes: int, lda_dims: int, eigenvectors: int, minor_variance: float
    ) -> None:
        dims = min(lda_dims, num_classes - 1, NUM_FEATURES)
        self.features = GradientFeatures()
        self.lda = Projection(NUM_FEATURES, dims)
        self.discriminant = QuadraticDiscriminant(
            num_classes, dims, min(eigenvectors, dims), minor_variance
        )

    def __call__(
        self, images: jax.Array, train: bool = False, dropout_keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:  # fmt: skip
        """Maps images (B, S, S, C), ink 1 and paper 0, to float32 logits (B, K)."""
        return self.discriminant(self.lda(self.features(images)))


def discriminate(params: Any, features: jax.Array) -> jax.Array:
    """Returns the logits (B, K) of an `MQDF` with given parameters for features (B, 512)."""
    num_classes, dims, eigenvectors = params["discriminant"]["vectors"].shape
    lda, discriminant = (
        Projection(NUM_FEATURES, dims),
        QuadraticDiscriminant(num_classes, dims, eigenvectors, 1.0),
    )
    nnx.update(lda, params["lda"])
    nnx.update(discriminant, params["discriminant"])
    return discriminant(lda(features))
