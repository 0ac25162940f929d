"""Runs a list of named experiments and writes tables of their results.

Examples:

  hccr sweep --config=configs/experiments/paper.py --data_dir=DIR --workdir=runs/paper
  hccr sweep --config=configs/experiments/paper.py --only=baseline --seeds=0,1,2
  hccr sweep --config=configs/experiments/paper.py --list
  hccr sweep --render=docs/results.md

Each experiment and seed is a run of `hccr train` in WORKDIR/NAME-seedSEED, one after the other.
Finished ones are skipped, interrupted ones are resumed, and one that fails does not hold up the
others. Each result is a line of the output file; the tables and plots of a page are made from such
files alone (see `hccr_jax/report/experiment_tables.py`).

Exit codes: 0 done, 1 an experiment failed, 2 the request was wrong, 130 or 143 stopped by Ctrl-C or
SIGTERM, the run under way having saved.
"""

import json
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from absl import flags
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax.cli import command
from hccr_jax.cli.config_files import Experiment, list_experiments, load_config
from hccr_jax.errors import InputError


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "config", None, "File of experiments, such as configs/experiments/paper.py.",
        flag_values=values,
    )  # fmt: skip
    for name, text in (
        ("data_dir", "Folder of the data sets; the config's where not given."),
        ("workdir", "Folder of the runs; default runs/ and the file's name."),
        ("output", "JSON lines, one a run; default results.jsonl in the workdir."),
        ("render", "Page whose tables to write; alone, nothing is run."),
    ):
        command.define_path(name, text, values)
    flags.DEFINE_list(
        "only", None, "Names of experiments; all where not given.", flag_values=values
    )
    flags.DEFINE_list("seeds", ["0"], "Each experiment runs once with each.", flag_values=values)
    flags.DEFINE_bool("list", False, "Show the experiments and run nothing.", flag_values=values)


def run(values: SimpleNamespace) -> int:
    """Runs the command and returns its exit code."""
    if values.render and not values.render.is_file():
        raise InputError(f"--render={values.render}: no such page")
    code = 0
    if values.config or not values.render:
        experiments = _choose(values)
        if values.list:
            print(_listing(experiments))
            return 0
        code = _run_all(values, experiments)
    if values.render and code in (0, 1):
        from hccr_jax.report import experiment_tables

        experiment_tables.render(values.render)
    return code


def _choose(values: SimpleNamespace) -> list[Experiment]:
    """Returns the experiments that are asked for, in the file's order."""
    command.require(values, config="for example --config=configs/experiments/paper.py")
    experiments = list_experiments(values.config)
    if not experiments:
        raise InputError(f"--config={values.config}: has no NAMES: not a file of experiments")
    names = [experiment.name for experiment in experiments]
    for name in values.only or []:
        if name not in names:
            raise InputError(f"--only={name}: choose from {', '.join(names)}")
    for seed in values.seeds:
        if not seed.isdecimal():
            raise InputError(f"--seeds={seed}: must be whole numbers, such as 0,1,2")
    return [e for e in experiments if not values.only or e.name in values.only]


def _listing(experiments: Sequence[Experiment]) -> str:
    lines, group = [], ""
    for experiment in experiments:
        if experiment.group != group:
            group = experiment.group
            lines.append(f"\n{group}")
        lines.append(f"  {experiment.name:<20} {experiment.description}")
    return "\n".join(lines)


def _run_all(values: SimpleNamespace, experiments: Sequence[Experiment]) -> int:
    """Runs what is not finished, keeps every result, and returns the exit code."""
    from hccr_jax.report import experiment_tables

    workdir = values.workdir or Path("runs", Path(values.config).stem)
    output = values.output or workdir / "results.jsonl"
    order = [experiment.name for experiment in list_experiments(values.config)]
    first = dict(config_lib.flatten(load_config(f"{values.config}:{order[0]}")))
    runs = [
        (
            experiment,
            _with(values, experiment, int(seed)),
            workdir / f"{experiment.name}-seed{seed}",
        )
        for seed in values.seeds
        for experiment in experiments
    ]
    failed = []
    for number, (experiment, config, folder) in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {experiment.name}, seed {config.seed}"
        if not _is_finished(folder, config):
            print(f"{label}: {experiment.description}", flush=True)
            code, received = _run(values.config, experiment.name, config, folder)
            if received:
                print(f"{label}: stopped", file=sys.stderr)
                return 128 + received
            if code:
                print(f"{label}: failed with exit code {code}", file=sys.stderr)
                failed.append(folder.name)
                continue
        changes = {k: v for k, v in config_lib.flatten(config) if v != first[k]}
        changes = {k: v for k, v in changes.items() if k not in ("seed", "data.data_dir")}
        about = {
            "name": experiment.name, "group": experiment.group, "seed": config.seed,
            "description": experiment.description, "changes": changes,
        }  # fmt: skip
        row = experiment_tables.create_row(folder, about)
        experiment_tables.write_row(output, row, order)
        scores = {"validation": "validation_top1", "test": "top1"}
        said = [f"{k} {row['eval'][v]:.2%}" for k, v in scores.items() if v in row["eval"]]
        print(f"{label}: {', '.join(said)}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _with(values: SimpleNamespace, experiment: Experiment, seed: int) -> ConfigDict:
    """Returns the config of a run."""
    config = load_config(f"{values.config}:{experiment.name}")
    config.seed = seed
    if values.data_dir:
        config.data.data_dir = str(values.data_dir)
    config_lib.check(config)
    return config


def _is_finished(folder: Path, config: ConfigDict) -> bool:
    """Returns whether a folder holds the result of this very config."""
    if not ((folder / "eval.json").exists() and (folder / "config.json").exists()):
        return False
    saved = config_lib.flatten(ConfigDict(json.loads((folder / "config.json").read_text("utf-8"))))
    old, new = dict(saved), dict(config_lib.flatten(config))
    # A key that the run did not know yet does by default what was done before.
    return all(old.get(k, v) == v for k, v in new.items() if k != "data.data_dir")


def _run(path: str, name: str, config: ConfigDict, folder: Path) -> tuple[int, int]:
    """Runs an experiment; returns its exit code and the signal that was to stop it, or 0.

    A signal is passed on as SIGTERM, at which the run saves and ends.
    """
    program = [
        sys.executable, "-m", "hccr_jax.main", f"--config={path}:{name}", f"--workdir={folder}",
        f"--config.seed={config.seed}", f"--config.data.data_dir={config.data.data_dir}",
    ]  # fmt: skip
    received: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.terminate()

    # A terminal sends Ctrl-C to the run as well, which would end without saving: what is ignored
    # here while it starts, it ignores for good.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminate = signal.signal(signal.SIGTERM, pass_on)
    try:
        processes.append(subprocess.Popen(program))
        signal.signal(signal.SIGINT, pass_on)
        if received:  # before there was a process to pass it on to
            processes[0].terminate()
        return processes[0].wait(), received[0] if received else 0
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)
