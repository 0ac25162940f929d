"""The paper's final test: accuracy on distorted images."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from hccr_jax.data.splits import Split
from hccr_jax.evaluation import distortions
from hccr_jax.evaluation.distortions import Source, distorted_images
from hccr_jax.evaluation.evaluate import Predictions, evaluate
from hccr_jax.inference.network import Network
from hccr_jax.report import image_grids, plots
from hccr_jax.runtime import distributed
from hccr_jax.runtime.worker_pool import WorkerPool

CURVE_IMAGES = 1000  # at each point, the same ones
ANGLES_DEG = list(range(-60, 61, 10))
ASPECT_FACTORS = [5 ** (power / 4) for power in range(-4, 5)]
PAIRS_SHOWN, FAILURES_SHOWN = 8, 6  # of each set


def evaluate_robustness(
    network: Network, split: Split, source: Source, num_images: int, workdir: Path
) -> dict[str, Any]:
    """Evaluates a network on the paper's three sets and along two curves, and draws samples.

    Args:
      network: with its trained parameters.
      split: to distort, in normal form.
      source: of the split's original bitmaps.
      num_images: in each set; 0, or more than there are: all. The first `CURVE_IMAGES` of them, or
        all where there are fewer, make every point of the curves.
      workdir: gets plots/robustness.png, robustness_sets.png and robustness_failures.png.

    Returns:
      `images` in each set; for `rotation`, `flip`, `resize` and `all` images of the three what
      `Predictions.summary` holds; `curves`, whose `rotation` and `aspect` hold lists: top-1 and
      top-5 by the angle (degrees, counter-clockwise) and by the factor on width over height.
    """
    num_records, results = len(split.labels), {}
    parts, pairs, failures = [], {}, {}
    with WorkerPool() as pool:
        for name, draws in distortions.draw_sets(num_records, num_images).items():
            distorted = _distorted(split, source, draws, pool, name)
            predictions = evaluate(network, distorted)
            results[name] = predictions.summary()
            parts.append(predictions)
            originals = split.images[draws["row"][:PAIRS_SHOWN]]
            pairs[name] = originals, distorted.images[:PAIRS_SHOWN], distorted.labels[:PAIRS_SHOWN]
            failures[name] = _failures(distorted.images, predictions)
        size = min(CURVE_IMAGES, results["rotation"]["count"])
        turned = distortions.draw_angles(num_records, size, ANGLES_DEG)
        stretched = distortions.draw_stretches(num_records, size, ASPECT_FACTORS)
        curves = {
            "images": size,
            "rotation": {
                "angle_deg": ANGLES_DEG,
                **_curve(network, split, source, turned, pool, "angles"),
            },
            "aspect": {
                "factor": ASPECT_FACTORS,
                **_curve(network, split, source, stretched, pool, "aspects"),
            },
        }
    if distributed.is_primary():
        plots.write_robustness(workdir, curves)
        image_grids.write_distorted_sheet(workdir, pairs, split.classes)
        image_grids.write_failures(workdir, failures, split.classes)
    together = (np.concatenate(arrays) for arrays in zip(*map(_arrays, parts), strict=True))
    results["all"] = Predictions(*together).summary()
    return {"images": results["rotation"]["count"], **results, "curves": curves}


def evaluate_paper_protocol(network: Network, split: Split, source: Source) -> dict[str, Any]:
    """Evaluates a network as the paper's authors did: on test images flipped and turned at random.

    Args:
      network, split, source: as for `evaluate_robustness`.

    Returns:
      What `Predictions.summary` holds, of every record once.
    """
    draws = distortions.draw_paper_protocol(len(split.labels))
    with WorkerPool() as pool:
        distorted = _distorted(split, source, draws, pool, "the paper's protocol")
        return evaluate(network, distorted).summary()


def _distorted(
    split: Split, source: Source, draws: np.ndarray, pool: WorkerPool, name: str
) -> Split:
    """Returns the drawn images as a split of their own."""
    rows = draws["row"]
    return dataclasses.replace(
        split,
        images=distorted_images(source, draws, pool, name),
        labels=split.labels[rows],
        writers=split.writers[rows],
        sources=split.sources[rows],
        record_numbers=split.record_numbers[rows],
    )


def _curve(
    network: Network, split: Split, source: Source, draws: np.ndarray, pool: WorkerPool, name: str
) -> dict[str, list[float]]:
    """Returns top-1 and top-5 of each row of the draws (points, images)."""
    predictions = evaluate(network, _distorted(split, source, draws.ravel(), pool, name))
    hits = predictions.candidates == predictions.labels[:, None]
    hits = hits.reshape(*draws.shape, -1)
    return {
        "top1": hits[..., 0].mean(axis=1).tolist(),
        "top5": hits.any(axis=2).mean(axis=1).tolist(),
    }


def _failures(images: np.ndarray, predictions: Predictions) -> image_grids.Failures:
    """Returns the mistakes of the highest confidence."""
    _, candidates, probabilities, labels = _arrays(predictions)
    wrong = image_grids.surest_mistakes(labels, candidates[:, 0], probabilities[:, 0])
    worst = wrong[:FAILURES_SHOWN]
    return image_grids.Failures(
        len(wrong), images[worst], labels[worst], candidates[worst], probabilities[worst]
    )


def _arrays(predictions: Predictions) -> tuple[np.ndarray, ...]:
    return tuple(getattr(predictions, field.name) for field in dataclasses.fields(predictions))
