"""What a run says about itself while it runs: metrics.jsonl, TensorBoard and the progress bar."""

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import Self

import tensorboardX
from absl import logging
from tqdm import tqdm

from hccr_jax.runtime import distributed

TITLES = {"train/loss": "loss", "train/accuracy": "accuracy", "eval/top1": "validation"}


class MetricsWriter:
    """Writes rows of metrics to a workdir and shows them, by the first of several processes.

    A context manager.
    """

    def __init__(self, workdir: Path, first_step: int, total_steps: int) -> None:
        """Opens the files, to append.

        Args:
          workdir: gets metrics.jsonl and TensorBoard's event file.
          first_step, total_steps: where the progress bar starts and ends.
        """
        self._file = None
        if not distributed.is_primary():
            return
        self._file = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(workdir), flush_secs=30)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", smoothing=0.1)
        self._shown: dict[str, str] = {}

    def write(self, step: int, row: dict[str, float]) -> None:
        """Writes one row and moves the bar to its step.

        Raises:
          OSError: names the file.
        """
        if not self._file:
            return
        try:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._file.name}: could not be written: {error.strerror}") from error
        for name, value in row.items():
            self._events.add_scalar(name, value, step)
        self._shown.update({TITLES[k]: f"{v:.3f}" for k, v in row.items() if k in TITLES})
        if "images_per_second" in row:
            self._shown["images/s"] = f"{row['images_per_second']:.0f}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file:
            self._bar.close()
            # Where nothing more can be written, the first failure has been told.
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                self._events.close()
                self._file.close()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Returns the logged values of each step, in the order of the steps.

    Args:
      path: a `metrics.jsonl`: one JSON object a line, each with an integer `step`. A resumed run
        repeats steps; the value written last wins.
    """
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            # A run that was killed while it wrote leaves half a line; the rest is still good.
            logging.warning("%s: line %d is not a logged step; left out", path, number)
    return dict(sorted(rows.items()))
