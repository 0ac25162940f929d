"""From a config to everything a training run needs: data, network and functions."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from hccr_jax import config as config_lib
from hccr_jax.config import Steps
from hccr_jax.data.from_config import load, load_training
from hccr_jax.data.splits import Split
from hccr_jax.errors import InputError
from hccr_jax.evaluation.evaluate import read_outputs
from hccr_jax.inference.network import Network, create_network
from hccr_jax.inference.pretrained import NORMAL_FORM, Pretrained, load_pretrained
from hccr_jax.inference.steps import make_logits_step, to_float
from hccr_jax.ops import target
from hccr_jax.runtime import distributed, sharding
from hccr_jax.runtime.checkpoints import check_classes
from hccr_jax.runtime.failpoints import failpoint
from hccr_jax.runtime.rng import AUGMENT, row_keys
from hccr_jax.runtime.startup import Timeline
from hccr_jax.train import optim
from hccr_jax.train.augment import Augment, AugmentOptions, make_augment, make_is_mirrored
from hccr_jax.train.fit_mqdf import fit_mqdf_member
from hccr_jax.train.init_from import describe_start, start_from
from hccr_jax.train.input_pipeline import BATCH_SOURCES, BatchSource, choose_placement
from hccr_jax.train.state import TrainState, create_train_state
from hccr_jax.train.statistics_step import make_statistics_step
from hccr_jax.train.step import StepOptions, make_train_chunk, make_train_step

_ONCE_ROWS = 2048  # augmented at a time


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """Everything a training run needs.

    Attributes:
      config: passed by `config.check`.
      network: with its initial weights.
      train, validation, test: the splits.
      steps: lengths of everything.
      augment: from `augment.make_augment`.
      schedule: learning rate by step.
      train_chunk: from `step.make_train_chunk`.
      batches: the batches of its chunks.
      teacher_variables: further arguments of `train_chunk`: none, or a teacher's
        `Network.variables`.
      statistics_step: from `statistics_step.make_statistics_step`.
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
    train_chunk: Any
    batches: BatchSource
    teacher_variables: tuple[Any, ...]
    statistics_step: Callable[..., Any]
    initial: TrainState


def create_training_setup(
    config: ConfigDict, timeline: Timeline, resumes: bool = False
) -> TrainingSetup:
    """Returns everything a training run needs; data sets are normalised on first use.

    Args:
      config: passed by `config.check`.
      timeline: gets the phases "data" and "network".
      resumes: the state will come from a checkpoint, so `init_from` is not needed.

    Raises:
      InputError: the data or the config's numbers do not fit.
    """
    train = load_training(config)
    splits = config.data.validation_split, config.data.test_split
    validation, test = (load(config, name) for name in splits)
    timeline.lap("data")
    steps = config_lib.resolve(config, len(train.labels))
    failpoint("while the network is made")
    network = create_network(config, len(train.classes))
    if not resumes:
        network = _start(network, config, train)
    train, teacher = _add_teacher(config, train)
    train, augment = _create_augment(config, train)
    optimizer, schedule = create_optimizer(config, steps)
    options = step_options(config, network.mesh.size, teacher, train.teacher_logits is not None)
    train_step = make_train_step(network.apply, optimizer, augment, network.mesh, options)
    batches = _create_batches(config, train, network.mesh)
    initial = _create_initial_state(config, network, optimizer)
    timeline.lap("network")
    return TrainingSetup(
        config=config,
        network=network,
        train=train,
        validation=validation,
        test=test,
        steps=steps,
        augment=augment,
        schedule=schedule,
        train_chunk=make_train_chunk(train_step, batches.get_batch, batches.max_steps),
        batches=batches,
        teacher_variables=(teacher.variables,) if teacher else (),
        statistics_step=make_statistics_step(
            network.apply, augment, network.mesh, strict_shards=options.strict_shards
        ),
        initial=initial,
    )


def step_options(
    config: ConfigDict, num_devices: int, teacher: Network | None = None,
    has_teacher_logits: bool = False,
) -> StepOptions:  # fmt: skip
    """Returns how the training step of a config computes on some devices."""
    is_uniform = None
    if config.loss.mirrored_as_uniform:
        is_uniform = make_is_mirrored(augment_options(config))
    return StepOptions(
        label_smoothing=config.loss.label_smoothing,
        noise_rate=config.loss.noise_rate,
        teacher_weight=config.teacher.weight,
        teacher_temperature=config.teacher.temperature,
        batch_norm_momentum=config.model.batch_norm_momentum,
        batch_norm_ramp=config.model.batch_norm_ramp,
        global_batch_norm=config_lib.batch_norm(config, num_devices) == "global",
        accumulation_steps=config.gradient_accumulation_steps,
        reduce_dtype=jnp.dtype(config.reduce_dtype),
        strict_shards=config_lib.strict_shards(config),
        average_decay=config.optimizer.average_decay,
        teacher=teacher.apply_ensemble if teacher else None,
        has_teacher_logits=has_teacher_logits,
        is_uniform=is_uniform,
    )


def _create_batches(config: ConfigDict, train: Split, mesh: Mesh) -> BatchSource:
    placement = choose_placement(config.data.placement, train, mesh)
    source = BATCH_SOURCES[placement]
    return source(train, mesh, config.seed, config.batch_size, steps_per_execution(config))


