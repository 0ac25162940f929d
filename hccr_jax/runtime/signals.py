"""Signals: a run saves and ends, or ends at once if there is nothing to save."""

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

StopRequested = Callable[[], bool]


class _Watch:
    """The number of signals received, and whether `saving` handles them."""

    def __init__(self) -> None:
        self.received = 0
        self.saves = False
        self.lock = threading.Lock()


_watch: _Watch | None = None


class Stopped(Exception):
    """Work was abandoned because the process is to end."""


def install() -> None:
    """Makes SIGTERM and SIGINT end the process with code 143, at once except during `saving`.

    A thread receives them through a wake-up descriptor, because the main thread may be compiling in
    C++ for minutes. A signal ignored by the parent stays ignored. To be called by the main thread.
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
def saving() -> Iterator[StopRequested]:
    """Yields a function that returns whether a stop is requested, which the body then carries out.

    A second signal ends the process at once. Without `install` no stop is ever requested.
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

    Reading a truncated file that is mapped into memory causes one. Python's own handlers would
    never run then, since the read is repeated for ever.
    """
    cause = "a file mapped into memory was cut short, or its disk failed"
    text = f"\nbus error: {cause}: {remedy}\n"

    @_HANDLER
    def end(number: int) -> None:
        faulthandler.dump_traceback()
        os.write(2, text.encode())
        os._exit(1)

    _kept.append(end)
    ctypes.CDLL(None).signal(signal.SIGBUS, end)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_kept: list[object] = []  # referenced from C, so never to be freed


def _listen(receiver: socket.socket, sender: socket.socket, watch: _Watch) -> None:
    """Handles each signal, in a thread of its own."""
    while True:
        for number in receiver.recv(16):
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            with watch.lock:
                watch.received += 1
                if watch.saves and watch.received == 1:
                    _report("stopping: saving first; a second signal stops at once")
                    continue
            _report("stopped")
            os._exit(EXIT_CODE)


def _report(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
