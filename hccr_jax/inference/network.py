"""A config's network, placed on the devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax.inference.steps import make_eval_step
from hccr_jax.inference.tta import TtaViews, create_tta_views
from hccr_jax.models.costs import summarize
from hccr_jax.models.functional import Apply, count_parameters, ensemble_with_mqdf, split_model
from hccr_jax.models.registry import create_model
from hccr_jax.runtime import sharding
from hccr_jax.runtime.rng import INIT, stream_key


@dataclasses.dataclass(frozen=True)
class Network:
    """What an evaluation needs.

    Attributes:
      mesh: of all devices.
      apply: the network as a pure function.
      eval_step: from `train_step.make_eval_step`.
      params, batch_stats: initial, on every device; see `functional.ensemble_with_mqdf`.
      summary: its layers, as a table.
      multiply_adds: of one view of one image.
      eval_batch_size: images of a batch in an evaluation, fewer the more views each has.
      views: of an image in an evaluation; None for the image alone.
    """

    mesh: Mesh
    apply: Apply
    eval_step: Callable[..., Any]
    params: Any
    batch_stats: Any
    summary: str
    multiply_adds: int
    eval_batch_size: int
    views: TtaViews | None = None

    @property
    def num_tta_views(self) -> int:
        """Of an image in an evaluation."""
        return len(self.views.maps) if self.views else 1

    @property
    def num_parameters(self) -> int:
        """Trained values, and those of the classical recogniser beside the network."""
        return count_parameters(self.params) + count_parameters(self.batch_stats.get("mqdf"))


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
    """Returns the network of a config, freshly initialised."""
    mesh = sharding.create_mesh()
    model = create_module(config, num_classes)
    apply, params, batch_stats = split_model(model)
    summary, multiply_adds = summarize(model, config.data.image_px)
    if config.model.mqdf_weight > 0.0:
        weight = config.model.mqdf_weight
        apply, batch_stats, mqdf = ensemble_with_mqdf(apply, batch_stats, weight, num_classes)
        beside, more = summarize(mqdf, config.data.image_px)
        summary, multiply_adds = f"{summary}\n\nbeside it\n{beside}", multiply_adds + more
    initial = params, batch_stats
    params, batch_stats = jax.device_put(initial, sharding.replicated(mesh))
    views = None
    if config.eval.tta_views > 1 or config.eval.tta_flips:
        options = config.eval
        views = create_tta_views(options.tta_views, options.tta_flips, options.upright_prior)
    eval_step = make_eval_step(apply, mesh, views=views)
    num_tta_views = len(views.maps) if views else 1
    # As many images as devices share, so that views need no more memory.
    images = max(config.eval.batch_size // num_tta_views // mesh.size, 1) * mesh.size
    return Network(
        mesh, apply, eval_step, params, batch_stats, summary, multiply_adds, images, views
    )


def compute_dtype(config: ConfigDict) -> Any:
    """Returns the dtype of the arithmetic; "auto" is bfloat16 where the device computes in it."""
    if config.model.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.model.dtype)
