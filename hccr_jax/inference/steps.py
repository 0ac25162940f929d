"""Pure, compiled steps of a trained network: evaluation and logits."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from hccr_jax.inference.tta import TtaViews
from hccr_jax.models.functional import Apply
from hccr_jax.ops import cross_entropy
from hccr_jax.ops.warp import warp
from hccr_jax.runtime.sharding import DATA_AXIS


def to_float(images: jax.Array) -> jax.Array:
    """Returns uint8 images (B, S, S) as float32 in [0, 1], ink 1."""
    return images.astype(jnp.float32) / 255.0


def make_eval_step(
    apply: Apply, mesh: Mesh, num_candidates: int = 5, views: TtaViews | None = None
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the jitted evaluation step.

    Args:
      apply: the network.
      mesh: from `sharding.create_mesh`.
      num_candidates: N best classes to return.
      views: from `augment.create_tta_views`; the network sees each image in all of them, and the mean
        of its probabilities counts, each view weighted by its own weight and by how sure the
        network is of it (`combine_tta`). None for the image alone.

    Returns:
      step(params, batch_stats, images uint8 (B, S, S), labels (B,)) -> (loss float32 (B,), classes
      int32 (B, N) best first, their probabilities float32 (B, N)), on every device.
    """

    def local_step(params, batch_stats, images, labels):
        logits = _combined(_outputs(apply, views, params, batch_stats, images), views)
        scores, classes = lax.top_k(logits, min(num_candidates, logits.shape[1]))
        probabilities = jnp.exp(scores - jax.nn.logsumexp(logits, axis=1, keepdims=True))
        results = cross_entropy.cross_entropy(logits, labels), classes, probabilities
        return lax.all_gather(results, DATA_AXIS, tiled=True)

    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    return jax.jit(
        jax.shard_map(
            local_step, mesh=mesh, in_specs=(whole, whole, rows, rows),
            out_specs=(whole, whole, whole), check_vma=False,
        )
    )  # fmt: skip


def make_logits_step(
    apply: Apply, mesh: Mesh, views: TtaViews | None = None, with_features: bool = False
) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, ...]]:
    """Returns the jitted step that gives the scores of all classes.

    Args:
      apply, mesh, views: as for `make_eval_step`.
      with_features: give the features as well; the parameters are those of
        `functional.expose_features`.

    Returns:
      step(params, batch_stats, images uint8 (B, S, S)) -> (logits float32 (B, K),) or (logits,
      features float32 (B, F)), on every device; of several views the logarithms of the combined
      probabilities, and the mean features.
    """

    def local_step(params, batch_stats, images):
        outputs = _outputs(apply, views, params, batch_stats, images)
        num_features = params["classifier"]["weight"].shape[0] if with_features else 0
        num_classes = outputs.shape[-1] - num_features
        results = [_combined(outputs[..., :num_classes], views)]
        if with_features:
            features = outputs[..., num_classes:]
            results.append(features if views is None else features.mean(0))
        return tuple(lax.all_gather(result, DATA_AXIS, tiled=True) for result in results)

    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    return jax.jit(
        jax.shard_map(
            local_step, mesh=mesh, in_specs=(whole, whole, rows), out_specs=whole, check_vma=False
        )
    )


def _outputs(
    apply: Apply, views: TtaViews | None, params: Any, batch_stats: Any, images: jax.Array
) -> jax.Array:
    """Returns what the network gives, (B, K), or (V, B, K) of several views."""
    seen = to_float(images)
    if views is None:
        return apply(params, batch_stats, seen[..., None])[0]
    maps = jnp.repeat(jnp.asarray(views.maps), len(images), axis=0)
    seen = warp(jnp.tile(seen, (len(views.maps), 1, 1)), maps, jnp.zeros(maps.shape[:2]))
    outputs, _ = apply(params, batch_stats, seen[..., None])
    return outputs.reshape(len(views.maps), len(images), -1)


def _combined(logits: jax.Array, views: TtaViews | None) -> jax.Array:
    return logits if views is None else combine_tta(logits, jnp.asarray(views.weights))


def combine_tta(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the logarithm of the mean probabilities of several views of the same images.

    A view counts by its weight times the certainty 1 − H/log K, where H is the entropy of its
    probabilities: a view that tells nothing takes no part.

    Args:
      logits: float32 (V, B, K).
      weights: float32 (V,).

    Returns:
      float32 (B, K); each row is a distribution.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(log_probabilities)
    entropy = -(probabilities * log_probabilities).sum(-1, keepdims=True)
    certainty = jnp.maximum(1.0 - entropy / math.log(logits.shape[-1]), 1e-6)
    shares = weights[:, None, None] * certainty
    return jnp.log((shares * probabilities).sum(0) / shares.sum(0))
