"""One exact pass over a split."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hccr_jax.data.splits import Split, gather
from hccr_jax.runtime import distributed, sharding, watchdog
from hccr_jax.runtime.sharding import process_rows
from hccr_jax.runtime.signals import Stopped

BATCHES_AHEAD = 3  # in the devices' memory, waiting


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network says about a split, row by row.

    Attributes:
      losses: float32 (N,), cross-entropy in nats.
      candidates: int32 (N, 5), the best classes, best first.
      probabilities: float32 (N, 5), of the candidates.
      labels: int32 (N,).
    """

    losses: np.ndarray
    candidates: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Returns `count`, `loss`, `top1` and `top5` (shares of 1)."""
        hits = self.candidates == self.labels[:, None]
        return {
            "count": len(self.labels),
            "loss": float(self.losses.mean(dtype=np.float64)),
            "top1": float(hits[:, 0].mean()),
            "top5": float(hits.any(axis=1).mean()),
        }


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    split: Split,
    batch_size: int,
    mesh: Mesh,
    leaves: Callable[[], bool] = lambda: False,
) -> Predictions:
    """Returns the network's answers to every record of a split, each counted once.

    Args:
      eval_step: from `train_step.make_eval_step`.
      params, batch_stats: the network's.
      split: from `splits.load_split`.
      batch_size: over all devices; a last incomplete batch is filled up and the filling dropped.
      mesh: from `sharding.create_mesh`.
      leaves: asked between batches; the same in all processes.

    Raises:
      Stopped: `leaves` said so.
    """
    count, mine = len(split.labels), process_rows(batch_size)
    parts: list[Any] = []
    starts, silent = range(0, count, batch_size), not distributed.is_primary()
    for start in tqdm(starts, "evaluating", leave=False, unit="batch", disable=silent):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = sharding.shard_batch(gather(split, rows[mine]), mesh)
        parts.append(eval_step(params, batch_stats, *batch))
        watchdog.beat("evaluating")  # not before the first batch, which compiles
        if leaves():
            raise Stopped
        if len(parts) > BATCHES_AHEAD:  # not sooner: reading is to go on while devices compute
            jax.block_until_ready(parts[-1 - BATCHES_AHEAD])
    watchdog.beat("after evaluating", watchdog.SLOW)
    whole = map(np.concatenate, zip(*jax.device_get(parts), strict=True))
    losses, candidates, probabilities = (part[:count] for part in whole)
    return Predictions(losses, candidates, probabilities, np.asarray(split.labels))


def read_outputs(
    logits_step: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    images: np.ndarray,
    batch_size: int,
    mesh: Mesh,
) -> Iterator[list[np.ndarray]]:
    """Yields what a network makes of images, in their order, batch by batch.

    Args:
      logits_step: from `train_step.make_logits_step`.
      params, batch_stats, batch_size, mesh: as for `evaluate`.
      images: uint8 (N, S, S).
    """
    mine = process_rows(batch_size)
    for start in range(0, len(images), batch_size):
        last = min(start + batch_size, len(images))
        rows = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
        batch = sharding.shard_batch(images[rows[mine]], mesh)
        outputs = logits_step(params, batch_stats, batch)
        watchdog.beat("calibrating", watchdog.SLOW)
        yield [np.asarray(output)[: last - start] for output in outputs]
