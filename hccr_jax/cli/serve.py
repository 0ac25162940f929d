"""Serves a page to draw characters on, and recognises them.

Examples:

  hccr serve --checkpoint=runs/v2
  hccr serve --checkpoint=runs/v2 --host=0.0.0.0 --port=8080

The page is one file and needs no network but this server. For a page that recognises in the browser
and needs no server, see launch/build_demo.sh. Ctrl-C ends it.

Other programs may ask, too: POST /recognize takes strokes, as application/json a list of strokes of
points [x, y], or the bytes of a PNG or JPEG file, and answers in JSON with `candidates` and
`milliseconds`, or with `error`: its `code` and `message`.

Exit codes: 0 ended, 1 the address cannot be had, 2 wrong request.
"""

import contextlib
import sys
from typing import Any

import numpy as np
from absl import flags

from hccr_jax.cli import command
from hccr_jax.demo.server import create_server
from hccr_jax.errors import InputError
from hccr_jax.runtime.startup import prepare_process

# Until the interpreter has ended all threads: else one that still answers a request may be the last
# to let go of the network, and a thread that frees JAX's arrays at that moment aborts the process.
_KEPT: list[Any] = []


def parse(argv: list[str]) -> flags.FlagValues:
    """Returns the parsed flags.

    Raises:
      InputError: a flag is wrong.
    """
    own = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=own)
    flags.DEFINE_string(
        "checkpoint", None, "Folder of a run, or its folder checkpoints.", flag_values=own
    )
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines draw, too.",
        flag_values=own,
    )  # fmt: skip
    flags.DEFINE_integer(
        "port", 8000, "0 for any that is free.", lower_bound=0, upper_bound=65535, flag_values=own
    )
    command.parse_flags(own, argv)
    if not own.help and not own.checkpoint:
        raise InputError("--checkpoint is missing: for example --checkpoint=runs/v2")
    return own


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code: 0 ended, 1 no address, 2 wrong request."""
    try:
        own = parse(argv)
        if own.help:
            print(f"{__doc__}\nFlags:{own.get_help()}")
            return 0
        prepare_process()
        from hccr_jax.inference.recognizer import Recognizer  # slow to import

        recognizer = Recognizer.load(own.checkpoint)
        _KEPT.append(recognizer)
    except InputError as error:
        return command.report_error(error)
    try:
        server = create_server(recognizer, own.host, own.port)
    except OSError as error:
        print(f"{own.host}:{own.port}: {error.strerror or error}", file=sys.stderr)
        return 1
    with server, contextlib.suppress(KeyboardInterrupt):
        side = recognizer.to_normal_form(np.zeros((1, 1), np.uint8))
        recognizer.classify(side[None])  # compiles, so that the first stroke need not wait
        print(f"draw at http://{own.host}:{server.server_address[1]}/", flush=True)
        server.serve_forever()
    return 0
