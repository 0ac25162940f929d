"""What the command lines share: flags with a config, and errors as one line."""

import dataclasses
import difflib
import pathlib
import re
import runpy
import sys
import types
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from hccr_jax import config as config_lib
from hccr_jax import configs
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
        load_config(_config_path(argv))
        _check_overrides(argv)
    parse_flags(values, argv)
    if not values.help:
        config_lib.check(values.config)


def parse_flags(
    values: flags.FlagValues, argv: list[str], takes_arguments: bool = False
) -> list[str]:
    """Parses a command line into `values` and returns its arguments that are no flags.

    Args:
      takes_arguments: False where there may be none.

    Raises:
      InputError: a flag is wrong.
    """
    before, sys.argv = sys.argv, argv  # config_flags finds its overrides there
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise _wrong_flag(error) from error
    finally:
        sys.argv = before
    if rest and not takes_arguments and not values.help:
        raise InputError(f"unexpected argument {rest[0]!r}: every flag starts with --, see --help")
    return rest


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A named config of an experiments file.

    Attributes:
      name: the file's `get_config` takes it.
      description: one line.
      group: heading of several that belong together, or "".
    """

    name: str
    description: str
    group: str


def list_experiments(path: str) -> list[Experiment]:
    """Returns the experiments of a file, in its order; none where it is a plain config.

    An experiments file is a config file whose `get_config` takes a name and which lists the names
    in `NAMES`: {name: description}, or {heading: {name: description}} for those of a group.

    Raises:
      InputError: the file cannot be run.
    """
    experiments = []
    for key, value in _run_file(path).get("NAMES", {}).items():
        named = value.items() if isinstance(value, dict) else [(key, value)]
        group = key if isinstance(value, dict) else ""
        experiments += [Experiment(name, description, group) for name, description in named]
    return experiments


def load_config(argument: str) -> ConfigDict:
    """Returns the config that `--config=argument` means; config_flags would show a traceback.

    Args:
      argument: a config file, or an experiments file, a colon and a name.

    Raises:
      InputError: the file cannot be run, has no such experiment, or its config other keys.
    """
    path, colon, name = argument.partition(":")
    names = [experiment.name for experiment in list_experiments(path)]
    if names and name not in names:
        near = difflib.get_close_matches(name, names, n=1) or names[:1]
        wrong = f"no experiment {name!r}" if colon else "holds several experiments"
        raise InputError(
            f"--config={argument}: {wrong}: give one of {', '.join(names)}, such as "
            f"--config={path}:{near[0]}"
        )
    try:
        config = _run_file(path)["get_config"](*[name] * bool(colon))
    except Exception as error:  # a config file is a program: it may raise anything
        raise InputError(f"--config={argument}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config={argument}: get_config() returns a {type(config).__name__}")
    config_lib.check_keys(config)
    return config


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


def _run_file(path: str) -> dict[str, Any]:
    """Returns what a config file defines."""
    if not pathlib.Path(path).is_file():
        raise InputError(f"--config={path}: no such file; see configs/ for those that come with it")
    # A file of the user's may say `from configs import v2`: its own folder `configs`, then ours.
    module = types.ModuleType("configs")
    parents = pathlib.Path(path).resolve().parents
    module.__path__ = [*(str(f) for f in parents if f.name == "configs"), *configs.__path__]
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_configs(name)}
    sys.modules["configs"] = module
    try:
        return runpy.run_path(path)
    except Exception as error:  # a config file is a program: it may raise anything
        raise InputError(f"--config={path}: {type(error).__name__}: {error}") from error
    finally:
        for name in filter(_is_configs, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(hidden)


def _is_configs(module: str) -> bool:
    return module.partition(".")[0] == "configs"


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
