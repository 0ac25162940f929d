"""Runs independent tasks on all cores, in worker processes."""

import collections
import concurrent.futures.process
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]

_POLL_SECONDS = 0.2
_counter: Any = None


class WorkerPool:
    """Processes on all cores, as a context manager; leaving it cancels the tasks not begun."""

    def __init__(self, processes: int | None = None) -> None:
        """Creates the pool, of one process a core by default."""
        # Inherited by the workers: with one a core, NumPy's own threads would compete for cores.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # Threads of jax or of the record reader do not survive a fork, hence spawn.
        context = multiprocessing.get_context("spawn")
        self._counter = context.Value("q", 0)
        self._pool = concurrent.futures.ProcessPoolExecutor(
            processes or cpu_count(), context, initializer=_start, initargs=(self._counter,)
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
          function: a module-level function; reports its progress by `advance(n)`, in any steps.
          tasks: picklable arguments, one call each.
          total: the sum of all steps.
          description: the title of the progress bar.
          unit: of the steps, for the rate.

        Raises:
          ChildProcessError: a worker was killed.
          Exception: that of the first task to fail.
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

    def stream(self, function: Callable[..., Result], tasks: Iterable[tuple]) -> Iterator[Result]:
        """Yields `function(*task)` for each task in order, with few results waiting in memory."""
        pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        for task in tasks:
            pending.append(self._pool.submit(function, *task))
            if len(pending) > 2 * cpu_count():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    @staticmethod
    def _check(future: concurrent.futures.Future[Any]) -> None:
        try:
            future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died, most likely for lack of memory: free some, or use fewer "
                "cores (taskset), and run again"
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
    """Ends this worker when its parent is killed: otherwise it would go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
