"""Rejection: fits a rejector to a network and scores it on negatives."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hccr_jax.data import splits, store
from hccr_jax.data.casia import charset
from hccr_jax.data.images.normalize import normalize
from hccr_jax.evaluation import negatives
from hccr_jax.evaluation.distortions import Source
from hccr_jax.inference.rejector import Rejector
from hccr_jax.metrics.ranking import auroc
from hccr_jax.report import plots
from hccr_jax.runtime import distributed

SEED = 5000  # of all negatives, the same for every network
ALPHA = 0.05  # the share of sound characters that the scores reject
TIMES_CROSSED_OUT = 2  # each character that the rejector is fitted to

FIT_SYMBOLS, NEW_SYMBOLS = (list(negatives.SYMBOLS)[start::2] for start in (0, 1))

# read(images uint8 (N, S, S)) -> (traits (N, D), the probability of the best class (N,))
Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def evaluate_rejection(
    read: Read,
    validation: Source,
    test: Source,
    classes: Sequence[str],
    is_right: np.ndarray,
    num_images: int,
    workdir: Path,
) -> tuple[dict[str, Any], Rejector]:
    """Fits a rejector to validation writers and tests it on three sets of negatives.

    Args:
      read: computes traits and confidences of images in normal form.
      validation: characters that the network was not trained on.
      test: of other writers.
      classes: of the network.
      is_right: bool (N,), whether its prediction for each test character is right.
      num_images: of each set, at most.
      workdir: gets plots/rejection.png.

    Returns:
      (results, rejector). The results hold `images`, the numbers of characters to fit and to test;
      `sound_rejected`, the share of sound ones whose p-value is at most `ALPHA`; and for each of
      `crossed_out`, `unknown` and `scrawl`: `auroc` against the sound ones, `auroc_of_probability`
      that of the best class's probability alone, `rejected`, and `kinds`, the AUROC of each; for
      crossed-out ones also `new_kinds`, that of a rejector fitted without the kind.
    """
    rejector, fitted_without, num_fit = _fit(read, validation, num_images)
    rows = splits.rows_spread(len(is_right), num_images)
    bitmaps = _bitmaps(test, rows)
    traits, confidence = read(_forms(bitmaps, test))
    scores = rejector.scores(traits)
    others = sorted(set(charset.level1()) - set(classes))
    drawn = {
        "crossed_out": negatives.crossed_out(bitmaps, [SEED, 10]),
        "unknown": negatives.unknown(len(bitmaps), [SEED, 11], NEW_SYMBOLS, others),
        "scrawl": negatives.scrawls(len(bitmaps), [SEED, 12]),
    }
    results: dict[str, Any] = {
        "images": {"fit": num_fit, "test": len(rows)},
        "sound_rejected": float((rejector.p_values(scores) <= ALPHA).mean()),
    }
    negative_scores = {}
    for name, (spoilt, kinds) in drawn.items():
        spoilt_traits, spoilt_confidence = read(_forms(spoilt, test))
        negative_scores[name] = rejector.scores(spoilt_traits)
        results[name] = {
            "auroc": auroc(scores, negative_scores[name]),
            "auroc_of_probability": auroc(confidence, spoilt_confidence),
            "rejected": float((rejector.p_values(negative_scores[name]) <= ALPHA).mean()),
            "kinds": _auroc_by_kind(scores, negative_scores[name], kinds),
        }
        if name == "crossed_out":
            results[name]["new_kinds"] = {
                kind: auroc(other.scores(traits), other.scores(spoilt_traits[kinds == kind]))
                for kind, other in fitted_without.items() if kind in kinds
            }  # fmt: skip
    if distributed.is_primary():
        plots.write_rejection(workdir, scores, is_right[rows], negative_scores)
    return results, rejector


def _auroc_by_kind(scores: np.ndarray, negative: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    return {str(kind): auroc(scores, negative[kinds == kind]) for kind in np.unique(kinds)}


def _fit(read: Read, source: Source, num_images: int) -> tuple[Rejector, dict[str, Rejector], int]:
    """Returns a rejector, one fitted without each kind of crossing out, and the number of images.

    The characters are crossed out more than once, each time in another manner.
    """
    counts = store.read_manifest(source.name, source.data_dir)["characters_per_split"]
    count = sum(counts[part] for part in source.split.split("+"))
    bitmaps = _bitmaps(source, splits.rows_spread(count, num_images))
    sound, _ = read(_forms(bitmaps, source))
    parts, kinds = [], []
    for spoilt, drawn in (
        *(negatives.crossed_out(bitmaps, [SEED, number]) for number in range(TIMES_CROSSED_OUT)),
        negatives.unknown(-(-len(bitmaps) // 2), [SEED, 8], FIT_SYMBOLS),
        negatives.scrawls(-(-len(bitmaps) // 2), [SEED, 9]),
    ):
        parts.append(read(_forms(spoilt, source))[0])
        kinds.append(drawn)
    crossed, kind = np.concatenate(parts), np.concatenate(kinds)
    without = {k: Rejector.fit(sound, crossed[kind != k]) for k in negatives.CROSSINGS}
    return Rejector.fit(sound, crossed), without, len(bitmaps)


def _bitmaps(source: Source, rows: np.ndarray) -> list[np.ndarray]:
    return splits.load_bitmaps(source.name, source.data_dir, source.split, rows)


def _forms(bitmaps: Sequence[np.ndarray], source: Source) -> np.ndarray:
    form = source.image_px, source.margin_px, source.aspect
    return np.stack([normalize(bitmap, *form) for bitmap in bitmaps])
