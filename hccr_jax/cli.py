"""What the command lines share: flags with a config, and errors as one line."""

import pathlib
import re
import runpy
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from hccr_jax import config as config_lib
from hccr_jax.errors import InputError


def define_config_flags() -> flags.FlagValues:
    """Returns a set of flags of its own with `--config`, `--config.KEY` and `--help`."""
    own = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Such as configs/v2.py; --config.KEY=VALUE overrides a key.",
        lock_config=True, flag_values=own,
    )  # fmt: skip
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=own)
    return own


def parse(values: flags.FlagValues, argv: list[str]) -> None:
    """Parses a command line into `values`, the config checked, unless help is asked for.

    Raises:
      InputError: a flag, the config's file or one of its keys is wrong.
    """
    if not {"--help", "-help", "-h"} & set(argv):
        _check_file(_config_path(argv))
        _check_overrides(argv)
    before, sys.argv = sys.argv, argv  # config_flags finds its overrides there
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise _wrong_flag(error) from error
    finally:
        sys.argv = before
    if values.help:
        return
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}: every flag starts with --, see --help")
    config_lib.check(values.config)


def report_error(error: Exception) -> int:
    """Prints what was wrong with the request on one line of stderr and returns its exit code."""
    print(" ".join(str(error).split()), file=sys.stderr)
    return 2


def _config_path(argv: list[str]) -> str:
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    raise InputError("--config is missing: for example --config=configs/quickstart.py")


def _check_file(path: str) -> None:
    """Checks that a config file can be loaded; config_flags would show a traceback."""
    if not pathlib.Path(path).is_file():
        raise InputError(f"--config={path}: no such file; see configs/ for those that come with it")
    # Configs import one another as `configs.…`, wherever the command is run.
    sys.path.append(str(pathlib.Path(path).resolve().parents[1]))
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:  # a config file is a program: it may raise anything
        raise InputError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config={path}: get_config() returns a {type(config).__name__}")
    config_lib.check_keys(config)


def _check_overrides(argv: list[str]) -> None:
    for argument in argv:
        key = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if key and key[1] not in config_lib.RULES:
            raise config_lib.unknown_key(key[1])


def _wrong_flag(error: flags.Error) -> InputError:
    """Returns the error for a flag that was refused, with the rule of a config's key."""
    key = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
    if key is None:
        return InputError(str(error))
    return InputError(f"config.{key[1]}={key[2]}: must be {config_lib.RULES[key[1]].allowed()}")
