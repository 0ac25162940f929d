"""The training characters that are most likely wrongly written, crossed out or wrongly labelled."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hccr_jax import sheets
from hccr_jax.data.splits import Split
from hccr_jax.evaluate import Evaluation


def write_suspects(workdir: Path, answers: Evaluation, split: Split, count: int, step: int) -> None:
    """Writes `suspects.json` and `plots/suspects.png`: the rows of the highest loss, worst first.

    Args:
      workdir: of the run.
      answers: the network's, to every row of the split.
      split: the training split, with the labels that the network was trained on.
      count: the most rows to write.
      step: of the checkpoint.
    """
    worst = np.argsort(-answers.losses, kind="stable")[:count]
    rows = [
        {
            "row": int(row),
            "source": str(split.sources[row]),
            "record": int(split.record_numbers[row]),
            "writer": str(split.writers[row]),
            "label": split.classes[split.labels[row]],
            "prediction": split.classes[answers.candidates[row, 0]],
            "label_probability": float(np.exp(-answers.losses[row], dtype=np.float64)),
            "prediction_probability": float(answers.probabilities[row, 0]),
            "loss": float(answers.losses[row]),
        }
        for row in worst
    ]
    content = {"step": step, "characters": len(split.labels), "suspects": rows}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (workdir / "suspects.json").write_text(text + "\n", "utf-8")
    sheets.write_suspects(
        workdir,
        split.images[worst],
        split.labels[worst],
        answers.candidates[worst, 0],
        answers.probabilities[worst, 0],
        split.classes,
        title=f"The {len(worst)} most suspicious of {len(split.labels):,}: label → answer",
    )


def detection(losses: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """Returns how well the loss tells wrong labels from right ones.

    Args:
      losses: float (N,).
      wrong: bool (N,), which labels are known to be wrong; some are and some are not.

    Returns:
      `count` of wrong labels; `auroc`, the probability that a wrong label has a higher loss than a
      right one; `found`, the share of wrong labels among as many rows of the highest loss, which
      is precision and recall at once.

    >>> detection(np.array([3.0, 0.1, 2.0, 0.2]), np.array([True, False, False, True]))
    {'count': 2, 'auroc': 0.75, 'found': 0.5}
    """
    count = int(wrong.sum())
    right = np.sort(losses[~wrong])
    below = [np.searchsorted(right, losses[wrong], side) for side in ("left", "right")]
    worst = np.argsort(-losses, kind="stable")[:count]
    return {
        "count": count,
        "auroc": float(np.mean(below) / len(right)),  # a tie counts half
        "found": float(wrong[worst].mean()),
    }
