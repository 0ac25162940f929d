"""Trains or evaluates a recogniser.

Examples:

  python -m hccr_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m hccr_jax.main --config=configs/v2.py --config.data.data_dir=/data --config.batch_size=512
  python -m hccr_jax.main --config=configs/v2.py --workdir=runs/v2 --mode=eval
  python -m hccr_jax.main --config=configs/v2.py --mode=eval --checkpoint=runs/v2/checkpoints

A workdir that holds a checkpoint is resumed. Exit codes: 0 done, 1 the work failed, 2 the request or
its input was wrong, 143 stopped by SIGTERM after saving.
"""

import os
import pathlib
import re
import sys

from absl import flags, logging
from ml_collections import config_flags

from hccr_jax import config as config_lib
from hccr_jax.errors import InputError



def define_flags() -> flags.FlagValues:
    """Returns the flags, in a set of their own."""
    own = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "The configuration, such as configs/v2.py; --config.KEY=VALUE overrides a key.",
        lock_config=True, flag_values=own,
    )  # fmt: skip
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; default runs/ and the config's name.", flag_values=own
    )
    flags.DEFINE_enum(
        "mode", "train", ["train", "eval"], "Train and evaluate, or evaluate only.", flag_values=own
    )
    flags.DEFINE_string(
        "checkpoint", None, "With --mode=eval: folder of checkpoints, instead of the workdir's best.",
        flag_values=own,
    )  # fmt: skip
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=own)
    return own


def parse(argv: list[str]) -> flags.FlagValues:
    """Returns the parsed flags, the config checked.

    Raises:
      InputError: a flag or a config key is wrong.
    """
    values = define_flags()
    path = next((a.split("=", 1)[1] for a in argv if re.match("--?config=", a)), None)
    if path is not None and not pathlib.Path(path.split(":")[0]).is_file():
        raise InputError(f"--config={path}: no such file; see configs/ for those that come with it")
    before, sys.argv = sys.argv, argv  # config_flags finds its overrides there
    try:
        rest = values(argv)[1:]
    except (AttributeError, KeyError) as error:
        key = re.search(r"'([\w.]+)'", str(error))
        keys = (a.lstrip("-").split("=")[0].removeprefix("config.") for a in argv)
        named = next((k for k in keys if key and k.split(".")[-1] == key[1]), str(error))
        raise config_lib.unknown_key(named) from error
    except flags.Error as error:
        raise InputError(str(error)) from error
    finally:
        sys.argv = before
    if values.help:
        return values
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}: every flag starts with --, see --help")
    if values.config is None:
        raise InputError("--config is missing: for example --config=configs/quickstart.py")
    if values.checkpoint and values.mode != "eval":
        raise InputError("--checkpoint goes with --mode=eval; to train on, use its --workdir")
    config_lib.check(values.config)
    if values.workdir is None:
        values.workdir = str(pathlib.Path("runs", pathlib.Path(path).stem))
    return values


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        values = parse(argv)
        if values.help:
            print(f"{__doc__}\nFlags:{values.get_help()}")
            return 0
        logging.set_verbosity(logging.WARNING)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        from hccr_jax import train  # slow to import: a wrong flag should be told at once

        config, workdir = values.config, pathlib.Path(values.workdir).expanduser()
        if values.mode == "eval":
            train.evaluate_checkpoint(config, workdir, values.checkpoint)
        else:
            train.train_and_evaluate(config, workdir)
    except InputError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
