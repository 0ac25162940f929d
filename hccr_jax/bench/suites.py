"""The benchmark's rows, over the sizes and the networks that a suite compares."""

import dataclasses
import functools
import gc
import math
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
from ml_collections import ConfigDict

from hccr_jax.bench import roofline, tables
from hccr_jax.bench.data import SyntheticData
from hccr_jax.bench.environment import describe_environment
from hccr_jax.bench.kernels import depthwise_layers, time_kernels
from hccr_jax.bench.rows import Row, reason, spread, time_in_turn
from hccr_jax.bench.timing import Workload
from hccr_jax.bench.workloads import Workloads
from hccr_jax.inference.network import compute_dtype, create_module
from hccr_jax.runtime import sharding
from hccr_jax.train.setup import augment_options

BASELINE_ROWS = ("train_step", "train_step_augmented", "forward", "augment")
GPU_SUITE_SECONDS = 420.0  # a row that has started may take a minute more
SCALING = {"image_px": (64, 96, 112), "width": (0.5, 1.0, 1.4), "num_classes": (100, 3755, 7000)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to time.

    Attributes:
      config: of the network and its training.
      suite: name of the suite, or None.
      rows: names of the rows.
      batch_sizes: images a step, over all devices.
      num_classes: characters.
      seconds: length of a repeat; None for the device's own.
      repeats: of each row.
      baseline: the module of the PyTorch baseline, or None for none.
      modes: of the baseline.
    """

    config: ConfigDict
    suite: str | None
    rows: Sequence[str]
    batch_sizes: Sequence[int]
    num_classes: int
    seconds: float | None
    repeats: int
    baseline: ModuleType | None
    modes: Sequence[str]


def measure(plan: Plan, data: SyntheticData) -> Iterator[Row]:
    """Yields the rows of a plan, ours and the baseline's, as they are measured.

    Args:
      plan: what to time.
      data: for the rows that read data.
    """
    seconds = plan.seconds or (1.0 if jax.default_backend() == "cpu" else 0.3)
    deadline = time.monotonic() + (GPU_SUITE_SECONDS if plan.suite == "gpu" else math.inf)
    _report("the device: a copy and a matrix product")
    dtype = compute_dtype(plan.config)
    speeds = roofline.measure_speeds(sharding.create_mesh(), dtype, seconds)
    common = {"model": plan.config.model.name, "dtype": str(dtype)} | describe_environment()
    common["copy_gigabytes_per_second"] = round(speeds.bandwidth / 1e9, 1)
    common["product_teraflops"] = round(speeds.operations / 1e12, 3)
    if plan.baseline:
        common["versions"]["torch"] = plan.baseline.torch.__version__
    points = _points(plan)
    if plan.suite == "kernels":
        yield from _measure_kernels(plan, points[0], common, seconds)
        return
    for point in points:
        config = plan.config.copy_and_resolve_references()
        config.data.image_px, config.model.width = point["image_px"], point["width"]
        config.batch_size = point["batch_size"]
        workloads = Workloads(
            config, point["batch_size"], point["num_classes"], speeds, data, seconds, plan.repeats
        )
        about = {key: point[key] for key in tables.VARIED}
        more = {"about": about | {"parameters": workloads.parameters} | common}
        if "varied" in point:
            more["varied"] = point["varied"]
        # `prepare` has no batches: once is enough.
        names = [name for name in plan.rows if name != "prepare" or point is points[0]]
        for row in _measure_point(plan, config, workloads, names, about, seconds, deadline):
            yield row | more


def _measure_point(
    plan: Plan, config: ConfigDict, workloads: Workloads, names: Sequence[str],
    about: dict[str, Any], seconds: float, deadline: float,
) -> Iterator[Row]:  # fmt: skip
    """Yields the rows of one setting."""
    baseline = None
    for name in names:
        _report(", ".join([name, *(f"{key} {value}" for key, value in about.items())]))
        makers = {name: getattr(workloads, name)}
        if plan.baseline and name in BASELINE_ROWS:
            baseline = baseline or _create_baseline(plan.baseline, config, workloads)
            for mode in plan.modes or plan.baseline.MODES:
                make = functools.partial(
                    _baseline_workload, baseline, name, mode, workloads.batch_size
                )
                makers[f"{name}/torch_{mode}"] = make
        yield from time_in_turn(
            makers,
            batch_size=workloads.batch_size,
            seconds=seconds,
            repeats=plan.repeats,
            deadline=deadline,
        )
        gc.collect()  # whatever still holds memory of the device
        if baseline:
            baseline.release_memory()


def _measure_kernels(plan: Plan, point: Row, common: Row, seconds: float) -> Iterator[Row]:
    """Yields a row for each implementation of each kind of depthwise layer."""
    size, model = point["batch_size"], create_module(plan.config, num_classes=2)
    dtype = compute_dtype(plan.config)
    layers = depthwise_layers(model, point["image_px"])
    _report(f"{len(layers)} kinds of depthwise layers: compiling all implementations")
    for layer, implementation, rates in time_kernels(layers, dtype, size, seconds, plan.repeats):
        _report("depthwise {}×{}×{}, stride {}".format(*layer) + f", {implementation}")
        about = {"layer": layer, "device_kind": jax.devices()[0].device_kind, "batch_size": size}
        figures = {"error": reason(rates)} if isinstance(rates, Exception) else spread(rates)
        yield {"row": f"depthwise/{implementation}", **figures, "about": about | common}


def _create_baseline(module: ModuleType, config: ConfigDict, workloads: Workloads) -> Any:
    """Returns the PyTorch baseline of the same network, images and augmentation."""
    baseline = module.Baseline(
        config.model.name,
        workloads.num_classes,
        config.model.width,
        config.model.dropout_rate,
        workloads.batch_size,
        config.data.image_px,
        2 * workloads.batch_size,
        augment_options(config),
    )
    if baseline.parameters != workloads.parameters:
        raise ValueError(f"{workloads.parameters} parameters, in PyTorch {baseline.parameters}")
    return baseline


def _baseline_workload(baseline: Any, name: str, mode: str, batch_size: int) -> Workload:
    """Returns a mode of the baseline, its compilation done."""
    start = time.perf_counter()
    run = baseline.make_run(name, mode)
    run(1)
    seconds = None if mode == "eager" else time.perf_counter() - start
    return Workload(run, batch_size, seconds, baseline.memory_mib())


def _points(plan: Plan) -> list[Row]:
    """Returns the settings to measure, each with the key that is varied, if any."""
    base = {
        "image_px": plan.config.data.image_px,
        "width": plan.config.model.width,
        "num_classes": plan.num_classes,
    }
    points = [base | {"batch_size": size} for size in plan.batch_sizes]
    if plan.suite != "scaling":
        return points
    middle = points[len(points) // 2]
    return [
        middle | {key: choice, "varied": key}
        for key, choices in {"batch_size": plan.batch_sizes, **SCALING}.items()
        for choice in choices
    ]


def _report(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)
