"""The one wrapper around all commands: parsing, help, errors as one line, and exit codes.

A command is a module of this folder. Its docstring is its help, `define_flags(values)` defines its
flags, and `run(values)` does the work, with the flags as attributes of `values`, and returns an
exit code, or None for 0. Its imports at the top are light, so that a wrong flag is reported at
once. Optional:

  TAKES_CONFIG     there are --config and --config.KEY; `values.config` is the config, checked, or
                   None, and `values.config_name` what --config names
  TAKES_ARGUMENTS  `values.arguments` are the arguments that are no flags
  RENAMED          {old flag: new flag}, such as {"--peer": "--baseline"}
"""
# ruff: noqa: E402

from hccr_jax.runtime.startup import Timeline, keep_memory

TIMELINE = Timeline()  # the other imports take time: the clock starts before them

import difflib
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from absl import flags

import hccr_jax
from hccr_jax import config as config_lib
from hccr_jax.cli import config_files
from hccr_jax.errors import InputError
from hccr_jax.paths import expand
from hccr_jax.runtime import signals

COMMANDS = (
    "train", "prepare", "predict", "serve", "export", "analyse", "sweep", "benchmark", "cost",
    "scaling",
)  # fmt: skip
HELP = {"--help", "-help", "-h"}


def run_process(argv: Sequence[str]) -> int:
    """Runs a command as the only work of this process; the arguments are those of `main`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have 永, or ×
    if argv[:1] != ["train"]:
        return main(argv)
    keep_memory()  # before the thread that listens for signals
    signals.install()
    code = main(argv)
    if "hccr_jax.runtime.distributed" in sys.modules:
        sys.modules["hccr_jax.runtime.distributed"].shutdown(code)
    return code


def main(argv: Sequence[str]) -> int:
    """Runs a command and returns its exit code.

    Args:
      argv: the command's name, its flags and arguments.
    """
    code = 0
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `hccr cost … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        report_error(error)
        code = 2
    except (OSError, FloatingPointError) as error:
        report_error(error)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:  # a run that saved and ends, at a signal
        code = int(stop.code or 0)
    return code


def parse(name: str, argv: Sequence[str]) -> SimpleNamespace:
    """Returns the flags and arguments of a command as attributes, the config loaded and checked.

    Args:
      name: of the command.
      argv: what follows it on the command line.

    Raises:
      InputError: a flag, the config's file or one of its keys is wrong.
    """
    module, values = _load_command(name)
    takes_config = getattr(module, "TAKES_CONFIG", False)
    argv = [_rename(argument, getattr(module, "RENAMED", {})) for argument in argv]
    overrides = config_files.define_overrides(values, argv) if takes_config else []
    try:
        arguments = values([name, *argv])[1:]
    except flags.Error as error:
        raise config_files.refused(error) from error
    if arguments and not getattr(module, "TAKES_ARGUMENTS", False):
        raise InputError(
            f"unexpected argument {arguments[0]!r}: every flag starts with --, see --help"
        )
    parsed = SimpleNamespace(**values.flag_values_dict(), arguments=arguments)
    if takes_config:
        parsed.config_name, parsed.config = parsed.config, None
        if parsed.config_name:
            parsed.config = config_files.load_config(parsed.config_name)
            changes = {key: values[f"config.{key}"].value for key in overrides}
            config_files.override(parsed.config, changes)
            config_lib.check(parsed.config)
            parsed.config.lock()
    return parsed


def define_path(name: str, text: str, values: flags.FlagValues) -> None:
    """Defines a flag that is a `Path`, see `paths.expand`; None where it is not given."""
    flags.DEFINE(_PathParser(), name, None, text, values)


def define_paths(name: str, text: str, values: flags.FlagValues) -> None:
    """Defines a flag that is a list of `Path`, separated by commas; None where it is not given."""
    flags.DEFINE(_PathListParser(), name, None, text, values)


def print_json(value: Any) -> None:
    """Prints a value as JSON on one line, which is JSON in every terminal's encoding."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text, flush=True)


def require(values: SimpleNamespace, **hints: str) -> None:
    """Checks that flags were given.

    Args:
      hints: for each flag what to give.

    Raises:
      InputError: names the first that is missing.
    """
    for name, hint in hints.items():
        if getattr(values, name) in (None, "", []):
            raise InputError(f"--{name} is missing: {hint}")


def report_error(error: Exception) -> None:
    """Prints an error on one line of stderr."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(" ".join(text.split()), file=sys.stderr)


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument: str) -> Path:
        return expand(argument)


class _PathListParser(flags.ListParser):
    def parse(self, argument: str) -> list[Path]:  # type: ignore[override]
        return [expand(path) for path in super().parse(argument)]


def _run(argv: Sequence[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in HELP:
        print(_overview())
    elif name == "--version":
        print(f"hccr_jax {hccr_jax.__version__}")
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean hccr {near[0]}?" if near else "see hccr --help"
        raise InputError(f"hccr {name}: no such command: {hint}")
    elif HELP & set(rest):
        module, values = _load_command(name)
        print(f"{module.__doc__}\nFlags:{values.get_help()}")
    else:
        return _load_command(name)[0].run(parse(name, rest)) or 0
    return 0


def _load_command(name: str) -> tuple[ModuleType, flags.FlagValues]:
    """Returns a command's module and its flags."""
    module, values = importlib.import_module(f"hccr_jax.cli.{name}"), flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may follow arguments
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    if getattr(module, "TAKES_CONFIG", False):
        text = "A config file, or the name of one that comes with the library, such as v2; "
        text += "--config.KEY=VALUE overrides a key."
        flags.DEFINE_string("config", None, text, flag_values=values)
    module.define_flags(values)
    return module, values


def _overview() -> str:
    """Returns a line for each command, the first of its docstring."""
    lines = ["Usage: hccr COMMAND [FLAG...]; hccr COMMAND --help shows its flags and examples.", ""]
    for name in COMMANDS:
        summary = (importlib.import_module(f"hccr_jax.cli.{name}").__doc__ or "").splitlines()[0]
        lines.append(f"  {name:<10} {summary}")
    return "\n".join([*lines, "", "hccr --version shows the version."])


def _rename(argument: str, renamed: dict[str, str]) -> str:
    """Returns an argument with the name of today for its flag or its whole, with a warning."""
    for old, new in renamed.items():
        if argument == old or argument.startswith(f"{old}="):
            config_files.warn_renamed(old, new)
            return new + argument.removeprefix(old)
    return argument
