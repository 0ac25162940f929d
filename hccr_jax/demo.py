"""Serves a page to draw characters on, and recognises them.

Examples:

  python -m hccr_jax.demo --checkpoint=runs/v2
  python -m hccr_jax.demo --checkpoint=runs/v2 --host=0.0.0.0 --port=8080

The page is one file and needs no network but this server. For a page that recognises in the browser
and needs no server, see launch/build_demo.sh. Ctrl-C ends it.

Other programs may ask, too: POST /recognize takes strokes, as application/json a list of strokes of
points [x, y], or the bytes of a PNG or JPEG file, and answers in JSON with `candidates` and
`milliseconds`, or with `error`: its `code` and `message`.

Exit codes: 0 ended, 1 the address cannot be had, 2 wrong request.
"""

import contextlib
import io
import json
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from hccr_jax import cli
from hccr_jax.data import drawing, ink, pictures
from hccr_jax.errors import InputError
from hccr_jax.startup import prepare_process

PAGE = Path(__file__).parent / "web" / "index.html"
STROKES_TYPE = "application/json"
# ONNX Runtime, beside a page that recognises by itself.
RUNTIME, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
MAX_STROKES_BYTES = 1 << 19
MAX_PICTURE_BYTES = 16 << 20
MAX_DROPPED_BYTES = 64 << 20  # a request that is too large is received up to here, but not kept
TIMEOUT_SECONDS = 30  # for a request to arrive
# The page is all there is: nothing may be loaded from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:"
)


class _Refused(Exception):
    """A request that gets no answer; the page has a message for each code."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


# Until the interpreter has ended all threads: else one that still answers a request may be the last
# to let go of the network, and a thread that frees JAX's arrays at that moment aborts the process.
_KEPT: list[Any] = []


def create_server(recognizer: Any, host: str, port: int) -> ThreadingHTTPServer:
    """Returns a server of the page, bound to its address; `serve_forever` runs it.

    Args:
      recognizer: a `recognizer.Recognizer`.
      host: the address to listen at.
      port: of the address; 0 for any that is free.

    Raises:
      OSError: the address cannot be had.
    """
    return _Server((host, port), recognizer)


class _Server(ThreadingHTTPServer):
    """What its requests share.

    Attributes:
      recognizer: for one request at a time, which then has all cores.
      turn: who has it.
      files: by path, the type and the bytes.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], recognizer: Any) -> None:
        super().__init__(address, _Handler)
        self.recognizer = recognizer
        self.turn = threading.Lock()
        model = {
            "mode": "server",
            "characters": len(recognizer.classes),
            "calibrated": recognizer.is_calibrated,
            "max_picture_bytes": MAX_PICTURE_BYTES,
        }
        self.files = {
            "/": ("text/html; charset=utf-8", PAGE.read_bytes()),
            "/model.json": ("application/json", json.dumps(model).encode()),
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that goes away in the middle is no error.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def describe_for_browser(checkpoint: str | Path) -> dict[str, Any]:
    """Returns model.json of a page that recognises by itself, as launch/build_demo.sh writes it.

    Args:
      checkpoint: folder of a run, or its folder checkpoints.

    Raises:
      InputError: there is no such run.
    """
    from hccr_jax.pretrained import NORMAL_FORM, load_pretrained
    from hccr_jax.recognizer import read_temperature

    pretrained = load_pretrained(checkpoint)
    # The temperature of a run is that of all its answers, and the page has the network alone.
    alone = pretrained.config.model.mqdf_weight == 0.0
    temperature = read_temperature(pretrained) if alone else None
    views = pretrained.network.views
    maps, weights = (views.maps, views.weights) if views else (np.eye(2)[None], np.ones(1))
    return {
        "mode": "browser",
        "model": "model.onnx",
        "runtime": RUNTIME,
        "wasm": WASM,
        "classes": list(pretrained.classes),
        "preprocessing": {key: pretrained.config.data[key] for key in NORMAL_FORM},
        "views": {"maps": maps.tolist(), "weights": weights.tolist()},
        "temperature": temperature or 1.0,
        "calibrated": temperature is not None,
    }


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hccr_jax", ""
    timeout = TIMEOUT_SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in self.server.files:
            self._send(HTTPStatus.OK, *self.server.files[path])
        else:
            self._refuse(_Refused(HTTPStatus.NOT_FOUND, "not_found", f"{path}: nothing is here"))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        start = time.perf_counter()
        try:
            form = self._read_form()
            with self.server.turn:
                (candidates,) = self.server.recognizer.classify(form[None])
        except _Refused as refused:
            self._refuse(refused)
        else:
            taken = round(1e3 * (time.perf_counter() - start), 1)
            described = [candidate._asdict() for candidate in candidates]
            self._send_json(HTTPStatus.OK, {"candidates": described, "milliseconds": taken})

    def _read_form(self) -> np.ndarray:
        """Returns what was sent in normal form."""
        is_drawing = self.headers.get_content_type() == STROKES_TYPE
        data = self._read_body(MAX_STROKES_BYTES if is_drawing else MAX_PICTURE_BYTES)
        if self.path != "/recognize":
            raise _Refused(HTTPStatus.NOT_FOUND, "not_found", f"{self.path}: nothing is here")
        return self.server.recognizer.to_normal_form(
            _draw(data) if is_drawing else _to_bitmap(data)
        )

    def _read_body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self.close_connection = True
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "no_length", "Content-Length is missing")
        if int(length) > most:
            self.close_connection = True
            # Many a client listens only once it has sent all.
            left = int(length) if int(length) <= MAX_DROPPED_BYTES else 0
            while left and (data := self.rfile.read(min(left, 1 << 16))):
                left -= len(data)
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large",
                f"{int(length):,} bytes: at most {most:,} are read",
            )  # fmt: skip
        return self.rfile.read(int(length))

    def _refuse(self, refused: _Refused) -> None:
        self._send_json(refused.status, {"error": {"code": refused.code, "message": str(refused)}})

    def _send_json(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(answer, ensure_ascii=False).encode())

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", POLICY)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a request is no event."""


def _draw(data: bytes) -> np.ndarray:
    """Returns the bitmap of strokes in JSON."""
    try:
        strokes = drawing.parse_strokes(json.loads(data))
    except InputError as error:
        raise _Refused(HTTPStatus.BAD_REQUEST, "bad_strokes", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _Refused(HTTPStatus.BAD_REQUEST, "bad_json", f"not JSON: {error}") from error
    if not strokes:
        raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "empty", "nothing is drawn")
    return drawing.rasterize(strokes)


def _to_bitmap(data: bytes) -> np.ndarray:
    """Returns the bitmap of a picture's bytes."""
    try:
        grey, record, _ = next(pictures.read_pictures(io.BytesIO(data), "picture"))
        if record is not None:
            raise InputError("picture: a GNT file: hccr_jax.predict reads it")
    except InputError as error:
        raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "bad_picture", str(error)) from error
    try:
        return ink.to_bitmap(grey, "picture")
    except InputError as error:
        raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "empty", str(error)) from error


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
    cli.parse_flags(own, argv)
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
        from hccr_jax.recognizer import Recognizer  # slow to import

        recognizer = Recognizer.load(own.checkpoint)
        _KEPT.append(recognizer)
    except InputError as error:
        return cli.report_error(error)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv))
