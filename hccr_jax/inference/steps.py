"""Jitted steps of a trained network: evaluation, and the logits of all classes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from hccr_jax.inference.tta import TtaViews
from hccr_jax.models.functional import Apply
from hccr_jax.ops import cross_entropy
from hccr_jax.ops.warp import warp
from hccr_jax.runtime.sharding import DATA_AXIS

Ranking = tuple[jax.Array, jax.Array, jax.Array]


class Variables(NamedTuple):
    """The arrays of a network; a pytree.

    Attributes:
      params: trained parameters.
      batch_stats: batch statistics to evaluate with.
      member: fitted parameters of an ensemble member; None without one.
    """

    params: Any
    batch_stats: Any
    member: Any = None


@dataclasses.dataclass(frozen=True)
class EnsembleMember:
    """A fitted recogniser whose log-probabilities are added to those of a network.

    Attributes:
      apply: the recogniser as a pure function.
      params: its fitted parameters.
      weight: of its log-probabilities; those of the network have weight 1.

    Source: Wang, Li, Liu, Ding and Chen, "An MQDF-CNN hybrid model for offline handwritten Chinese
    character recognition", ICFHR 2014.
    """

    apply: Apply
    params: Any
    weight: float


def to_float(images: jax.Array) -> jax.Array:
    """Returns uint8 images (B, S, S) as float32 in [0, 1], ink 1."""
    return images.astype(jnp.float32) / 255.0


def stage_names(views: TtaViews | None, member: EnsembleMember | None) -> tuple[str, ...]:
    """Returns what an evaluation scores: the network alone on one view, then with each addition."""
    return ("network", *["tta"] * (views is not None), *["ensemble"] * (member is not None))


def make_eval_step(
    apply: Apply,
    mesh: Mesh,
    num_candidates: int = 5,
    views: TtaViews | None = None,
    member: EnsembleMember | None = None,
) -> Callable[[Variables, jax.Array, jax.Array], tuple[Ranking, ...]]:
    """Returns the jitted evaluation step.

    Args:
      apply: the network as a pure function.
      mesh: from `sharding.create_mesh`.
      num_candidates: N best classes to return.
      views: of test-time augmentation (`combine_tta`); None for the image alone.
      member: ensembled with the network, view by view (`combine_ensemble`).

    Returns:
      step(variables, images uint8 (B, S, S), labels (B,)) -> for each of `stage_names` (loss
      float32 (B,), classes int32 (B, N) best first, their probabilities float32 (B, N)), on every
      device.
    """

    def rank(logits: jax.Array, labels: jax.Array) -> Ranking:
        scores, classes = lax.top_k(logits, min(num_candidates, logits.shape[1]))
        probabilities = jnp.exp(scores - jax.nn.logsumexp(logits, axis=1, keepdims=True))
        return cross_entropy.cross_entropy(logits, labels), classes, probabilities

    def local_step(variables, images, labels):
        outputs, member_logits = _outputs(apply, member, views, variables, images)
        stages = _combine(outputs, member_logits, views, member)
        rankings = tuple(rank(logits, labels) for logits in stages)
        return lax.all_gather(rankings, DATA_AXIS, tiled=True)

    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    return jax.jit(
        jax.shard_map(
            local_step, mesh=mesh, in_specs=(whole, rows, rows), out_specs=whole, check_vma=False
        )
    )


def make_logits_step(
    apply: Apply,
    mesh: Mesh,
    views: TtaViews | None = None,
    member: EnsembleMember | None = None,
    with_features: bool = False,
) -> Callable[[Variables, jax.Array], tuple[jax.Array, ...]]:
    """Returns the jitted step that computes the logits of all classes.

    Args:
      apply, mesh, views, member: as for `make_eval_step`.
      with_features: return the features as well; the parameters are those of
        `functional.expose_features`.

    Returns:
      step(variables, images uint8 (B, S, S)) -> (logits float32 (B, K),) or (logits, features
      float32 (B, F)), on every device; with several views the logarithms of the combined
      probabilities, and the mean features.
    """

    def local_step(variables, images):
        outputs, member_logits = _outputs(apply, member, views, variables, images)
        num_features = variables.params["classifier"]["weight"].shape[0] if with_features else 0
        logits, features = jnp.split(outputs, [outputs.shape[-1] - num_features], axis=-1)
        results = [_combine(logits, member_logits, views, member)[-1]]
        if with_features:
            results.append(features.mean(0))
        return tuple(lax.all_gather(result, DATA_AXIS, tiled=True) for result in results)

    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    return jax.jit(
        jax.shard_map(
            local_step, mesh=mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False
        )
    )


def show_views(images: jax.Array, views: TtaViews) -> jax.Array:
    """Returns images (B, S, S), float32, warped into each view, (V, B, S, S)."""
    shape = (len(views.maps), *images.shape)
    maps = jnp.broadcast_to(jnp.asarray(views.maps)[:, None], (*shape[:2], 2, 2))
    seen = jnp.broadcast_to(images[None], shape).reshape(-1, *images.shape[1:])
    maps = maps.reshape(-1, 2, 2)
    return warp(seen, maps, jnp.zeros(maps.shape[:2])).reshape(shape)


def combine_tta(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the logarithm of the mean probabilities of several views of the same images.

    A view counts by its weight times the certainty 1 − H/log K, where H is the entropy of its
    probabilities: a view with uniform probabilities does not count.

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
    weights = weights[:, None, None] * certainty
    return jnp.log((weights * probabilities).sum(0) / weights.sum(0))


def combine_ensemble(logits: jax.Array, member_logits: jax.Array, weight: float) -> jax.Array:
    """Returns the log-probabilities of a network plus `weight` times those of a member.

    Args:
      logits, member_logits: float32 (..., K).
      weight: of the member.
    """
    return jax.nn.log_softmax(logits) + weight * jax.nn.log_softmax(member_logits)


def _outputs(
    apply: Apply,
    member: EnsembleMember | None,
    views: TtaViews | None,
    variables: Variables,
    images: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the outputs of the network and of the member, each (V, B, ·); V is 1 without TTA."""
    seen = to_float(images)[None] if views is None else show_views(to_float(images), views)
    shape, inputs = seen.shape[:2], seen.reshape(-1, *seen.shape[2:], 1)
    outputs, _ = apply(variables.params, variables.batch_stats, inputs)
    member_logits = None
    if member:
        member_logits = member.apply(variables.member, {}, inputs)[0].reshape(*shape, -1)
    return outputs.reshape(*shape, -1), member_logits


def _combine(
    logits: jax.Array,
    member_logits: jax.Array | None,
    views: TtaViews | None,
    member: EnsembleMember | None,
) -> list[jax.Array]:
    """Returns the logits (B, K) of each of `stage_names` from those of all views (V, B, K)."""

    def over_views(logits: jax.Array) -> jax.Array:
        return logits[0] if views is None else combine_tta(logits, jnp.asarray(views.weights))

    stages = [logits[0]]
    if views:
        stages.append(over_views(logits))
    if member and member_logits is not None:
        stages.append(over_views(combine_ensemble(logits, member_logits, member.weight)))
    return stages
