"""hccr COMMAND: see `hccr_jax.cli`."""

import importlib
import signal
import sys


def main() -> int:
    """Runs one command."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    return importlib.import_module(f"hccr_jax.cli.{sys.argv[1]}").main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
