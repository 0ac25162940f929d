"""Configs by name or path: those that come with the library, a user's own, lists of experiments."""

import contextlib
import dataclasses
import difflib
import re
import runpy
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax import configs
from hccr_jax.errors import InputError
from hccr_jax.paths import expand

_SHIPPED = Path(configs.__path__[0])
_RENAMED = {"strokes": "synthetic"}  # configs of 0.1
_DEFINE: dict[type, Any] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


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


def find(name: str) -> Path:
    """Returns the file of a config.

    Args:
      name: a path, or the name of a config that comes with the library, such as "v2" or
        "experiments/paper"; "configs/v2.py" means that one, too, where there is no such file.

    Raises:
      InputError: there is none; names the nearest that come with the library.
    """
    bare = name.removeprefix("configs/").removesuffix(".py")
    path = expand(name)
    if bare in _RENAMED and not path.is_file():
        warn_renamed(f"--config={bare}", _RENAMED[bare])
        bare = _RENAMED[bare]
    paths = {path.relative_to(_SHIPPED).with_suffix("").as_posix(): path for path in _shipped()}
    known = [paths[bare]] if bare in paths else []
    own = [path] if path.is_file() else []
    if found := own + known if name.endswith(".py") else known + own:
        return found[0]
    near = difflib.get_close_matches(bare, paths, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the library has {', '.join(paths)}"
    raise InputError(f"--config={name}: no such file; {hint}")


def list_experiments(name: str) -> list[Experiment]:
    """Returns the experiments of a file, in its order; none where it is a plain config.

    An experiments file is a config file whose `get_config` takes a name and which lists the names
    in `NAMES`: {name: description}, or {heading: {name: description}} for those of a group.

    Raises:
      InputError: the file is not found or cannot be run.
    """
    with _running(name, name) as module:
        return _experiments(module)


def split_name(argument: str) -> tuple[str, str]:
    """Returns what `--config=argument` means: a config's name or path, and an experiment or ""."""
    path, _, name = argument.rpartition(":")
    whole = not path or expand(argument).is_file()  # a path may have a colon
    return (argument, "") if whole else (path, name)


def load_config(argument: str) -> ConfigDict:
    """Returns the config that `--config=argument` means, with the keys of today.

    Args:
      argument: a config (see `find`), or an experiments file, a colon and a name.

    Raises:
      InputError: the file cannot be run, has no such experiment, or its config other keys.
    """
    path, name = split_name(argument)
    with _running(path, argument) as module:
        names = [experiment.name for experiment in _experiments(module)]
        if names and name not in names:
            near = difflib.get_close_matches(name, names, n=1) or names[:1]
            wrong = f"no experiment {name!r}" if name else "holds several experiments"
            raise InputError(
                f"--config={argument}: {wrong}: give one of {', '.join(names)}, such as "
                f"--config={path}:{near[0]}"
            )
        config = module["get_config"](*[name] * bool(name))
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config={argument}: get_config() returns a {type(config).__name__}")
    config, old = config_lib.upgrade(config.to_dict())
    for key in old:
        warn_renamed(f"config.{key} of {path}", config_lib.RENAMED.get(key, "another value"))
    config_lib.check_keys(config)
    return config


def override(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Sets keys of a config, those of an earlier version under their names of today."""
    for old, value in changes.items():
        key, new = config_lib.upgrade_leaf(old, value)
        if (key, new) != (old, value):
            warn_renamed(f"--config.{old}", f"--config.{key}" if key != old else f"{new!r}")
        config.update_from_flattened_dict({key: new})
    config_lib.expand_paths(config)


def define_overrides(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Defines the flags `--config.KEY` that a command line has and returns their keys.

    Raises:
      InputError: there is no such key.
    """
    found = [re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv]
    keys = list(dict.fromkeys(match[1] for match in found if match))
    for key in keys:
        name = config_lib.RENAMED.get(key, key)
        if name not in config_lib.RULES:
            raise config_lib.unknown_key(key)
        kind = config_lib.RULES[name].kind
        _DEFINE[kind](f"config.{key}", None, "Overrides the key.", flag_values=values)
    return keys


def refused(error: flags.Error) -> InputError:
    """Returns the error for a flag that was refused, with the rule of a config's key."""
    key = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
    if key is None:
        return InputError(str(error))
    rule = config_lib.RULES[config_lib.RENAMED.get(key[1], key[1])]
    return InputError(f"config.{key[1]}={key[2]}: must be {rule.allowed()}")


def warn_renamed(old: str, new: str) -> None:
    """Prints one line of stderr about a name of version 0.1."""
    print(f"warning: {old} is now {new}; version 0.2 still takes the old one", file=sys.stderr)


def _shipped() -> list[Path]:
    return sorted(path for path in _SHIPPED.rglob("*.py") if path.name != "__init__.py")


def _experiments(module: Mapping[str, Any]) -> list[Experiment]:
    experiments = []
    for key, value in module.get("NAMES", {}).items():
        named = value.items() if isinstance(value, dict) else [(key, value)]
        group = key if isinstance(value, dict) else ""
        experiments += [Experiment(name, description, group) for name, description in named]
    return experiments


@contextlib.contextmanager
def _running(name: str, argument: str) -> Iterator[dict[str, Any]]:
    """Yields what a config file defines; an error in it, or in the body, becomes an InputError.

    The file may say `from configs import v2`: that is a module of its own folder `configs`, where
    it is in one, or else of ours, whatever package `configs` is installed.
    """
    path = find(name)
    module = types.ModuleType("configs")
    folders = (str(folder) for folder in path.resolve().parents if folder.name == "configs")
    module.__path__ = [*folders, str(_SHIPPED)]
    hidden = {other: sys.modules.pop(other) for other in list(sys.modules) if _is_configs(other)}
    sys.modules["configs"] = module
    try:
        yield runpy.run_path(str(path))
    except InputError:
        raise
    except Exception as error:  # a config file is a program: it may raise anything
        raise InputError(f"--config={argument}: {type(error).__name__}: {error}") from error
    finally:
        for other in filter(_is_configs, list(sys.modules)):
            del sys.modules[other]
        sys.modules.update(hidden)


def _is_configs(module: str) -> bool:
    return module.partition(".")[0] == "configs"
