"""Trains or evaluates a recogniser.

Examples:

  hccr train --config=quickstart --workdir=runs/quickstart
  python -m hccr_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  hccr train --config=v2 --config.data.data_dir=/data --config.seed=1
  hccr train --config=v2 --workdir=runs/v2 --mode=eval
  hccr train --config=v2 --mode=eval --checkpoint=runs/v2/checkpoints
  hccr train --config=experiments/paper:baseline

A workdir that holds a checkpoint is resumed. SIGTERM and Ctrl-C save the current step and end the
run; a second one ends it at once.

Exit codes: 0 done, 1 the work failed, 2 the request or its input was wrong, 143 stopped by a
signal.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from absl import flags, logging

from hccr_jax.cli import command, config_files
from hccr_jax.errors import InputError
from hccr_jax.runtime import signals
from hccr_jax.runtime.startup import prepare_process

TAKES_CONFIG = True


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    command.define_path(
        "workdir", "Folder of the run; default runs/ and the config's name or names.", values
    )
    flags.DEFINE_enum(
        "mode", "train", ["train", "eval"], "Train and evaluate, or evaluate only.",
        flag_values=values,
    )  # fmt: skip
    command.define_path(
        "checkpoint",
        "With --mode=eval: a run, or its folder checkpoints; default the workdir's own.",
        values,
    )


def run(values: SimpleNamespace) -> int:
    """Runs the command and returns its exit code."""
    command.require(values, config="for example --config=configs/quickstart.py")
    if values.checkpoint and values.mode != "eval":
        raise InputError("--checkpoint goes with --mode=eval; to train on, use its --workdir")
    workdir = values.workdir or default_workdir(values.config_name)
    try:
        _train_or_evaluate(values, workdir)
    except InputError:
        raise
    except OSError as error:  # where it names no file, it is one of the run's
        nameless = error.errno is not None and error.filename is None
        place = f"{workdir}: {error.strerror}" if nameless else str(error)
        print(f"\n{place}; what was saved before stays", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from hccr_jax.runtime import distributed

        if not distributed.is_initialized():
            raise
        print(f"the other processes were lost: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def default_workdir(config_name: str) -> Path:
    """Returns the workdir of a run that was given none: runs/v2, runs/paper/baseline."""
    path, name = config_files.split_name(config_name)
    return Path("runs", Path(path).stem, name)


def _train_or_evaluate(values: SimpleNamespace, workdir: Path) -> None:
    logging.set_verbosity(logging.WARNING)
    prepare_process()
    from hccr_jax.runtime import distributed
    from hccr_jax.train import loop

    config = values.config
    distributed.initialize(config.watchdog_seconds or 300.0)
    command.TIMELINE.lap("imports")
    signals.explain_bus_errors(
        f"run again, which resumes from the last checkpoint; if it happens again, prepare the data "
        f"in {config.data.data_dir} again"
    )
    if values.mode == "eval":
        loop.evaluate_checkpoint(config, workdir, values.checkpoint)
    else:
        loop.train_and_evaluate(config, workdir, command.TIMELINE)
