"""Simulated writers: the habits of a hand, drawn at random like those of CASIA-HWDB1.1."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Spread of the writers in each term of `draw.warp_features`: x, y, xy, x², y², and waves.
WARP_SPREAD = np.array(
    [[s] for s in [0.05, 0.03, 0.08, 0.08, 0.08, 0.02, 0.02] + [0.02] * 4 + [0.012] * 4],
    np.float32,
)


@dataclasses.dataclass(frozen=True)
class Writer:
    """The habits of one hand, drawn by `create_writer`.

    A `*_spread` is the standard deviation of one instance from the habit. Lengths are in units of
    the character's box, except those in pixels; angles in radians, clockwise.
    """

    size_px: float  # side of the box of a character of one stroke
    pen_px: float  # half the width of a line
    blur_px: float  # width of the edge of a line
    warp: np.ndarray  # float32 (features, 2): `warp_features` @ warp is the new point
    direction_habit: np.ndarray  # float32 (5, 2): growth and rotation of strokes by direction
    warp_spread: float  # as a fraction of WARP_SPREAD
    size_spread: float
    component_spread: float
    stroke_spread: float
    turn_spread: float
    stretch_spread: float
    bow: float  # mean bow of a stroke, as a fraction of its length
    bow_spread: float
    tremor: float
    roundness: float  # 0 keeps corners, 1 rounds them most
    joining: float  # probability that two touching strokes are linked
    reach: float  # length at which this probability has fallen to a third
    pull: float  # movement of linked ends to each other, as a fraction of their gap
    flick: float  # probability that a stroke ends in the direction of the next
    hook: float  # probability that a hook is written
    pressure: float  # spread of the pen's width, as a fraction of it
    taper: float  # loss of width to the end of a stroke, as a fraction of it
    ink: float  # darkness of the ink, 0 to 255
    grain: float  # spread of the darkness between pixels, as a fraction of it
    mottle: float  # the same over distances of some pixels


def create_writer(seed: int | Sequence[int], cursiveness: float = 1.0) -> Writer:
    """Returns the simulated writer of a seed; different seeds give clearly different hands.

    The ranges are set so that widths, heights, line widths and grey levels spread like those of
    CASIA-HWDB1.1.

    Args:
      seed: of the writer.
      cursiveness: from 0 to 1, the deviation of the hand from the model: 1 for the hurried writers
        of CASIA-HWDB, less for neater ones.

    >>> create_writer(1).ink == create_writer(1).ink != create_writer(2).ink
    True
    """
    rng = np.random.default_rng(seed)
    hurry = cursiveness * rng.beta(1.6, 1.6)  # 0 separates all strokes, 1 runs them together
    warp = rng.standard_normal((len(WARP_SPREAD), 2)) * WARP_SPREAD * rng.uniform(0.5, 1.3)
    warp *= cursiveness
    warp[:2] += ((rng.lognormal(math.log(0.80), 0.11), 0), (0, 1))
    warp[0, 1] += rng.normal(-0.10, 0.08)  # lines from left to right rise
    warp[1, 0] += rng.normal(-0.02, 0.12)  # slant
    direction_habit = rng.normal((-0.07, 0), 0.08, (5, 2))
    direction_habit[2, 1] += rng.normal(0.02, 0.12)  # strokes that fall to the right vary most
    return Writer(
        size_px=rng.lognormal(math.log(81), 0.14),
        pen_px=rng.lognormal(math.log(2.05), 0.17),
        blur_px=rng.uniform(1.6, 2.8),
        warp=warp.astype(np.float32),
        direction_habit=direction_habit.astype(np.float32),
        warp_spread=rng.uniform(0.4, 1.0) * cursiveness,
        size_spread=rng.uniform(0.05, 0.12),
        component_spread=rng.uniform(0.02, 0.055) * (0.6 + 0.8 * hurry) * cursiveness,
        stroke_spread=rng.uniform(0.010, 0.028) * (0.6 + 0.8 * hurry) * cursiveness,
        turn_spread=rng.uniform(0.03, 0.10) * cursiveness,
        stretch_spread=rng.uniform(0.05, 0.20) * cursiveness,
        bow=rng.normal(0, 0.03),
        bow_spread=rng.uniform(0.02, 0.09),
        tremor=rng.uniform(0, 0.006),
        roundness=min(1.0, rng.uniform(0.1, 0.5) + 0.6 * hurry),
        joining=0.9 * hurry**1.5,
        reach=rng.uniform(0.12, 0.25) + 0.35 * hurry,
        pull=rng.uniform(0, 0.5) * hurry,
        flick=rng.uniform(0, 0.5),
        hook=rng.uniform(0, 1),
        pressure=rng.uniform(0.05, 0.20),
        taper=rng.uniform(-0.1, 0.5),
        ink=rng.uniform(120, 180),
        grain=rng.uniform(0.06, 0.14),
        mottle=rng.uniform(0.05, 0.15),
    )
