"""Ends a process that is stuck, and reports where, and which of several processes is late.

A device that hangs is noticed too, because the host runs at most one call ahead of it.
"""

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

SLOW = 10.0  # factor of the time limit of single tasks: compiling, evaluating, saving
ANSWER_SECONDS = 3.0
_KEYS = "hccr_jax/progress"


class _Watch:
    """A thread that checks that `beat` is called in time; another publishes the progress."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.count, self.doing = 0, "starting"
        self.began = time.monotonic()
        self.deadline = self.began + SLOW * seconds
        self.poll = min(1.0, seconds / 4)
        self.ended = threading.Event()
        targets = [self._check]
        if jax.process_count() > 1:
            targets.append(self._publish)
        for target in targets:
            threading.Thread(target=target, daemon=True).start()

    def beat(self, doing: str, factor: float) -> None:
        now = time.monotonic()
        self.count, self.doing, self.began = self.count + 1, doing, now
        self.deadline = now + factor * self.seconds

    def _check(self) -> None:
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
            report = threading.Thread(target=self._report_late, daemon=True)
            report.start()
            report.join(ANSWER_SECONDS)
            if report.is_alive():
                sys.stderr.write("late: process 0, which does not answer\n")
            elif jax.process_index() == 0:
                time.sleep(ANSWER_SECONDS)  # the others query it
        sys.stderr.write("stopped: a resumed run continues from the last checkpoint\n")
        sys.stderr.flush()
        os._exit(1)

    def _publish(self) -> None:
        """Writes this process's progress to the store that all processes share."""
        client = _store()
        while not self.ended.wait(self.poll):
            progress: dict[str, Any] = {
                "count": self.count,
                "doing": self.doing,
                "time": time.time(),
            }
            progress["name"] = (
                f"process {jax.process_index()} ({socket.gethostname()}, {os.getpid()})"
            )
            progress["where"] = _where_main_is()
            try:
                key = f"{_KEYS}/{jax.process_index()}"
                client.key_value_set(key, json.dumps(progress), allow_overwrite=True)
            except RuntimeError:  # process 0 is gone, which ends this one too
                return

    def _report_late(self) -> None:
        """Prints the processes that are silent or behind the others, or all if there are none."""
        entries = _store().key_value_dir_get(_KEYS)
        processes = [json.loads(text) for _, text in entries]
        newest = max(process["time"] for process in processes)
        silent = [p for p in processes if newest - p["time"] > 2 * self.poll + 1.0]
        behind = min(process["count"] for process in processes)
        ahead = max(process["count"] for process in processes)
        late = silent or [p for p in processes if p["count"] == behind < ahead]
        for process in late or processes:
            title = "late" if late else "at the same point"
            ago = f", last heard of {newest - process['time']:.0f} s ago" if silent else ""
            text = f"{title}: {process['name']}: {process['doing']}, in {process['where']}{ago}\n"
            sys.stderr.write(text)
        sys.stderr.flush()


def _where_main_is() -> str:
    """Returns the function and line that the main thread is executing."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _store() -> Any:
    """Returns the key-value store that all processes share; JAX has no public API for it."""
    return distributed.global_state.client


_watch: _Watch | None = None


@contextlib.contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Watches this process, which must call `beat` in time.

    A process that is suspended and resumed is not considered stuck.

    Args:
      seconds: time limit of a step; ten times as long for single long tasks; 0 disables it.
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
    """Reports progress: what the process does next, which may take `factor` × the time limit."""
    if _watch:
        _watch.beat(doing, factor)
