"""Trains or evaluates a recogniser; the same as `hccr train`.

python -m hccr_jax.main --config=configs/v2.py --workdir=runs/v2
"""

import sys
from types import SimpleNamespace

from hccr_jax.cli import command


def main(argv: list[str]) -> int:
    """Runs the command line, the program's name first, and returns its exit code."""
    return command.main(["train", *argv[1:]])


def parse(argv: list[str]) -> SimpleNamespace:
    """Returns the flags of a command line, the config loaded and checked; see `command.parse`."""
    return command.parse("train", argv[1:])


if __name__ == "__main__":
    sys.exit(command.run_process(["train", *sys.argv[1:]]))
