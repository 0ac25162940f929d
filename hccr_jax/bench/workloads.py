"""The workloads of the benchmark: each part of training, on random images or synthetic data."""

import contextlib
import dataclasses
import functools
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hccr_jax.bench import roofline
from hccr_jax.bench.data import NAME, SyntheticData
from hccr_jax.bench.timing import Run, Workload, measure, repeated
from hccr_jax.config import batch_norm
from hccr_jax.data.splits import Split
from hccr_jax.evaluation.evaluate import evaluate
from hccr_jax.inference.network import compute_dtype, create_module, create_network
from hccr_jax.inference.steps import to_float
from hccr_jax.models.functional import count_parameters
from hccr_jax.runtime import run_log, sharding
from hccr_jax.runtime.checkpoints import Checkpoints
from hccr_jax.runtime.rng import AUGMENT, row_keys
from hccr_jax.runtime.startup import Timeline
from hccr_jax.train import optim
from hccr_jax.train.augment import make_augment
from hccr_jax.train.input_pipeline import BatchSource, Chunk, DeviceBatches, stream_batches
from hccr_jax.train.loop import train
from hccr_jax.train.setup import augment_options, create_training_setup, steps_per_execution
from hccr_jax.train.state import create_train_state
from hccr_jax.train.step import StepOptions, make_train_chunk, make_train_step

EVALUATED_BATCHES = 8
_ENDLESS = 2**31 - 1


