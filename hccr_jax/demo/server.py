"""An HTTP server for the drawing page and one network, built on the standard library."""

import io
import json
import socket
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from hccr_jax.data.images import files, ink, strokes
from hccr_jax.demo.description import STROKES_TYPE
from hccr_jax.errors import InputError

PAGE = Path(__file__).with_name("index.html")
MAX_STROKES_BYTES = 1 << 19
MAX_PICTURE_BYTES = 16 << 20
MAX_DROPPED_BYTES = 64 << 20  # a request that is too large is received up to here, but not kept
TIMEOUT_SECONDS = 30  # for a request to arrive
# The page is self-contained: the browser may load nothing from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:"
)


class _Refused(Exception):
    """A request that is refused; the page has a message for each code."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def create_server(recognizer: Any, host: str, port: int) -> ThreadingHTTPServer:
    """Returns a server of the page, bound to its address; call its `serve_forever`.

    Args:
      recognizer: a `recognizer.Recognizer`.
      host: the address to listen at.
      port: to listen at; 0 for any free one.

    Raises:
      OSError: the address is in use or not available.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # localhost has both families: more programs try that of version 4.
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return _Server(family, address, recognizer)


class _Server(ThreadingHTTPServer):
    """The state that requests share.

    Attributes:
      recognizer: used by one request at a time, on all cores.
      lock: held while the recognizer runs.
      files: content type and bytes by path.
    """

    daemon_threads = True

    def __init__(self, family: int, address: Any, recognizer: Any) -> None:
        self.address_family = family
        super().__init__(address, _Handler)
        self.recognizer = recognizer
        self.lock = threading.Lock()
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
        # A browser that disconnects is not an error.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Handles one request."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hccr_jax", ""
    timeout = TIMEOUT_SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in self.server.files:
            self._send(HTTPStatus.OK, *self.server.files[path])
        else:
            self._refuse(_Refused(HTTPStatus.NOT_FOUND, "not_found", f"{path}: not found"))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        start = time.perf_counter()
        try:
            form = self._read_form()
            with self.server.lock:
                (candidates,) = self.server.recognizer.classify(form[None])
        except _Refused as refused:
            self._refuse(refused)
        else:
            taken = round(1e3 * (time.perf_counter() - start), 1)
            described = [candidate._asdict() for candidate in candidates]
            self._send_json(HTTPStatus.OK, {"candidates": described, "milliseconds": taken})

    def _read_form(self) -> np.ndarray:
        """Returns the normalised image of the request's body."""
        is_drawing = self.headers.get_content_type() == STROKES_TYPE
        data = self._read_body(MAX_STROKES_BYTES if is_drawing else MAX_PICTURE_BYTES)
        path = self.path.partition("?")[0]
        if path != "/recognize":
            raise _Refused(HTTPStatus.NOT_FOUND, "not_found", f"{path}: not found")
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
            # Many clients read the response only after sending the whole body.
            left = int(length) if int(length) <= MAX_DROPPED_BYTES else 0
            while left and (data := self.rfile.read(min(left, 1 << 16))):
                left -= len(data)
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large",
                f"{int(length):,} bytes: the limit is {most:,}",
            )  # fmt: skip
        return self.rfile.read(int(length))

    def _refuse(self, refused: _Refused) -> None:
        self._send_json(refused.status, {"error": {"code": refused.code, "message": str(refused)}})

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content, ensure_ascii=False).encode())

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
        """Does nothing: requests are not logged."""


def _draw(data: bytes) -> np.ndarray:
    """Returns the bitmap of strokes given as JSON."""
    try:
        drawn = strokes.parse_strokes(json.loads(data))
    except InputError as error:
        raise _Refused(HTTPStatus.BAD_REQUEST, "bad_strokes", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _Refused(HTTPStatus.BAD_REQUEST, "bad_json", f"not JSON: {error}") from error
    if not drawn:
        raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "empty", "nothing is drawn")
    return strokes.rasterize(drawn)


def _to_bitmap(data: bytes) -> np.ndarray:
    """Returns the bitmap of a picture file."""
    try:
        grey, record, _ = next(files.read_pictures(io.BytesIO(data), "picture"))
        if record is not None:
            raise InputError("picture: a GNT file: hccr predict reads it")
    except InputError as error:
        raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "bad_picture", str(error)) from error
    try:
        return ink.to_bitmap(grey, "picture")
    except InputError as error:
        raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "empty", str(error)) from error