def _create_initial_state(
    config: ConfigDict, network: Network, optimizer: optax.GradientTransformation
) -> TrainState:
    averages_params = config.optimizer.average_decay > 0
    state = create_train_state(
        network.params, network.batch_stats, optimizer, averages_params, config.seed
    )
    return jax.device_put(state, sharding.replicated(network.mesh))


def _start(network: Network, config: ConfigDict, train: Split) -> Network:
    """Returns a network with all that it is to have before its first step."""
    if config.init_from:
        pretrained = load_pretrained(config.init_from, config)
        network = start_from(network, train.classes, pretrained)
        print(describe_start(train.classes, pretrained, config))
    return _fit_member(network, train)


def _fit_member(network: Network, train: Split) -> Network:
    """Returns a network whose ensemble member, if it has one, is fitted."""
    if network.member is None:
        return network
    fitted = fit_mqdf_member(network.member.params, train, network.mesh)
    return network.with_member_params(fitted)


def attach_mqdf(pretrained: Pretrained, weight: float) -> Pretrained:
    """Returns a trained network ensembled with MQDF, as if trained with it.

    Args:
      pretrained: a network alone; MQDF is fitted to the data of its config.
      weight: of MQDF.

    Raises:
      InputError: the network is MQDF itself, or the data are missing.
    """
    config = pretrained.config.copy_and_resolve_references()
    config.model.mqdf_weight = weight
    train = load_training(config)
    check_classes(pretrained.classes, train.classes, pretrained.source)
    network = create_network(config, len(train.classes))
    network = start_from(network, pretrained.classes, pretrained)
    print(f"{pretrained.source}: ensembled with MQDF of weight {weight:g}")
    return dataclasses.replace(pretrained, config=config, network=_fit_member(network, train))


def create_optimizer(
    config: ConfigDict, steps: Steps
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimiser of a config, and its learning rate by step."""
    options = config.optimizer
    factor = 1.0
    if options.batch_rule == "sqrt":
        factor = (config.batch_size / options.reference_batch_size) ** 0.5
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
    return optimizer, schedule


def _add_teacher(config: ConfigDict, train: Split) -> tuple[Split, Network | None]:
    """Returns the training split, with teacher logits if they are precomputed; else the teacher."""
    if not config.teacher.checkpoint:
        return train, None
    teacher, teacher_config = _load_teacher(config, train)
    if not config.teacher.precompute:
        return train, teacher
    logits = compute_teacher_logits(teacher, load_training(teacher_config).images)
    return dataclasses.replace(train, teacher_logits=logits), None


def _load_teacher(config: ConfigDict, train: Split) -> tuple[Network, ConfigDict]:
    """Returns the teacher, and the config with the normal form of its own images.

    Raises:
      InputError: it was trained on other classes, or needs other images than each step has.
    """
    teacher = load_pretrained(config.teacher.checkpoint, config)
    check_classes(teacher.classes, train.classes, teacher.source)
    teacher_config = config.copy_and_resolve_references()
    teacher_config.data.update({key: teacher.config.data[key] for key in NORMAL_FORM})
    for key in NORMAL_FORM:
        own = teacher_config.data[key]
        if own != config.data[key] and not config.teacher.precompute:
            raise InputError(
                f"{teacher.source}: a teacher trained with data.{key}={own!r} cannot judge images "
                f"of data.{key}={config.data[key]!r}; with --config.teacher.precompute=True its "
                f"logits are computed from its own"
            )
    return teacher.network, teacher_config


def compute_teacher_logits(teacher: Network, images: np.ndarray) -> np.ndarray:
    """Returns a teacher's logits for images as they are, float16 (N, K)."""
    step = make_logits_step(teacher.apply, teacher.mesh, member=teacher.member)
    size = teacher.eval_batch_size
    outputs = read_outputs(step, teacher.variables, images, size, teacher.mesh)
    batches = tqdm(
        outputs, "teacher logits", math.ceil(len(images) / size), leave=False, unit="batch",
        disable=not distributed.is_primary(),
    )  # fmt: skip
    return np.concatenate([logits.astype(np.float16) for (logits,) in batches])


def augment_options(config: ConfigDict) -> AugmentOptions:
    """Returns the ranges of a config's augmentation."""
    return AugmentOptions(**{key: value for key, value in config.augment.items() if key != "once"})


def _create_augment(config: ConfigDict, train: Split) -> tuple[Split, Augment]:
    """Returns the training split and the augmentation of each step."""
    augment = make_augment(augment_options(config))
    if config.augment.once:
        return augment_once(train, augment, config.seed), lambda keys, images: images
    return train, augment


def augment_once(split: Split, augment: Augment, seed: int) -> Split:
    """Returns a split whose images are augmented, each as row i of training step 0 would be.

    Args:
      split: the augmented images are held in this process's memory, as uint8.
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


def steps_per_execution(config: ConfigDict) -> int:
    """Returns the most steps of a chunk; automatic: enough to hide the host from an accelerator."""
    return config.steps_per_execution or (1 if target.is_cpu() else 50)
