"""Serves a page to draw characters on, and recognises them.

Examples:

  hccr serve --checkpoint=runs/v2
  hccr serve --checkpoint=runs/v2 --host=0.0.0.0 --port=8080

The page is one file and needs no network but this server. For a page that recognises in the browser
and needs no server, see launch/build_demo.sh. Ctrl-C ends it.

For other programs: POST /recognize takes strokes, as application/json a list of strokes of points
[x, y], or the bytes of a picture file, and returns JSON with `candidates` and `milliseconds`,
or with `error`: its `code` and `message`.

Exit codes: 0 ended, 1 the address is not available, 2 wrong request.
"""

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

from absl import flags

from hccr_jax.cli import command
from hccr_jax.runtime.startup import prepare_process

# Until the interpreter has ended all threads: else one that still handles a request may be the last
# to release the network, and a thread that frees JAX's arrays at that moment aborts the process.
_KEPT: list[Any] = []


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    command.define_path("checkpoint", "Folder of a run, or its folder checkpoints.", values)
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines connect.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "port",
        8000,
        "0 for any that is free.",
        lower_bound=0,
        upper_bound=65535,
        flag_values=values,
    )


def run(values: SimpleNamespace) -> int:
    """Runs the command and returns its exit code."""
    command.require(
        values, checkpoint="for example --checkpoint=runs/v2", host="0.0.0.0 is all addresses"
    )
    prepare_process()
    import numpy as np

    from hccr_jax.demo.server import create_server
    from hccr_jax.inference.recognizer import Recognizer

    recognizer = Recognizer.load(values.checkpoint)
    _KEPT.append(recognizer)
    host = f"[{values.host.strip('[]')}]" if ":" in values.host else values.host
    try:
        server = create_server(recognizer, values.host.strip("[]"), values.port)
    except OSError as error:
        print(f"{host}:{values.port}: {error.strerror or error}", file=sys.stderr)
        return 1
    with server, contextlib.suppress(KeyboardInterrupt):
        side = recognizer.to_normal_form(np.zeros((1, 1), np.uint8))
        recognizer.classify(side[None])  # compiles, so that the first stroke need not wait
        print(f"draw at http://{host}:{server.server_address[1]}/", flush=True)
        server.serve_forever()
    return 0
