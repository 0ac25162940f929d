"""Measures the speed of training, evaluation and data reading: one JSON line a row.

Examples:

  hccr benchmark --config=configs/v2.py --batch_size=128
  hccr benchmark --config=configs/v2.py --rows=train_step,forward --baseline=torch
  hccr benchmark --config=configs/v2.py --suite=gpu --output=gpu.json
  hccr benchmark --config=configs/v2.py --suite=scaling --output=scaling.json
  hccr benchmark --config=configs/v2.py --suite=kernels --output=kernels.json
  hccr benchmark --config=configs/v2.py --suite=compiled --target=h200 --devices=8
  hccr benchmark --render=gpu.json,scaling.json

Rows: train_loop, evaluation, data_reading, prepare, train_step, train_step_augmented, forward,
augment. A workload that does not fit into the device's memory gets a row with an error.

With --baseline=torch (pip install 'hccr_jax[torch]') PyTorch does the same work in turn with
ours, in one process, so that a drift of the machine's speed affects both: eager, under
torch.compile, and on a GPU in one CUDA graph (--modes). The fastest of these is the row's
"baseline"; "ratio" is how much faster ours is, the median over pairs.

--suite=cpu and --suite=gpu are all rows and the baseline at batch 128, and at 256, 1,024 and 4,096;
--suite=scaling varies batch size, image size, width and classes of the training step;
--suite=kernels times every implementation of each kind of depthwise layer, and the library chooses
by such results in hccr_jax/ops/measured/.

--suite=compiled needs no GPU: it compiles the training program for one (--target) and counts, for
each device and step, kernels, bytes read and written, the longest chain of kernels that wait for
one another, exchanges between devices, CUDA graphs and turns of the host, and registers and spills
of our own kernels. It needs the extra cuda12 or cuda13, and one to three minutes a batch size. The
prediction is 1.7 µs a kernel and 2.1 TB/s, fitted to layers measured on an H200; XLA times no
variants of its kernels without a GPU, so that a few may be others there.

A suite ends with a table on stderr. --render prints such
tables as Markdown from the files of --output, and draws scaling.png next to the first.

The roofline is the limit that the memory bandwidth and the matrix units of this device, measured in
the same run, set to a step whose batch norm and ReLU6 are fused into their neighbours
(`hccr_jax/bench/roofline.py`).

Programs are compiled in every run, and the seconds are reported, unless JAX_COMPILATION_CACHE_DIR
names a folder to keep them in.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from absl import flags

from hccr_jax.cli import command
from hccr_jax.data.casia import charset
from hccr_jax.errors import InputError
from hccr_jax.runtime.startup import prepare_process
from hccr_jax.runtime.workdir import replace_text

Row = dict[str, Any]
TAKES_CONFIG = True
RENAMED = {
    "--peer": "--baseline",
    "--rungs": "--modes",
    "--suite=forms": "--suite=kernels",
}
SUITES = ("gpu", "cpu", "scaling", "kernels", "compiled")
TARGETS = ("h200",)  # in bench/targets


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list(
        "batch_size", None, "Images a step, one or several, such as 256,1024; the config's or the "
        "suite's where not given.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "num_classes", None, "Characters; the config's data.synthetic.num_characters where not "
        "given.", lower_bound=2, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("rows", None, "What to time; all rows where not given.", flag_values=values)
    flags.DEFINE_float(
        "seconds", None, "A repeat lasts; 1 on a CPU and 0.3 on accelerators where not given.",
        lower_bound=0.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("repeats", 5, "Repeats of each row.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("baseline", None, ["torch"], "Time this as well.", flag_values=values)
    flags.DEFINE_list(
        "modes", None, "eager, compile, graph; all where not given.", flag_values=values
    )
    flags.DEFINE_enum(
        "suite", None, SUITES, "Rows, sizes and baseline of a report.", flag_values=values
    )
    flags.DEFINE_enum(
        "target", TARGETS[0], TARGETS, "The GPU to compile for, with --suite=compiled.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "devices", 1, "Their number.", lower_bound=1, upper_bound=8, flag_values=values
    )
    flags.DEFINE_integer(
        "num_images", None, "Characters of the synthetic data set for the rows that read data; "
        "20,000 or two batches where not given.", lower_bound=1, flag_values=values,
    )  # fmt: skip
    command.define_path("output", "Write all rows to this JSON file.", values)
    command.define_paths("render", "Files to print as tables.", values)


def run(values: SimpleNamespace) -> None:
    """Checks the request, then prints each row as it comes."""
    if values.render:
        print(_render(values.render))
        return
    command.require(values, config="for example --config=configs/quickstart.py")
    output = values.output
    if output and output.is_dir():
        raise InputError(f"--output={output}: a folder: name a file")
    if output and not output.absolute().parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}")
    baseline = _import_baseline(values)
    if values.suite == "compiled":
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # or JAX's plugin wants a driver
    prepare_process()
    import jax

    from hccr_jax.bench import suites
    from hccr_jax.bench.data import SyntheticData

    num_classes = values.num_classes or values.config.data.synthetic.num_characters
    batch_sizes = _batch_sizes(values)
    # compile_seconds is that of a first time, and XLA describes a program as it compiles it.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ or values.suite == "compiled":
        jax.config.update("jax_enable_compilation_cache", False)
    if values.suite == "compiled":
        from hccr_jax.bench.compiled import count_programs

        _report(values, count_programs(
            values.config, values.target, values.devices, batch_sizes, num_classes
        ))  # fmt: skip
        return
    rows = _choose_rows(values, num_classes)
    if baseline and jax.device_count() > 1 and jax.default_backend() != "cpu":
        raise InputError("--baseline=torch compares on one device: let JAX see one only")
    plan = suites.Plan(
        values.config, values.suite, rows, batch_sizes, num_classes, values.seconds,
        values.repeats, baseline, values.modes or (),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hccr_benchmark_") as folder:
        num_images = values.num_images or max(20_000, 2 * max(plan.batch_sizes))
        data = SyntheticData(Path(folder), num_classes, num_images)
        _report(values, suites.measure(plan, data))


def _report(values: SimpleNamespace, rows: Iterable[Row]) -> None:
    """Prints rows as they come, writes them to --output, and ends a suite with a table."""
    from hccr_jax.bench import tables

    done = []
    for row in rows:
        command.print_json(row)
        done.append(row)
        if values.output:
            content = {"suite": values.suite, "rows": done}
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            replace_text(values.output, text)
    if values.suite:
        print(tables.to_markdown(done), file=sys.stderr)


def _choose_rows(values: SimpleNamespace, num_classes: int) -> Sequence[str]:
    """Returns the names of the rows to time."""
    from hccr_jax.bench.suites import BASELINE_ROWS
    from hccr_jax.bench.workloads import ROWS

    scaling = values.suite == "scaling"
    names = values.rows or (["train_step"] if scaling else ROWS)
    _check_choice("rows", names, BASELINE_ROWS if scaling else ROWS)
    if set(names) - set(BASELINE_ROWS) and num_classes > len(charset.level1()):
        raise InputError(
            f"--num_classes={num_classes}: the rows that read data have at most "
            f"{len(charset.level1())}; choose others with --rows"
        )
    return names


def _batch_sizes(values: SimpleNamespace) -> list[int]:
    """Returns the batch sizes of the flag, the suite or the config."""
    import jax

    if values.batch_size is None:
        exponents = range(4, 10) if jax.default_backend() == "cpu" else range(6, 14)
        return {
            "gpu": [1024, 256, 4096],  # the most important first, in case time runs out
            "cpu": [128],
            "scaling": [2**exponent for exponent in exponents],
            "kernels": [128 if jax.default_backend() == "cpu" else 1024],
            "compiled": [1024 * values.devices, 256 * values.devices],
            None: [values.config.batch_size],
        }[values.suite]
    devices = values.devices if values.suite == "compiled" else jax.device_count()
    for text in values.batch_size:
        if not text.isdecimal() or int(text) < 1 or int(text) % devices:
            what = f"a multiple of {devices}, the number of devices" if devices > 1 else "positive"
            raise InputError(f"--batch_size={text}: must be {what}")
    return [int(text) for text in values.batch_size]


def _check_choice(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"--{flag}={name}: choose from {', '.join(known)}")


def _import_baseline(values: SimpleNamespace) -> ModuleType | None:
    """Returns the module of the baseline that the request needs, or None for none."""
    if not values.baseline and values.suite not in ("gpu", "cpu"):
        return None
    try:
        from hccr_jax.bench import torch_baseline
    except ImportError as error:
        raise InputError("--baseline=torch needs PyTorch: pip install 'hccr_jax[torch]'") from error
    _check_choice("modes", values.modes or (), torch_baseline.MODES)
    if not values.config.model.name.startswith("mobilenet"):
        raise InputError(
            f"--baseline=torch: there is no {values.config.model.name} to compare with"
        )
    # Or JAX would take most of a GPU's memory for itself as it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return torch_baseline


def _render(paths: Sequence[Path]) -> str:
    """Returns the tables of some files, and draws the scaling plot where they have its rows."""
    from hccr_jax.bench import tables

    rows = [row for path in paths for row in tables.read_results(path)]
    picture = tables.plot_scaling(rows, paths[0].parent)
    return tables.to_markdown(rows) + (f"\n\n![scaling]({picture.name})" if picture else "")
