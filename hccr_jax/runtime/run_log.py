"""The log of a run: metrics.jsonl, TensorBoard events and the progress bar."""

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


class RunLog:
    """Logs rows of metrics to a workdir and a progress bar, in the primary process only.

    A context manager.
    """

    def __init__(self, workdir: Path, first_step: int, total_steps: int) -> None:
        """Opens the files for appending.

        Args:
          workdir: of metrics.jsonl and TensorBoard's event file.
          first_step, total_steps: start and end of the progress bar.
        """
        self._file = None
        if not distributed.is_primary():
            return
        self._file = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(workdir), flush_secs=30)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", smoothing=0.1)
        self._shown: dict[str, str] = {}

    def write(self, step: int, row: dict[str, float]) -> None:
        """Writes one row and advances the bar to its step.

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
            # If nothing more can be written, `write` has reported it already.
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                self._events.close()
                self._file.close()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Returns the logged values of each step, in the order of the steps.

    Args:
      path: a `metrics.jsonl`: one JSON object a line, each with an integer `step`. A resumed run
        repeats steps; the last value written counts.
    """
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            # A run that is killed while writing leaves half a line.
            logging.warning("%s: line %d is not a logged step; skipped", path, number)
    return dict(sorted(rows.items()))
