"""`python -m hccr_jax COMMAND` and `hccr COMMAND`; `--help` lists the commands."""

import sys

from hccr_jax.cli import command


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    return command.run_process(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
