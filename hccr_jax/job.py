"""A config made concrete: its data, network and functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from hccr_jax.models.registry import Apply, create_model, split_model, summarize
from hccr_jax.startup import Timeline
from hccr_jax.train_state import AUGMENT, INIT, TrainState, create_train_state, stream_key
from hccr_jax.train_step import (
    Augment,
    make_eval_step,
    make_statistics_step,
    make_train_call,
    make_train_step,
    row_keys,
    to_float,
)

_ONCE_ROWS = 2048  # augmented at a time


@dataclasses.dataclass(frozen=True)
class Network:
    """What an evaluation needs.

    Attributes:
      mesh: of all devices.
      apply: the network as a pure function.
      eval_step: from `train_step.make_eval_step`.
      params, batch_stats: initial, on every device.
      summary: its layers, as a table.
      multiply_adds: of one image.
    """

    mesh: Mesh
    apply: Apply
    eval_step: Callable[..., Any]
    params: Any
    batch_stats: Any
    summary: str
    multiply_adds: int


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
    options = config.model.to_dict() | {"dtype": compute_dtype(config)}
    for key in ("batch_norm_momentum", "batch_norm_ramp"):  # the training step's
        del options[key]
    rngs = nnx.Rngs(stream_key(config.seed, INIT))
    model = create_model(num_classes=num_classes, rngs=rngs, **options)
    apply, *initial = split_model(model)
    params, batch_stats = jax.device_put(initial, sharding.replicated(mesh))
    summary, multiply_adds = summarize(model, config.data.image_px)
    eval_step = make_eval_step(apply, mesh)
    return Network(mesh, apply, eval_step, params, batch_stats, summary, multiply_adds)


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
    augment: Augment = make_augment(**augment_options(config))
    if config.augment.once:
        train = augment_once(train, augment, config.seed)
        augment = _leave
    train_step = make_train_step(
        network.apply,
        optimizer,
        augment,
        network.mesh,
        seed=config.seed,
        label_smoothing=config.loss.label_smoothing,
        batch_norm_momentum=config.model.batch_norm_momentum,
        batch_norm_ramp=config.model.batch_norm_ramp,
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


def augment_options(config: ConfigDict) -> dict[str, float]:
    """Returns the arguments of `augment.make_augment` that a config asks for."""
    return {key: value for key, value in config.augment.items() if key != "once"}


def augment_once(split: Split, augment: Augment, seed: int) -> Split:
    """Returns a split whose images are augmented, each as row i of training step 0 would be.

    Args:
      split: its augmented images lie in this process's memory, as uint8.
      augment: from `augment.make_augment`.
      seed: of the run.
    """
    count = len(split.labels)
    keys = row_keys(seed, AUGMENT, jnp.int32(0), count)
    run = jax.jit(lambda keys, images: jnp.rint(255.0 * augment(keys, to_float(images))))
    images = np.empty_like(split.images, subok=False)
    for start in range(0, count, _ONCE_ROWS):
        rows = slice(start, start + _ONCE_ROWS)
        images[rows] = run(keys[rows], split.images[rows])
    return dataclasses.replace(split, images=images)


def _leave(keys: jax.Array, images: jax.Array) -> jax.Array:
    return images


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
