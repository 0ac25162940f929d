"""Runs independent tasks on all cores, in worker processes, under a progress bar."""

import concurrent.futures.process
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]

_POLL_SECONDS = 0.2
_counter: Any = None


class WorkerPool:
    """Processes on all cores, as a context manager; leaving it drops what has not begun."""

    def __init__(self) -> None:
        # Workers inherit it: with one a core, NumPy's own threads would wait for one another.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # Threads of jax or of the record reader do not survive a fork, so the pool spawns.
        context = multiprocessing.get_context("spawn")
        self._counter = context.Value("q", 0)
        self._pool = concurrent.futures.ProcessPoolExecutor(
            cpu_count(), context, initializer=_start, initargs=(self._counter,)
        )

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(
        self,
        function: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        total: int,
        description: str,
        unit: str,
    ) -> list[Result]:
        """Returns `[function(task, advance) for task in tasks]`, under a progress bar.

        Args:
          function: a module-level function; calls `advance(n)` as it gets on, in any steps.
          tasks: picklable arguments, one call each.
          total: what all the steps add up to.
          description: stands before the progress bar.
          unit: what a step counts, for the rate.

        Raises:
          ChildProcessError: a worker was killed.
          Exception: whatever the first task to fail raised.
        """
        start = self._counter.value
        futures = [self._pool.submit(_call, function, task) for task in tasks]
        pending = set(futures)
        with tqdm.tqdm(
            total=total, desc=description, unit=unit, unit_scale=True, mininterval=0.5
        ) as bar:
            while pending:
                done, pending = concurrent.futures.wait(pending, timeout=_POLL_SECONDS)
                for future in done:
                    self._check(future)
                bar.update(self._counter.value - start - bar.n)
        return [future.result() for future in futures]

    @staticmethod
    def _check(future: concurrent.futures.Future[Any]) -> None:
        try:
            future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died, most likely killed for want of memory: free some, or use "
                "fewer cores (taskset), and run this again"
            ) from error


def cpu_count() -> int:
    """Returns the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _call(function: Callable[[Task, Advance], Result], task: Task) -> Result:
    return function(task, _advance)


def _advance(amount: int) -> None:
    with _counter.get_lock():
        _counter.value += amount


def _start(counter: Any) -> None:
    global _counter
    _counter = counter
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this worker when its parent is killed: nobody else would tell it to stop writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
