"""Measures the speed of training, evaluation and data reading: one JSON line a row.

Examples:

  hccr benchmark --config=configs/v2.py --batch_size=128
  hccr benchmark --config=configs/v2.py --rows=train_step,forward --baseline=torch
  hccr benchmark --config=configs/v2.py --suite=gpu --output=gpu.json
  hccr benchmark --config=configs/v2.py --suite=scaling --output=scaling.json
  hccr benchmark --config=configs/v2.py --suite=kernels --output=kernels.json
  hccr benchmark --render=gpu.json,scaling.json

Rows: train_loop, evaluation, data_reading, prepare, train_step, train_step_augmented, forward,
augment. A workload that does not fit into the device's memory gets a row with an error.

With --baseline=torch (pip install 'hccr_jax[baseline]') PyTorch does the same work in turn with
ours, in one process, so that a drift of the machine's speed affects both: eager, under
torch.compile, and on a GPU in one CUDA graph (--modes). The fastest of these is the row's
"baseline"; "ratio" is how much faster ours is, the median over pairs.

--suite=cpu and --suite=gpu are all rows and the baseline at batch 128, and at 256, 1,024 and 4,096;
--suite=scaling varies batch size, image size, width and classes of the training step;
--suite=kernels times every implementation of each kind of depthwise layer, and the library chooses
by such results in hccr_jax/ops/measured/. A suite ends with a table on stderr. --render prints such
tables as Markdown from the files of --output, and draws scaling.png next to the first.

The roofline is the limit that the memory bandwidth and the matrix units of this device, measured in
the same run, set to a step whose batch norm and ReLU6 are fused into their neighbours
(`hccr_jax/bench/roofline.py`).

Programs are compiled in every run, and the seconds are reported, unless JAX_COMPILATION_CACHE_DIR
names a folder to keep them in.
"""

import functools
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from hccr_jax.bench import roofline, tables
from hccr_jax.bench.data import SyntheticData
from hccr_jax.bench.environment import describe_environment
from hccr_jax.bench.kernels import depthwise_layers, time_kernels
from hccr_jax.bench.rows import Row, reason, spread, time_in_turn
from hccr_jax.bench.timing import Workload
from hccr_jax.bench.workloads import ROWS, Workloads
from hccr_jax.cli import command
from hccr_jax.data.casia import charset
from hccr_jax.errors import InputError
from hccr_jax.inference.network import compute_dtype, create_module
from hccr_jax.runtime import sharding
from hccr_jax.runtime.startup import prepare_process
from hccr_jax.runtime.workdir import replace_text
from hccr_jax.train.setup import augment_options

BASELINE_ROWS = ("train_step", "train_step_augmented", "forward", "augment")
SUITES = ("gpu", "cpu", "scaling", "kernels")
RENAMED = {"--peer": "--baseline", "--rungs": "--modes", "--suite=forms": "--suite=kernels"}
GPU_SUITE_SECONDS = 420.0  # a row that has started may take a minute more
SCALING = {"image_px": (64, 96, 112), "width": (0.5, 1.0, 1.4), "num_classes": (100, 3755, 7000)}


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code: 0 done, 2 wrong request."""
    render = [argument.partition("=")[2] for argument in argv if argument.startswith("--render=")]
    own = _define_flags()
    argv = [_upgrade(argument) for argument in argv]
    try:
        if render:
            print(_render([Path(path) for path in render[0].split(",")]))
            return 0
        command.parse(own, argv)
        if own.help:
            print(f"{__doc__}\nFlags:{own.get_help()}")
            return 0
        _run(own)
    except InputError as error:
        return command.report_error(error)
    return 0


def _define_flags() -> flags.FlagValues:
    own = command.define_config_flags()
    flags.DEFINE_list(
        "batch_size", None, "Images a step, one or several, such as 256,1024; the config's or the "
        "suite's where not given.", flag_values=own,
    )  # fmt: skip
    flags.DEFINE_integer(
        "num_classes", None, "Characters; the config's data.synthetic.num_characters where not "
        "given.", lower_bound=2, flag_values=own,
    )  # fmt: skip
    flags.DEFINE_list("rows", None, "What to time; all rows where not given.", flag_values=own)
    flags.DEFINE_float(
        "seconds", None, "A repeat lasts; 1 on a CPU and 0.3 on accelerators where not given.",
        lower_bound=0.0, flag_values=own,
    )  # fmt: skip
    flags.DEFINE_integer("repeats", 5, "Repeats of each row.", lower_bound=1, flag_values=own)
    flags.DEFINE_enum("baseline", None, ["torch"], "Time this as well.", flag_values=own)
    flags.DEFINE_list("modes", None, "eager, compile, graph; all where not given.", flag_values=own)
    flags.DEFINE_enum(
        "suite", None, SUITES, "Rows, sizes and baseline of a report.", flag_values=own
    )
    flags.DEFINE_integer(
        "num_images", None, "Characters of the synthetic data set for the rows that read data; "
        "20,000 or two batches where not given.", lower_bound=1, flag_values=own,
    )  # fmt: skip
    flags.DEFINE_string("output", None, "Write all rows to this JSON file.", flag_values=own)
    flags.DEFINE_string("render", None, "Files to print as tables.", flag_values=own)
    return own


def _upgrade(argument: str) -> str:
    """Returns an argument with the flag's name of today, and warns of a name of version 0.1."""
    for old, new in RENAMED.items():
        if argument == old or argument.startswith(f"{old}="):
            print(f"warning: {old} is now {new}", file=sys.stderr)
            return new + argument.removeprefix(old)
    return argument