class Workloads:
    """The workloads of one config at one batch size; `ROWS` names the methods that make them."""

    def __init__(
        self, config: ConfigDict, batch_size: int, num_classes: int, speeds: roofline.Speeds,
        data: SyntheticData, seconds: float, repeats: int,
    ) -> None:  # fmt: skip
        """Creates the network.

        Args:
          config: its network, image size and augmentation are timed, at its batch size.
          batch_size: B, over all devices.
          num_classes: K.
          speeds: of the devices.
          data: for the rows that read data.
          seconds, repeats: how long a repeat lasts and how many there are, in the training loop.
        """
        self._seconds, self._repeats = seconds, repeats
        self.config, self.batch_size, self.num_classes = config, batch_size, num_classes
        self.data, self._speeds = data, speeds
        self._network = create_network(config, num_classes)
        self.parameters = count_parameters(self._network.params)
        self.dtype = compute_dtype(config)
        self._layers = roofline.count_layers(
            create_module(config, num_classes), config.data.image_px
        )
        self._augment = make_augment(augment_options(config))
        self._compiled_steps: dict[bool, tuple[Any, float]] = {}  # by whether they augment

    def train_step(self) -> Workload:
        """The training step with Adam, without augmentation, on images in the devices' memory."""
        return self._train_step(augments=False)

    def train_step_augmented(self) -> Workload:
        """The same with the config's augmentation."""
        return self._train_step(augments=True)

    def forward(self) -> Workload:
        """Images on the device to losses and the five best classes with their probabilities."""
        compiled, seconds = self._eval_step
        mesh = self._network.mesh
        images = np.random.default_rng(0).integers(0, 256, self._image_shape, np.uint8)
        batch = sharding.shard_batch((images, np.zeros(self.batch_size, np.int32)), mesh)
        arguments = self._network.variables, *batch
        return Workload(
            repeated(lambda: compiled(*arguments), jax.block_until_ready),
            self.batch_size,
            seconds,
            _memory_mib(compiled),
            self._forward_rate,
        )

    def train_loop(self) -> Workload:
        """The whole of `loop.train`: data, augmentation, steps and logging, by its own log.

        Before each interval the augmented step alone is timed for comparison.
        """
        config, seconds = self.config.copy_and_resolve_references(), self._seconds
        rates = self._training_rates
        max_steps = steps_per_execution(config)
        # At the roofline's speed this many steps last one repeat.
        calls = max(1, math.ceil(seconds * rates["fused"] / self.batch_size / max_steps))
        every = calls * max_steps
        alone = self.train_step_augmented()
        assert alone.run
        alone.run(1)
        total = every * (self._repeats + 1)
        config.update({"num_steps": total, "num_epochs": 0.0, "batch_size": self.batch_size})
        config.update({"log_every_steps": every, "checkpoint": {"every_steps": total}})
        config.update({"eval": {"every_steps": total, "batch_norm_batches": 0}})
        config.update({"data": {"name": NAME, "data_dir": str(self.data.prepared)}})
        with tempfile.TemporaryDirectory(dir=self.data.folder) as name:
            workdir, timeline = Path(name), Timeline()
            with Checkpoints(workdir / "checkpoints") as checkpoints:
                setup = _quiet(create_training_setup)(config, timeline)
                fields = {
                    f.name: getattr(setup.batches, f.name) for f in dataclasses.fields(BatchSource)
                }
                batches = _BatchesAndSteps(
                    **fields, source=setup.batches, run=alone.run, calls_each=calls
                )
                setup = dataclasses.replace(setup, batches=batches)
                _quiet(train)(setup, workdir, checkpoints, timeline)
            logged = run_log.read_metrics(workdir / "metrics.jsonl").values()
        images = every * self.batch_size
        pairs = [  # seconds of an interval, and of the steps alone in it
            (images / row["images_per_second"], in_steps)
            for row, in_steps in zip(logged, batches.seconds, strict=True)
        ][1:]  # the first interval has the first call
        return Workload(
            None,
            0,
            roofline=rates["fused"],
            levels=rates,
            rates=[images / (whole - in_steps) for whole, in_steps in pairs],
            of_step=[in_steps / (whole - in_steps) for whole, in_steps in pairs],
        )

    def evaluation(self) -> Workload:
        """An exact pass over some batches of a split on disk."""
        compiled, seconds = self._eval_step
        split = self._split
        network = dataclasses.replace(
            self._network, eval_step=compiled, eval_batch_size=self.batch_size
        )
        count = min(len(split.labels), EVALUATED_BATCHES * self.batch_size)
        images: Any = split.images[:count]
        part = dataclasses.replace(split, images=images, labels=split.labels[:count])
        return Workload(
            repeated(_quiet(lambda: evaluate(network, part))),
            count,
            seconds,
            _memory_mib(compiled),
            self._forward_rate,
        )

    def augment(self) -> Workload:
        """The config's augmentation alone, uint8 to float32."""
        mesh, size = self._network.mesh, self.config.data.image_px

        def augment(images: jax.Array, step: jax.Array) -> jax.Array:
            keys = row_keys(self.config.seed, AUGMENT, step, self.batch_size)
            return self._augment(keys, to_float(images))

        split = sharding.batch_sharding(mesh)
        jitted = jax.jit(augment, in_shardings=(split, None), out_shardings=split)
        abstract = jax.ShapeDtypeStruct(self._image_shape, jnp.uint8)
        compiled, seconds = _compile(jitted, abstract, np.int32(0))
        images = np.random.default_rng(0).integers(0, 256, self._image_shape, np.uint8)
        arguments = sharding.shard_batch(images, mesh), np.int32(0)
        return Workload(
            repeated(lambda: compiled(*arguments), jax.block_until_ready),
            self.batch_size,
            seconds,
            _memory_mib(compiled),
            self._speeds.bandwidth / (size * size * (1 + 4)),  # read as uint8, written as float32
        )

    def data_reading(self) -> Workload:
        """Batches of the training split, shuffled, from its memory-mapped array to fresh memory."""
        batches = stream_batches(
            self._split, seed=0, batch_size=self.batch_size, first_step=0, last_step=_ENDLESS
        )
        image_bytes = self.config.data.image_px**2
        source, target = np.ones((2, 2**26), np.uint8)
        copy = {"copy": repeated(lambda: np.copyto(target, source))}
        copies = max(measure(copy, 0.1, 3)["copy"])
        return Workload(
            repeated(lambda: next(batches)),
            self.batch_size,
            roofline=copies * source.size / image_bytes,  # one core copying
        )

    def prepare(self) -> Workload:
        """The command that makes a data set from archives, from start to end."""
        data = self.data
        assert data.archives.is_dir()  # written now, not timed
        return Workload(repeated(data.prepare), data.num_images, in_steps=False)

    def _train_step(self, augments: bool) -> Workload:
        network, mesh = self._network, self._network.mesh
        schedule = optim.make_schedule("constant", 1e-3, total_steps=1)
        optimizer = optim.make_optimizer("adam", schedule)
        augment = self._augment if augments else lambda keys, images: images
        options = StepOptions(global_batch_norm=batch_norm(self.config, mesh.size) == "global")
        step = make_train_step(network.apply, optimizer, augment, mesh, options)
        max_steps = steps_per_execution(self.config)
        train_chunk = make_train_chunk(step, DeviceBatches.get_batch, max_steps)
        num_images = 2 * self.batch_size
        whole, columns = sharding.replicated(mesh), sharding.batch_sharding(mesh, axis=1)
        shape = (num_images, *self._image_shape[1:])
        abstract = (
            jax.ShapeDtypeStruct((max_steps, self.batch_size), jnp.int32, sharding=columns),
            jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=whole),
            jax.ShapeDtypeStruct((num_images,), jnp.int32, sharding=whole),
        )
        # A copy, because each step gives up the state before it.
        state = jax.jit(
            lambda params, batch_stats: create_train_state(params, batch_stats, optimizer),
            out_shardings=whole,
        )(network.params, network.batch_stats)
        if augments not in self._compiled_steps:  # which on a GPU takes a minute
            program = _compile(train_chunk, state, np.int32(max_steps), abstract)
            self._compiled_steps[augments] = program
        compiled, seconds = self._compiled_steps[augments]
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, shape, np.uint8)
        labels = rng.integers(0, self.num_classes, num_images, np.int32)
        rows = rng.integers(0, num_images, (max_steps, self.batch_size), np.int32)
        arrays = (
            sharding.shard_batch(rows, mesh, axis=1),
            *sharding.replicate((images, labels), mesh),
        )

        def run(count: int) -> None:
            nonlocal state
            for _ in range(count):
                state, metrics = compiled(state, np.int32(max_steps), arrays)
            jax.block_until_ready((state, metrics))

        rates = self._training_rates
        return Workload(
            run, max_steps * self.batch_size, seconds, _memory_mib(compiled), rates["fused"], rates
        )

    @property
    def _training_rates(self) -> dict[str, float]:
        return {
            level: roofline.training_rate(
                self._layers, self._speeds, self.batch_size, self.dtype.itemsize, level
            )
            for level in roofline.TRAFFIC
        }

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return (self.batch_size, self.config.data.image_px, self.config.data.image_px)

    @property
    def _forward_rate(self) -> float:
        return roofline.forward_rate(
            self._layers, self._speeds, self.batch_size, self.dtype.itemsize
        )

    @functools.cached_property
    def _eval_step(self) -> tuple[Any, float]:
        network, rows = self._network, sharding.batch_sharding(self._network.mesh)
        batch = (
            jax.ShapeDtypeStruct(self._image_shape, jnp.uint8, sharding=rows),
            jax.ShapeDtypeStruct((self.batch_size,), jnp.int32, sharding=rows),
        )
        return _compile(network.eval_step, network.variables, *batch)

    @functools.cached_property
    def _split(self) -> Split:
        return self.data.load(self.config.data.image_px, self.config.data.margin_px)


