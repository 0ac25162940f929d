"""Timing of several functions in turn."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

# run(n) makes n calls of the timed function and waits for the last.
Run = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Something to time.

    Attributes:
      run: run(n) makes n calls and waits for the last; None where `rates` are given.
      images: of one call.
      compile_seconds: of tracing and compiling; None where nothing is compiled.
      memory_mib: a device's memory that the compiled program needs, its arguments included.
      roofline: images a second at most, see `roofline.py`; None where there is no such limit.
      levels: the same in training at each level of fusion.
      rates: images a second, one a repeat, of a workload that times itself.
      of_step: its speed over that of the augmented step alone, timed just before.
      in_steps: whether it works batch by batch.
    """

    run: Run | None
    images: int
    compile_seconds: float | None = None
    memory_mib: float | None = None
    roofline: float | None = None
    levels: dict[str, float] | None = None
    rates: list[float] = dataclasses.field(default_factory=list)
    of_step: list[float] = dataclasses.field(default_factory=list)
    in_steps: bool = True


def repeated(call: Callable[[], Any], wait: Callable[[Any], Any] = lambda result: None) -> Run:
    """Returns run(n): n times `call`, then `wait` for the last result."""

    def run(count: int) -> None:
        result = None
        for _ in range(count):
            result = call()
        wait(result)

    return run


def measure(runs: Mapping[str, Run], seconds: float, repeats: int) -> dict[str, list[float]]:
    """Returns calls a second of each run, one figure a repeat.

    The runs take turns within a repeat, so that a drift of the machine's speed affects them all.
    How many calls make a repeat is found before, which is also the warm-up; but one-time work of a
    first call, such as compiling, must already be done.

    Args:
      runs: by name.
      seconds: how long a repeat lasts at least, by the speed of the warm-up.
      repeats: figures of each run.
    """
    counts = {name: _calls_that_last(run, seconds) for name, run in runs.items()}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            rates[name].append(counts[name] / _elapsed(run, counts[name]))
    return rates


def _calls_that_last(run: Run, seconds: float) -> int:
    count = 1
    while (elapsed := _elapsed(run, count)) < seconds:
        growth = min(10.0, 1.1 * seconds / max(elapsed, 1e-9))
        count = math.ceil(count * growth)
    return count


def _elapsed(run: Run, count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start
