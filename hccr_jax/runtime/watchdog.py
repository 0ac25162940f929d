"""Ends a process that is stuck, and says where, and which of several processes is late."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

SLOW = 10.0  # times as long may take what happens once: compiling, evaluating, saving
ANSWER_SECONDS = 3.0
_KEYS = "hccr_jax/progress"


class _Watch:
    """A thread that looks whether `beat` is called in time; another tells the other processes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.count, self.doing = 0, "starting"
        self.began = time.monotonic()
        self.deadline = self.began + SLOW * seconds
        self.poll = min(1.0, seconds / 4)
        self.ended = threading.Event()
        targets = [self._look]
        if jax.process_count() > 1:
            targets.append(self._tell)
        for target in targets:
            threading.Thread(target=target, daemon=True).start()

    def beat(self, doing: str, factor: float) -> None:
        now = time.monotonic()
        self.count, self.doing, self.began = self.count + 1, doing, now
        self.deadline = now + factor * self.seconds

    def _look(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(self.poll):
            now = time.monotonic()
            if now - before > 2 * self.poll + 1.0:  # the whole process stood still
                self.deadline += now - before
            before = now
            if now > self.deadline:
                self._end(now - self.began)

    def _end(self, seconds: float) -> None:
        sys.stderr.write(f"\nstuck: {self.doing} for {seconds:.0f} s; all threads:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback()
        if jax.process_count() > 1:
            ask = threading.Thread(target=self._name_the_late, daemon=True)
            ask.start()
            ask.join(ANSWER_SECONDS)
            if ask.is_alive():
                sys.stderr.write("late: process 0, which does not answer\n")
            elif jax.process_index() == 0:
                time.sleep(ANSWER_SECONDS)  # the others ask it
        sys.stderr.write("stopped: a resume goes on from the last checkpoint\n")
        sys.stderr.flush()
        os._exit(1)

    def _tell(self) -> None:
        """Writes this process's progress where the others find it."""
        client = _store()
        while not self.ended.wait(self.poll):
            said: dict[str, Any] = {"count": self.count, "doing": self.doing, "time": time.time()}
            said["name"] = f"process {jax.process_index()} ({socket.gethostname()}, {os.getpid()})"
            said["where"] = _where_main_is()
            try:
                key = f"{_KEYS}/{jax.process_index()}"
                client.key_value_set(key, json.dumps(said), allow_overwrite=True)
            except RuntimeError:  # process 0 is gone, which ends this one too
                return

    def _name_the_late(self) -> None:
        answers = _store().key_value_dir_get(_KEYS)
        heard = [json.loads(text) for _, text in answers]
        newest = max(said["time"] for said in heard)
        silent = [said for said in heard if newest - said["time"] > 2 * self.poll + 1.0]
        behind = min(said["count"] for said in heard)
        ahead = max(said["count"] for said in heard)
        late = silent or [said for said in heard if said["count"] == behind < ahead]
        for said in late or heard:
            title = "late" if late else "at the same point"
            ago = f", last heard of {newest - said['time']:.0f} s ago" if silent else ""
            text = f"{title}: {said['name']}: {said['doing']}, in {said['where']}{ago}\n"
            sys.stderr.write(text)
        sys.stderr.flush()


def _where_main_is() -> str:
    """Returns the function and line that the main thread is in."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _store() -> Any:
    """Returns the key-value store that all processes share, for which JAX has no public face."""
    return distributed.global_state.client


_watch: _Watch | None = None


@contextlib.contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Watches this process; `beat` is to be called in time.

    A process that is stopped as a whole and goes on later is not taken for stuck.

    Args:
      seconds: that a step may take, and a tenth of what a single long piece of work may take; 0
        for no watch.
    """
    global _watch
    _watch = _Watch(seconds) if seconds > 0 else None
    try:
        yield
    finally:
        if _watch:
            _watch.ended.set()
        _watch = None


def beat(doing: str, factor: float = 1.0) -> None:
    """Says that the process gets on, with what, and that this may take `factor` × the seconds."""
    if _watch:
        _watch.beat(doing, factor)
