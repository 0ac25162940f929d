"""A config made concrete: its data, network and functions."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax import optim, sharding
from hccr_jax.augment import make_augment
from hccr_jax.config import Steps
from hccr_jax.data.dataset import prepare_strokes
from hccr_jax.data.input_pipeline import FEEDS, Feed, choose_placement
from hccr_jax.data.splits import Split, load_split
from hccr_jax.models.registry import MODELS, Apply, create_model, split_model, summarize
from hccr_jax.startup import Timeline
from hccr_jax.train_state import INIT, TrainState, create_train_state, stream_key
from hccr_jax.train_step import (
    Augment,
    make_eval_step,
    make_statistics_step,
    make_train_call,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Network:
    """What an evaluation needs.

    Attributes:
      mesh: of all devices.
      apply: the network as a pure function.
      eval_step: from `train_step.make_eval_step`.
      params, batch_stats: initial, on every device.
      summary: its layers, as a table.
    """

    mesh: Mesh
    apply: Apply
    eval_step: Callable[..., Any]
    params: Any
    batch_stats: Any
    summary: str


@dataclasses.dataclass(frozen=True)
class Job:
    """What a training run needs.

    Attributes:
      config: passed by `config.check`.
      network: see there.
      train, validation, test: the splits.
      steps: lengths of everything.
      augment: from `augment.make_augment`.
      schedule: learning rate by step.
      train_call, statistics_step: from `train_step`; jitted.
      feed: the batches of its calls.
      initial: the state before the first step.
    """

    config: ConfigDict
    network: Network
    train: Split
    validation: Split
    test: Split
    steps: Steps
    augment: Augment
    schedule: Callable[[Any], Any]
    train_call: Any
    feed: Feed
    statistics_step: Callable[..., Any]
    initial: TrainState


def create_network(config: ConfigDict, num_classes: int) -> Network:
    """Returns the network of a config, freshly initialised."""
    mesh = sharding.create_mesh()
    taken = inspect.signature(MODELS[config.model.name]).parameters
    options = {**config.model, "dtype": compute_dtype(config)}
    options = {key: value for key, value in options.items() if key in taken}
    rngs = nnx.Rngs(stream_key(config.seed, INIT))
    model = create_model(config.model.name, num_classes=num_classes, rngs=rngs, **options)
    apply, *initial = split_model(model)
    params, batch_stats = jax.device_put(initial, sharding.replicated(mesh))
    summary, _ = summarize(model, config.data.image_px)
    return Network(mesh, apply, make_eval_step(apply, mesh), params, batch_stats, summary)


def create_job(config: ConfigDict, timeline: Timeline) -> Job:
    """Returns everything a training run needs; data sets are put into normal form on first use.

    Args:
      config: passed by `config.check`.
      timeline: gets the phases "data" and "network".

    Raises:
      InputError: the data or the config's numbers do not fit.
    """
    data, options = config.data, config.optimizer
    names = (data.train_split, data.validation_split, data.test_split)
    train, validation, test = (load(config, name) for name in names)
    timeline.lap("data")
    steps = config_lib.resolve(config, len(train.labels))
    network = create_network(config, len(train.classes))
    factor = optim.batch_factor(options.batch_rule, config.batch_size, options.reference_batch_size)
    schedule = optim.make_schedule(
        options.schedule,
        options.learning_rate * factor,
        total_steps=steps.total,
        warmup_steps=steps.warmup,
        decay_rate=options.decay_rate,
        decay_steps=steps.decay,
        staircase=options.staircase,
        end_learning_rate=options.end_learning_rate * factor,
    )
    optimizer = optim.make_optimizer(
        options.name, schedule, weight_decay=options.weight_decay, clip_norm=options.clip_norm
    )
    augment = make_augment(**config.augment)
    train_step = make_train_step(
        network.apply,
        optimizer,
        augment,
        network.mesh,
        seed=config.seed,
        label_smoothing=config.loss.label_smoothing,
        batch_norm_momentum=config.model.batch_norm_momentum,
        accumulation_steps=config.gradient_accumulation_steps,
    )
    longest = steps_per_call(config)
    placement = choose_placement(data.placement, train, network.mesh)
    feed = FEEDS[placement](train, network.mesh, config.seed, config.batch_size, longest)
    state = create_train_state(network.params, network.batch_stats, optimizer)
    state = jax.device_put(state, sharding.replicated(network.mesh))
    timeline.lap("network")
    return Job(
        config=config,
        network=network,
        train=train,
        validation=validation,
        test=test,
        steps=steps,
        augment=augment,
        schedule=schedule,
        train_call=make_train_call(train_step, feed.pick, longest),
        feed=feed,
        statistics_step=make_statistics_step(
            network.apply, augment, network.mesh, seed=config.seed
        ),
        initial=state,
    )


def load(config: ConfigDict, split: str) -> Split:
    """Returns a split in normal form, making the embedded data set where it is asked for."""
    data = config.data
    name = data.name
    if name == "strokes":
        name = prepare_strokes(data.data_dir, **data.strokes)
    return load_split(name, data.data_dir, split, data.image_px, data.margin_px, data.aspect)


def compute_dtype(config: ConfigDict) -> Any:
    """Returns the dtype of the arithmetic; "auto" is bfloat16 where the device computes in it."""
    if config.model.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.model.dtype)


def steps_per_call(config: ConfigDict) -> int:
    """Returns the most steps of a call; the automatic choice hides an accelerator's host."""
    return config.steps_per_call or (1 if jax.default_backend() == "cpu" else 50)
