"""Signals: a run saves and leaves, or leaves at once where there is nothing to save."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

EXIT_CODE = 143

Asked = Callable[[], bool]


class _Watch:
    """What has come, and whether someone will see to it."""

    def __init__(self) -> None:
        self.received = 0
        self.saves = False
        self.lock = threading.Lock()


_watch: _Watch | None = None


class Stopped(Exception):
    """Work was given up because the process is to end."""


def install() -> None:
    """Makes SIGTERM and SIGINT end the process with code 143, at once but for `saving`.

    At once even where the interpreter itself would not hear of it for long, as while XLA compiles.
    A signal that the parent had ignored stays so. To be called by the main thread.
    """
    global _watch
    if _watch is not None:
        return
    _watch = _Watch()
    receiver, sender = socket.socketpair()
    for end in (receiver, sender):
        end.setblocking(end is receiver)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(receiver, sender, _watch), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


@contextlib.contextmanager
def saving() -> Iterator[Asked]:
    """Yields a function that tells whether the process is to end, which it then leaves to the body.

    A second signal ends it at once all the same. Without `install` nothing is ever asked.
    """
    watch = _watch or _Watch()
    with watch.lock:
        watch.saves = True
    try:
        yield lambda: watch.received > 0
    finally:
        with watch.lock:
            watch.saves = False
    if watch.received:
        sys.exit(EXIT_CODE)


def explain_bus_errors(remedy: str) -> None:
    """Makes a bus error end the process with code 1, the stacks of all threads and a remedy.

    A file that is mapped into memory and was cut short gives one where it is read. Python's own
    handlers never run then, since the read is tried again for ever.
    """
    cause = "a file that is mapped into memory was cut short, or its disk failed"
    text = f"\nbus error: {cause}: {remedy}\n"

    @_HANDLER
    def end(number: int) -> None:
        faulthandler.dump_traceback()
        os.write(2, text.encode())
        os._exit(1)

    _kept.append(end)
    ctypes.CDLL(None).signal(signal.SIGBUS, end)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_kept: list[object] = []  # what C code may call must not go


def _listen(receiver: socket.socket, sender: socket.socket, watch: _Watch) -> None:
    """Sees to each signal; a thread of its own, since the main one may be busy in C++."""
    while True:
        for number in receiver.recv(16):
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            with watch.lock:
                watch.received += 1
                if watch.saves and watch.received == 1:
                    _say("stopping: saving first; a second signal stops at once")
                    continue
            _say("stopped")
            os._exit(EXIT_CODE)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
