"""Trains or evaluates a recogniser.

Examples:

  python -m hccr_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m hccr_jax.main --config=configs/v2.py --config.data.data_dir=/data --config.seed=1
  python -m hccr_jax.main --config=configs/v2.py --workdir=runs/v2 --mode=eval
  python -m hccr_jax.main --config=configs/v2.py --mode=eval --checkpoint=runs/v2/checkpoints
  python -m hccr_jax.main --config=configs/experiments/paper.py:baseline

A workdir that holds a checkpoint is resumed. SIGTERM and Ctrl-C save the current step and end the
run; a second one ends it at once. Exit codes: 0 done, 1 the work failed, 2 the request or its input
was wrong, 143 stopped by a signal.
"""
# ruff: noqa: E402

import pathlib
import sys

from hccr_jax.runtime.startup import Timeline, keep_memory, prepare_process

timeline = Timeline()  # the other imports take time: the clock starts before them

from absl import flags, logging
from ml_collections import config_flags

from hccr_jax.cli import command
from hccr_jax.errors import InputError
from hccr_jax.runtime import signals


def parse(argv: list[str]) -> flags.FlagValues:
    """Returns the parsed flags, the config checked.

    Raises:
      InputError: a flag or a config key is wrong.
    """
    values = command.define_config_flags()
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run; default runs/ and the config's name or names.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "mode",
        "train",
        ["train", "eval"],
        "Train and evaluate, or evaluate only.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "With --mode=eval: a run, or its folder checkpoints; default the workdir's own.",
        flag_values=values,
    )
    command.parse(values, argv)
    if values.help:
        return values
    if values.checkpoint and values.mode != "eval":
        raise InputError("--checkpoint goes with --mode=eval; to train on, use its --workdir")
    if values.workdir is None:
        path, _, name = config_flags.get_config_filename(values["config"]).partition(":")
        values["workdir"].value = str(pathlib.Path("runs", pathlib.Path(path).stem, name))
    return values


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        values = parse(argv)
        if values.help:
            print(f"{__doc__}\nFlags:{values.get_help()}")
            return 0
        logging.set_verbosity(logging.WARNING)
        prepare_process()
        from hccr_jax.runtime import distributed
        from hccr_jax.train import loop  # slow to import: a wrong flag should be told at once

        distributed.initialize(values.config.watchdog_seconds or 300.0)
        timeline.lap("imports")
        signals.explain_bus_errors(
            f"run again, which goes on from the last checkpoint; if it comes again, prepare the "
            f"data in {values.config.data.data_dir} anew"
        )
        config, workdir = values.config, pathlib.Path(values.workdir).expanduser()
        if values.mode == "eval":
            loop.evaluate_checkpoint(config, workdir, values.checkpoint)
        else:
            loop.train_and_evaluate(config, workdir, timeline)
    except InputError as error:
        return command.report_error(error)
    except OSError as error:  # where it does not tell which file, it is one of the run's
        nameless = error.errno is not None and error.filename is None
        place = f"{values.workdir}: {error.strerror}" if nameless else str(error)
        print(f"\n{place}; what was saved before stays", file=sys.stderr)
        return 1
    except FloatingPointError as error:
        print(error, file=sys.stderr)
        return 1
    except SystemExit as stop:
        return int(stop.code or 0)
    except RuntimeError as error:
        from hccr_jax.runtime import distributed

        if not distributed.is_initialized():
            raise
        print(f"the other processes were lost: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    keep_memory()  # before the thread that listens for signals
    signals.install()
    code = main(sys.argv)
    if "hccr_jax.runtime.distributed" in sys.modules:
        sys.modules["hccr_jax.runtime.distributed"].shutdown(code)
    sys.exit(code)