@dataclasses.dataclass(frozen=True)
class _BatchesAndSteps(BatchSource):
    """Another source's batches; before each log interval training steps alone are timed."""

    name = "benchmark"
    source: BatchSource
    run: Run
    calls_each: int
    seconds: list[float] = dataclasses.field(default_factory=list)

    def chunks(self, first_step: int, lengths: list[int]) -> Iterator[Chunk]:
        for number, chunk in enumerate(self.source.chunks(first_step, lengths)):
            if number % self.calls_each == 0:  # the devices are idle: the loop has just logged
                start = time.perf_counter()
                self.run(self.calls_each)
                self.seconds.append(time.perf_counter() - start)
            yield chunk


# The rows of the benchmark. First those without a baseline: once PyTorch has started, its
# threads and its share of the memory stay.
ROWS = (
    "train_loop", "evaluation", "data_reading", "prepare", "train_step", "train_step_augmented",
    "forward", "augment",
)  # fmt: skip


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function with its output suppressed."""

    def quietly(*arguments: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return function(*arguments)

    return quietly


def _compile(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Returns the compiled program and the seconds it took.

    Raises:
      MemoryError: the device has less memory than the program needs.
    """
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    if _memory_mib(compiled) > _device_memory_mib():
        raise MemoryError(f"{_memory_mib(compiled):,.0f} MiB needed")
    return compiled, seconds


def _memory_mib(compiled: Any) -> float:
    # Not the device's own peak: that never falls, so it would show the largest row so far.
    memory = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (whole - memory.alias_size_in_bytes) / 2**20


def _device_memory_mib() -> float:
    """Returns the memory of a device that JAX may use; of a CPU's, what is free now."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    meminfo = Path("/proc/meminfo")
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] / 2**20
    if jax.default_backend() != "cpu" or not meminfo.exists():
        return math.inf
    sizes = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return float(sizes["MemAvailable"].split()[0]) / 2**10
