"""The log of training steps: metrics are read from the devices only when a row is due."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from hccr_jax.data.epoch_order import batch_rows
from hccr_jax.runtime import distributed
from hccr_jax.runtime.run_log import RunLog
from hccr_jax.runtime.workdir import replace_text
from hccr_jax.train.setup import TrainingSetup
from hccr_jax.train.step import NEVER


class StepLog:
    """The steps since the last row: their metrics, still on the devices, and the time they took."""

    def __init__(self, setup: TrainingSetup, workdir: Path, writer: RunLog, step: int) -> None:
        """Starts at a step; the arguments are those of the run."""
        self._setup, self._workdir, self._writer = setup, workdir, writer
        self._unread_metrics: list[dict[str, jax.Array]] = []
        self._logged_step = step
        self.start_clock()

    def start_clock(self) -> None:
        """Starts to time the steps to come."""
        self._clock = time.monotonic()

    @contextlib.contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Leaves the time of its body out."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def add(self, metric_sums: dict[str, jax.Array]) -> None:
        """Adds the metrics of a chunk; waits for those of the one before.

        So the host is one chunk ahead of the devices, no more.
        """
        jax.block_until_ready(self._unread_metrics[-1:])
        self._unread_metrics.append(metric_sums)

    def write(self, step: int) -> None:
        """Writes the row of a step, the last of those added.

        Raises:
          FloatingPointError: a number of one of them was not finite, and may not be.
        """
        setup, num_steps = self._setup, step - self._logged_step
        row = mean_metrics(self._unread_metrics, num_steps)
        check_finite(setup, self._workdir, row, step)
        now = time.monotonic()
        seconds = now - self._clock
        row["images_per_second"] = num_steps * setup.config.batch_size / seconds
        row["train/seconds"] = seconds
        row["learning_rate"] = float(setup.schedule(step - 1))
        self._unread_metrics, self._logged_step, self._clock = [], step, now
        self._writer.write(step, row)


def mean_metrics(metric_sums: list[dict[str, jax.Array]], num_steps: int) -> dict[str, float]:
    """Returns the mean of each metric over the steps that were not skipped.

    Args:
      metric_sums: of each chunk, see `step.make_train_chunk`.
      num_steps: of all chunks.

    Returns:
      the means, and `skipped_batches` and `first_bad` (see `step.guard_finite`) if some were not
      finite.
    """
    rows = jax.device_get(metric_sums)
    counted = num_steps - sum(float(row["skipped"]) for row in rows)
    means = {
        f"train/{name}": sum(float(row[name]) for row in rows) / max(counted, 1.0)
        for name in ("loss", "accuracy", "gradient_norm")
    }
    first_bad = min(int(row["first_bad"]) for row in rows)
    if first_bad < NEVER:
        means |= {"skipped_batches": num_steps - counted, "first_bad": first_bad}
    return means


def check_finite(setup: TrainingSetup, workdir: Path, row: dict[str, float], step: int) -> None:
    """Checks that the numbers of all steps of a row were finite, or may be skipped.

    Args:
      row: from `mean_metrics`; `first_bad` is removed, since it is not to be logged.
      step: that the run is at.

    Raises:
      FloatingPointError: names the step; workdir/non_finite.json lists its records.
    """
    if "first_bad" not in row:
        return
    bad = int(row.pop("first_bad"))
    if distributed.is_primary():
        split, config = setup.train, setup.config
        records = [
            {
                "character": split.classes[split.labels[row]],
                "writer": str(split.writers[row]),
                "source": str(split.sources[row]),
                "record": int(split.record_numbers[row]),
            }
            for row in batch_rows(config.seed, bad, config.batch_size, len(split.labels))
        ]
        text = json.dumps({"step": bad + 1, "records": records}, ensure_ascii=False, indent=1)
        replace_text(workdir / "non_finite.json", text + "\n")
    if setup.config.skip_non_finite and any(row[key] for key in row if key != "skipped_batches"):
        return
    raise FloatingPointError(
        f"step {bad + 1:,}: the loss or its gradient is not finite (found at step {step:,}; the "
        f"step's records: {workdir / 'non_finite.json'}); nothing is saved from there on: resume "
        f"with a lower learning rate, --config.optimizer.clip_norm=1 or "
        f"--config.skip_non_finite=True"
    )
