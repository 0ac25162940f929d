"""Rejection of what is no properly written character of the class list.

A linear score on the network's features separates written characters from the same ones crossed
out; the rank of a score among those of properly written ("sound") characters is a p-value.

Sources: ridge regression onto ±1 is Fisher's discriminant, Hastie, Tibshirani and Friedman, "The
elements of statistical learning", 2009, exercise 4.2; left-one-out values in closed form, ibid.
section 7.10.1; conformal p-values, Bates, Candès, Lei, Romano and Sesia, "Testing for outliers with
conformal p-values", Annals of Statistics 51 (2023).
"""

import dataclasses
from typing import Any, Self

import numpy as np
from scipy.special import logsumexp

REJECTOR = "rejector.json"  # in the folder of a run
RIDGE = 0.03  # on weights of features of unit variance, the classes weighing ½ each
LEVELS = 1000  # quantiles that represent the scores of sound characters


@dataclasses.dataclass(frozen=True)
class Rejector:
    """A linear score and its distribution over sound characters.

    Attributes:
      weights: float64 (D,), of the traits (`to_traits`).
      offset: added to the weighted sum.
      sound: float64 (L,), quantiles of the scores of sound characters, each left out of the fit,
        ascending.
    """

    weights: np.ndarray
    offset: float
    sound: np.ndarray

    @classmethod
    def fit(cls, sound: np.ndarray, crossed_out: np.ndarray) -> Self:
        """Returns the rejector that separates two sets.

        Args:
          sound: float (N, D), traits of written characters, none of which trained the network.
          crossed_out: float (M, D), traits of what is to be rejected.
        """
        traits = np.concatenate([sound, crossed_out]).astype(np.float64)
        target = np.repeat([1.0, -1.0], [len(sound), len(crossed_out)])
        weight = np.repeat(
            [0.5 / len(sound), 0.5 / len(crossed_out)], [len(sound), len(crossed_out)]
        )
        mean, spread = traits.mean(axis=0), traits.std(axis=0) + 1e-6
        design = np.concatenate([(traits - mean) / spread, np.ones((len(traits), 1))], axis=1)
        penalty = np.append(np.full(design.shape[1] - 1, RIDGE), 0.0)
        matrix = (design * weight[:, None]).T @ design + np.diag(penalty)
        solved = np.linalg.solve(matrix, design.T)
        beta = solved @ (weight * target)
        leverage = weight * np.einsum("ij,ji->i", design, solved)
        left_out = target - (target - design @ beta) / (1.0 - leverage)
        weights = beta[:-1] / spread
        quantiles = np.quantile(left_out[: len(sound)], (np.arange(LEVELS) + 0.5) / LEVELS)
        return cls(weights, float(beta[-1] - mean @ weights), quantiles)

    def scores(self, traits: np.ndarray) -> np.ndarray:
        """Returns float64 (N,) of traits (N, D), higher for sound characters."""
        return np.asarray(traits, np.float64) @ self.weights + self.offset

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Returns the share of sound characters that score no higher, float64 (N,) in (0, 1].

        A share of α of the sound characters has a p-value of at most α.
        """
        return (1 + np.searchsorted(self.sound, scores, "right")) / (len(self.sound) + 1)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for `from_json`."""
        return {
            "weights": self.weights.tolist(), "offset": self.offset, "sound": self.sound.tolist()
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Returns the rejector of a JSON object.

        Raises:
          KeyError, TypeError, ValueError: it is not of `to_json`.
        """
        weights, sound = (np.array(value[key], np.float64) for key in ("weights", "sound"))
        if weights.ndim != 1 or sound.ndim != 1 or not len(sound):
            raise ValueError("weights and sound must be lists of numbers")
        return cls(weights, float(value["offset"]), sound)


def to_traits(logits: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Returns the inputs of the score: the features, the log-sum-exp of the logits, and the best.

    Args:
      logits: float (N, K).
      features: float (N, F), inputs of the last layer.

    Returns:
      float64 (N, F + 2).
    """
    logits = np.asarray(logits, np.float64)
    evidence, best = logsumexp(logits, axis=1), logits.max(axis=1)
    return np.concatenate([features, evidence[:, None], best[:, None]], axis=1)
