"""Test-time augmentation: the views of an image that a network sees."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hccr_jax.ops.warp import rotation_matrix


class TtaViews(NamedTuple):
    """The views of an image at test time, the image as it is first.

    Attributes:
      maps: float32 (V, 2, 2), matrices for `warp`.
      weights: float32 (V,), of each view in the mean of the probabilities.
    """

    maps: np.ndarray
    weights: np.ndarray


def create_tta_views(count: int, flips: bool, upright_prior: float = 0.25) -> TtaViews:
    """Returns the views of an image.

    Args:
      count: from 1 to 5, the first of: as it is, rotated by 6° either way, scaled by 0.92, by 1.08.
      flips: adds each of them mirrored along either axis, and along both.
      upright_prior: with flips, the probability that an image is as written, not mirrored.
    """
    turn = [np.asarray(rotation_matrix(jnp.deg2rad(angle))) for angle in (6.0, -6.0)]
    maps = np.stack([np.eye(2), *turn, np.eye(2) * 0.92, np.eye(2) * 1.08])[:count]
    mirrors = [np.diag([x, y]) for x in (1, -1) for y in (1, -1)] if flips else [np.eye(2)]
    priors = [upright_prior, *[(1 - upright_prior) / 3] * 3] if flips else [1.0]
    maps = np.concatenate([maps @ mirror for mirror in mirrors]).astype(np.float32)
    return TtaViews(maps, np.repeat(np.array(priors, np.float32), count))
