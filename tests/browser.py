"""A headless Chromium, driven through the pipe of its DevTools protocol."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class Browser:
    """One page of a browser."""

    def __init__(self, sender: int, receiver: int) -> None:
        self._sender, self._receiver = sender, os.fdopen(receiver, "rb", buffering=0)
        self._rest, self._number, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": session["sessionId"]}

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the result of a protocol method; events are ignored."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | self._session
        os.write(self._sender, json.dumps(message).encode() + b"\0")
        while True:
            reply = json.loads(self._read())
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    def close(self) -> None:
        """Closes the browser."""
        self._session = {}
        self.call("Browser.close")
        os.close(self._sender)
        self._receiver.close()

    def _read(self) -> bytes:
        while b"\0" not in self._rest:
            data = self._receiver.read(1 << 20)
            assert data, "the browser ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return message

    def open(self, url: str, width: int = 1000, height: int = 760, scale: float = 1.0) -> None:
        """Opens a page on a screen of the given size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=width < 600,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """Returns the value of an expression, after awaiting it."""
        reply = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30) -> Any:
        """Returns the value of an expression as soon as it is truthy."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} stayed {value!r}"
            time.sleep(0.05)
        return value

    def draw(self, strokes: Sequence[Sequence[Sequence[float]]], side: float = 1000.0) -> None:
        """Draws strokes with the mouse; `side` is the canvas side in their units."""
        for stroke in strokes:
            points = self._to_page(stroke, side)
            self._mouse("mousePressed", points[0], 1)
            for point in points[1:]:
                self._mouse("mouseMoved", point, 1)
            self._mouse("mouseReleased", points[-1], 0)

    def touch(self, stroke: Sequence[Sequence[float]], side: float = 1000.0) -> None:
        """Draws a stroke with a finger."""
        kinds = ["touchStart", *["touchMove"] * (len(stroke) - 1)]
        for kind, (x, y) in zip(kinds, self._to_page(stroke, side), strict=True):
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _to_page(self, stroke: Sequence[Sequence[float]], side: float) -> list[list[float]]:
        box = self.evaluate("(b => [b.left, b.top, b.width])(canvas.getBoundingClientRect())")
        return [[box[axis] + p[axis] * box[2] / side for axis in (0, 1)] for p in stroke]

    def _mouse(self, kind: str, point: Sequence[float], buttons: int) -> None:
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=point[0], y=point[1], button="left",
            buttons=buttons, clickCount=1,
        )  # fmt: skip


@contextlib.contextmanager
def browse(chromium: str, folder: Path) -> Iterator[Browser]:
    """Yields a browser whose profile is in a folder."""
    (command_read, command_write), (reply_read, reply_write) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{command_read} 4>&{reply_write}', "_", chromium,
         "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={folder}",
         "--lang=en", "about:blank"],
        pass_fds=(command_read, reply_write), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(command_read)
    os.close(reply_write)
    browser = Browser(command_write, reply_read)
    try:
        yield browser
    finally:
        browser.close()
        process.wait(timeout=30)