def _run(values: flags.FlagValues) -> None:
    """Checks the request, then prints each row as it comes."""
    scaling, output = values.suite == "scaling", values.output and Path(values.output)
    names = values.rows or (["train_step"] if scaling else ROWS)
    _check_choice("rows", names, BASELINE_ROWS if scaling else ROWS)
    if set(names) - set(BASELINE_ROWS) and _num_classes(values) > len(charset.level1()):
        raise InputError(
            f"--num_classes={values.num_classes}: the rows that read data have at most "
            f"{len(charset.level1())}; choose others with --rows"
        )
    if output and not output.absolute().parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}")
    torch_baseline = (
        _import_baseline() if values.baseline or values.suite in ("gpu", "cpu") else None
    )
    if torch_baseline:
        _check_choice("modes", values.modes or (), torch_baseline.MODES)
        if not values.config.model.name.startswith("mobilenet"):
            raise InputError(
                f"--baseline=torch: there is no {values.config.model.name} to compare with"
            )
        # Or JAX would take most of a GPU's memory for itself as it starts.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    prepare_process()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # compile_seconds is of a first compilation
        jax.config.update("jax_enable_compilation_cache", False)
    if torch_baseline and jax.device_count() > 1 and jax.default_backend() != "cpu":
        raise InputError("--baseline=torch compares on one device: let JAX see one only")
    sizes = _batch_sizes(values)
    rows = []
    with tempfile.TemporaryDirectory(prefix="hccr_benchmark_") as folder:
        num_images = values.num_images or max(20_000, 2 * max(sizes))
        data = SyntheticData(Path(folder), _num_classes(values), num_images)
        for row in _measure(values, _points(values, sizes), names, data, torch_baseline):
            print(json.dumps(row, ensure_ascii=False), flush=True)
            rows.append(row)
            if output:
                content = {"suite": values.suite, "rows": rows}
                replace_text(output, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    if values.suite:
        print(tables.to_markdown(rows), file=sys.stderr)


def _measure(
    values: flags.FlagValues, points: Sequence[Row], names: Sequence[str], data: SyntheticData,
    torch_baseline: Any,
) -> Iterator[Row]:  # fmt: skip
    """Yields the rows of each setting, ours and the baseline's."""
    seconds = values.seconds or (1.0 if jax.default_backend() == "cpu" else 0.3)
    deadline = time.monotonic() + (GPU_SUITE_SECONDS if values.suite == "gpu" else math.inf)
    _say("the device: a copy and a matrix product")
    dtype = compute_dtype(values.config)
    speeds = roofline.measure_speeds(sharding.create_mesh(), dtype, seconds)
    common = {"model": values.config.model.name, "dtype": str(dtype)} | describe_environment()
    common["copy_gigabytes_per_second"] = round(speeds.bandwidth / 1e9, 1)
    common["product_teraflops"] = round(speeds.operations / 1e12, 3)
    if torch_baseline:
        common["versions"]["torch"] = torch_baseline.torch.__version__
    if values.suite == "kernels":
        yield from _time_kernels(values, points[0], common, seconds)
        return
    for point in points:
        config, batch_size = values.config.copy_and_resolve_references(), point["batch_size"]
        config.data.image_px, config.model.width = point["image_px"], point["width"]
        workloads = Workloads(
            config, batch_size, point["num_classes"], speeds, data, seconds, values.repeats
        )
        about = {key: point[key] for key in tables.VARIED}
        more = {"about": about | {"parameters": workloads.parameters} | common}
        if "varied" in point:
            more["varied"] = point["varied"]
        baseline = None
        for name in names:
            if name == "prepare" and point is not points[0]:
                continue  # it has no batches: once is enough
            _say(", ".join([name, *(f"{key} {value}" for key, value in about.items())]))
            makers = {name: getattr(workloads, name)}
            if torch_baseline and name in BASELINE_ROWS:
                baseline = baseline or _create_baseline(torch_baseline, config, workloads)
                for mode in values.modes or torch_baseline.MODES:
                    make = functools.partial(_create_workload, baseline, name, mode, batch_size)
                    makers[f"{name}/torch_{mode}"] = make
            for row in time_in_turn(
                makers,
                batch_size=batch_size,
                seconds=seconds,
                repeats=values.repeats,
                deadline=deadline,
            ):
                yield row | more
            gc.collect()  # whatever still holds memory of the device
            if baseline:
                baseline.release_memory()


def _time_kernels(
    values: flags.FlagValues, point: Row, common: Row, seconds: float
) -> Iterator[Row]:
    """Yields a row for each implementation of each kind of depthwise layer."""
    size, model = point["batch_size"], create_module(values.config, num_classes=2)
    dtype = compute_dtype(values.config)
    layers = depthwise_layers(model, point["image_px"])
    _say(f"{len(layers)} kinds of depthwise layers: compiling all implementations")
    for layer, implementation, rates in time_kernels(layers, dtype, size, seconds, values.repeats):
        _say("depthwise {}×{}×{}, stride {}".format(*layer) + f", {implementation}")
        about = {"layer": layer, "device_kind": jax.devices()[0].device_kind, "batch_size": size}
        figures = {"error": reason(rates)} if isinstance(rates, Exception) else spread(rates)
        yield {"row": f"depthwise/{implementation}", **figures, "about": about | common}


def _create_baseline(torch_baseline: Any, config: ConfigDict, workloads: Workloads) -> Any:
    """Returns the PyTorch baseline of the same network, images and augmentation."""
    baseline = torch_baseline.Baseline(
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


def _create_workload(baseline: Any, name: str, mode: str, batch_size: int) -> Workload:
    """Returns a row of the baseline in one mode, compiled."""
    start = time.perf_counter()
    run = baseline.make_run(name, mode)
    run(1)
    seconds = None if mode == "eager" else time.perf_counter() - start
    return Workload(run, batch_size, seconds, baseline.memory_mib())


def _points(values: flags.FlagValues, sizes: Sequence[int]) -> list[Row]:
    """Returns the settings to measure, each with the key that is varied, if any."""
    base = {
        "image_px": values.config.data.image_px,
        "width": values.config.model.width,
        "num_classes": _num_classes(values),
    }
    points = [base | {"batch_size": size} for size in sizes]
    if values.suite != "scaling":
        return points
    middle = points[len(points) // 2]
    return [
        middle | {key: choice, "varied": key}
        for key, choices in {"batch_size": sizes, **SCALING}.items()
        for choice in choices
    ]


def _num_classes(values: flags.FlagValues) -> int:
    return values.num_classes or values.config.data.synthetic.num_characters


def _batch_sizes(values: flags.FlagValues) -> list[int]:
    """Returns the batch sizes of the flag, the suite or the config."""
    if values.batch_size is None:
        exponents = range(4, 10) if jax.default_backend() == "cpu" else range(6, 14)
        return {
            "gpu": [1024, 256, 4096],  # the most important first, in case time runs out
            "cpu": [128],
            "scaling": [2**exponent for exponent in exponents],
            "kernels": [128 if jax.default_backend() == "cpu" else 1024],
            None: [values.config.batch_size],
        }[values.suite]
    devices = jax.device_count()
    for text in values.batch_size:
        if not text.isdecimal() or int(text) < 1 or int(text) % devices:
            what = f"a multiple of {devices}, the number of devices" if devices > 1 else "positive"
            raise InputError(f"--batch_size={text}: must be {what}")
    return [int(text) for text in values.batch_size]


def _check_choice(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"--{flag}={name}: choose from {', '.join(known)}")


def _import_baseline() -> Any:
    try:
        from hccr_jax.bench import torch_baseline
    except ImportError as error:
        raise InputError(
            "--baseline=torch needs PyTorch: pip install 'hccr_jax[baseline]'"
        ) from error
    return torch_baseline


def _say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def _render(paths: Sequence[Path]) -> str:
    """Returns the tables of some files, and draws the scaling plot where they have its rows."""
    rows = [row for path in paths for row in tables.read_results(path)]
    picture = tables.plot_scaling(rows, paths[0].parent)
    return tables.to_markdown(rows) + (f"\n\n![scaling]({picture.name})" if picture else "")
