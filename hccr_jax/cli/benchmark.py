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

With --baseline=torch (pip install 'hccr_jax[torch]') PyTorch does the same work in turn with
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

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

from absl import flags

from hccr_jax.cli import command
from hccr_jax.data.casia import charset
from hccr_jax.errors import InputError
from hccr_jax.runtime.startup import prepare_process
from hccr_jax.runtime.workdir import replace_text

TAKES_CONFIG = True
RENAMED = {
    "--peer": "--baseline",
    "--rungs": "--modes",
    "--suite=forms": "--suite=kernels",
}
SUITES = ("gpu", "cpu", "scaling", "kernels")


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
    if output and not output.absolute().parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}")
    baseline = _import_baseline(values)
    prepare_process()
    import jax

    from hccr_jax.bench import suites, tables
    from hccr_jax.bench.data import SyntheticData

    num_classes = values.num_classes or values.config.data.synthetic.num_characters
    rows = _choose_rows(values, num_classes)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # compile_seconds is that of a first time
        jax.config.update("jax_enable_compilation_cache", False)
    if baseline and jax.device_count() > 1 and jax.default_backend() != "cpu":
        raise InputError("--baseline=torch compares on one device: let JAX see one only")
    plan = suites.Plan(
        values.config, values.suite, rows, _batch_sizes(values), num_classes, values.seconds,
        values.repeats, baseline, values.modes or (),
    )  # fmt: skip
    done = []
    with tempfile.TemporaryDirectory(prefix="hccr_benchmark_") as folder:
        num_images = values.num_images or max(20_000, 2 * max(plan.batch_sizes))
        for row in suites.measure(plan, SyntheticData(Path(folder), num_classes, num_images)):
            command.print_json(row)
            done.append(row)
            if output:
                content = {"suite": values.suite, "rows": done}
                replace_text(output, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
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
