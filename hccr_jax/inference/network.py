"""A config's network, placed on the devices."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax.inference.steps import (
    EnsembleMember,
    Ranking,
    Variables,
    combine_ensemble,
    make_eval_step,
)
from hccr_jax.inference.tta import TtaViews, create_tta_views
from hccr_jax.models.costs import summarize
from hccr_jax.models.functional import Apply, count_parameters, split_model
from hccr_jax.models.registry import create_model
from hccr_jax.ops import target
from hccr_jax.runtime import sharding
from hccr_jax.runtime.rng import INIT, stream_key


@dataclasses.dataclass(frozen=True)
class Network:
    """What an evaluation needs.

    Attributes:
      mesh: of all devices.
      apply: the network as a pure function.
      eval_step: from `steps.make_eval_step`.
      params, batch_stats: initial, on every device.
      summary: its layers, as a table.
      multiply_adds: of one view of one image, those of the member included.
      eval_batch_size: images of a batch in an evaluation, fewer the more views each has.
      tta_views: of an image in an evaluation; None for the image alone.
      member: ensembled with the network in an evaluation; None without one.
    """

    mesh: Mesh
    apply: Apply
    eval_step: Callable[..., tuple[Ranking, ...]]
    params: Any
    batch_stats: Any
    summary: str
    multiply_adds: int
    eval_batch_size: int
    tta_views: TtaViews | None = None
    member: EnsembleMember | None = None

    @property
    def variables(self) -> Variables:
        """What the steps of `inference.steps` take."""
        member = self.member.params if self.member else None
        return Variables(self.params, self.batch_stats, member)

    def apply_ensemble(
        self, params: Any, batch_stats: Any, member_params: Any, images: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Returns the logits of the network with its member for images seen in one view.

        Args:
          params, batch_stats, member_params: like `variables`.
          images: float32 (B, S, S, C).

        Returns:
          Like `apply`, (logits (B, K), batch_stats).
        """
        logits, batch_stats = self.apply(params, batch_stats, images)
        if self.member:
            member_logits, _ = self.member.apply(member_params, {}, images)
            logits = combine_ensemble(logits, member_logits, self.member.weight)
        return logits, batch_stats

    @property
    def num_tta_views(self) -> int:
        """Of an image in an evaluation."""
        return len(self.tta_views.maps) if self.tta_views else 1

    @property
    def num_parameters(self) -> int:
        """Trained values, and the fitted ones of the member."""
        return count_parameters(self.params) + count_parameters(self.variables.member)

    def with_member_params(self, params: Any) -> Self:
        """Returns the network with other fitted parameters of its member; None leaves it as is."""
        if self.member is None or params is None:
            return self
        return dataclasses.replace(self, member=dataclasses.replace(self.member, params=params))


def create_module(config: ConfigDict, num_classes: int) -> nnx.Module:
    """Returns the network of a config as a Flax module, freshly initialised.

    Raises:
      InputError: the config does not fit the network.
    """
    return create_model(
        config.model.name,
        num_classes=num_classes,
        image_px=config.data.image_px,
        dtype=compute_dtype(config),
        rngs=nnx.Rngs(stream_key(config.seed, INIT)),
        **config_lib.model_options(config),
    )


def create_network(config: ConfigDict, num_classes: int) -> Network:
    """Returns the network of a config, freshly initialised, its ensemble member not yet fitted."""
    mesh = sharding.create_mesh()
    model = create_module(config, num_classes)
    apply, params, batch_stats = split_model(model)
    summary, multiply_adds = summarize(model, config.data.image_px)
    member, views, options = None, None, config.eval
    if config.model.mqdf_weight > 0.0:
        mqdf = create_model("mqdf", num_classes=num_classes, rngs=nnx.Rngs(0))
        member_apply, fitted, _ = split_model(mqdf)
        fitted = jax.device_put(fitted, sharding.replicated(mesh))
        member = EnsembleMember(member_apply, fitted, config.model.mqdf_weight)
        member_summary, member_cost = summarize(mqdf, config.data.image_px)
        summary = f"{summary}\n\nensembled with\n{member_summary}"
        multiply_adds += member_cost
    if options.tta_views > 1 or options.tta_flips:
        views = create_tta_views(options.tta_views, options.tta_flips, options.upright_prior)
    initial = params, batch_stats
    params, batch_stats = jax.device_put(initial, sharding.replicated(mesh))
    num_tta_views = len(views.maps) if views else 1
    # As many images as devices share, so that views need no more memory.
    images = max(options.batch_size // num_tta_views // mesh.size, 1) * mesh.size
    eval_step = make_eval_step(apply, mesh, views=views, member=member)
    return Network(
        mesh, apply, eval_step, params, batch_stats, summary, multiply_adds, images, views, member
    )


def compute_dtype(config: ConfigDict) -> Any:
    """Returns the dtype of the arithmetic; "auto" is bfloat16 where the device computes in it."""
    if config.model.dtype == "auto":
        return jnp.dtype(jnp.float32 if target.is_cpu() else jnp.bfloat16)
    return jnp.dtype(config.model.dtype)
