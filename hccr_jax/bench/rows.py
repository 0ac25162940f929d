"""Rows of the benchmark: workloads timed in turn; a failure gets a row of its own."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from hccr_jax.bench.timing import Workload, measure

Row = dict[str, Any]


def time_in_turn(
    makers: Mapping[str, Callable[[], Workload]], *, batch_size: int, seconds: float, repeats: int,
    deadline: float,
) -> list[Row]:  # fmt: skip
    """Returns one row for each workload.

    Args:
      makers: create the workloads, by the names of their rows. The first is ours, the others are
        the baseline's, named "…_MODE".
      batch_size: images a step.
      seconds, repeats: as in `timing.measure`.
      deadline: of the monotonic clock; a workload not started by then gets a row with an error.
    """
    ours = next(iter(makers))
    ready: dict[str, Workload] = {}
    failed: dict[str, str] = {}
    for label, make in makers.items():
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("skipped: out of time")
            workload = make()
            if workload.run:
                workload.run(1)  # work of a first call only is not measured
            ready[label] = workload
        except Exception as error:
            expected = isinstance(error, TimeoutError) or _is_out_of_memory(error)
            if label == ours and not expected:
                raise  # the baseline's compiler may fail in any way, our own code may not
            failed[label] = reason(error)
    runs = {label: workload.run for label, workload in ready.items() if workload.run}
    try:
        calls = measure(runs, seconds, repeats)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        failed, ready = dict.fromkeys(makers, reason(error)), {}
    rates = {
        label: workload.rates or [rate * workload.images for rate in calls[label]]
        for label, workload in ready.items()
    }
    limit = ready[ours].roofline if ours in ready else None
    rows = {label: _columns(ready[label], rates[label], batch_size, limit) for label in ready}
    baselines = [label for label in ready if label != ours]
    if baselines and ours in rows:
        best = max(baselines, key=lambda label: rows[label]["images_per_second"])
        pairs = zip(rates[ours], rates[best], strict=True)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        rows[ours] |= {"baseline": best.rpartition("_")[2], "ratio": round(ratio, 3)}
    return [
        {"row": label, **(rows[label] if label in rows else {"error": failed[label]})}
        for label in makers
    ]


def spread(rates: list[float]) -> Row:
    """Returns the columns of some rates in images a second, one a repeat."""
    return {
        "images_per_second": round(statistics.median(rates), 1),
        "min": round(min(rates), 1),
        "max": round(max(rates), 1),
        "repeats": len(rates),
    }


def _columns(workload: Workload, rates: list[float], batch_size: int, limit: float | None) -> Row:
    speed = statistics.median(rates)
    row: Row = spread(rates) | {
        "ms_per_step": round(1e3 * batch_size / speed, 3) if workload.in_steps else None,
        "compile_seconds": _rounded(workload.compile_seconds, 2),
        "peak_memory_mib": _rounded(workload.memory_mib, 1),
        "roofline_images_per_second": _rounded(limit, 1),
        "roofline_fraction": _rounded(speed / limit if limit else None, 4),
        "baseline": None,
        "ratio": None,
    }
    if workload.of_step:
        row["of_step"] = round(statistics.median(workload.of_step), 3)
    if workload.levels:
        row["roofline_levels"] = {level: round(rate, 1) for level, rate in workload.levels.items()}
    return row


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _is_out_of_memory(error: Exception) -> bool:
    signs = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def reason(error: Exception) -> str:
    """Returns the reason of a failure, in one line."""
    if _is_out_of_memory(error):
        return "out of memory"
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
