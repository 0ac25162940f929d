"""The training characters that are most likely wrongly written, crossed out or wrongly labelled."""

import json
from pathlib import Path

import numpy as np

from hccr_jax.data.splits import Split
from hccr_jax.evaluation.evaluate import Predictions
from hccr_jax.report import image_grids


def write_label_errors(
    workdir: Path, predictions: Predictions, split: Split, count: int, step: int
) -> None:
    """Writes `suspects.json` and `plots/suspects.png`: the rows of the highest loss, worst first.

    Args:
      workdir: of the run.
      predictions: for every row of the split.
      split: the training split, with the labels that the network was trained on.
      count: the most rows to write.
      step: of the checkpoint.
    """
    worst = np.argsort(-predictions.losses, kind="stable")[:count]
    rows = [
        {
            "row": int(row),
            "source": str(split.sources[row]),
            "record": int(split.record_numbers[row]),
            "writer": str(split.writers[row]),
            "label": split.classes[split.labels[row]],
            "prediction": split.classes[predictions.candidates[row, 0]],
            "label_probability": float(np.exp(-predictions.losses[row], dtype=np.float64)),
            "prediction_probability": float(predictions.probabilities[row, 0]),
            "loss": float(predictions.losses[row]),
        }
        for row in worst
    ]
    content = {"step": step, "characters": len(split.labels), "suspects": rows}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (workdir / "suspects.json").write_text(text + "\n", "utf-8")
    image_grids.write_label_errors(
        workdir,
        split.images[worst],
        split.labels[worst],
        predictions.candidates[worst, 0],
        predictions.probabilities[worst, 0],
        split.classes,
        title=f"The {len(worst)} most suspicious of {len(split.labels):,}: label → prediction",
    )
