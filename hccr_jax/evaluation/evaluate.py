"""One exact pass over a split."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hccr_jax.data.splits import Split, gather, padded_rows
from hccr_jax.inference.network import Network
from hccr_jax.inference.steps import Variables, stage_names
from hccr_jax.runtime import distributed, sharding, watchdog
from hccr_jax.runtime.sharding import process_rows
from hccr_jax.runtime.signals import Stopped

BATCHES_AHEAD = 3  # in the devices' memory, waiting


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A network's predictions for a split, row by row.

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

    @property
    def is_right(self) -> np.ndarray:
        """Whether the best class is the label, bool (N,)."""
        return self.candidates[:, 0] == self.labels

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
    network: Network, split: Split, should_stop: Callable[[], bool] = lambda: False
) -> Predictions:
    """Returns the predictions for every record of a split, with all that the network is to use.

    Args:
      network: with test-time augmentation and ensemble member, where it has them.
      split: from `splits.load_split`.
      should_stop: called between batches; the same in all processes.

    Raises:
      Stopped: `should_stop` returned True.
    """
    return list(evaluate_stages(network, split, should_stop).values())[-1]


def evaluate_stages(
    network: Network, split: Split, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Predictions]:
    """Returns the predictions for a split of each of `steps.stage_names`, in a single pass.

    Args, Raises: like `evaluate`.
    """
    count, size, labels = len(split.labels), network.eval_batch_size, np.asarray(split.labels)
    batches: list[Any] = []
    progress = tqdm(
        list(padded_rows(count, size)), "evaluating", leave=False, unit="batch",
        disable=not distributed.is_primary(),
    )  # fmt: skip
    for rows in progress:
        batch = sharding.shard_batch(gather(split, rows[process_rows(size)]), network.mesh)
        batches.append(network.eval_step(network.variables, *batch))
        watchdog.beat("evaluating")  # not before the first batch, which compiles
        if should_stop():
            raise Stopped
        if len(batches) > BATCHES_AHEAD:  # not sooner: gathering goes on while devices compute
            jax.block_until_ready(batches[-1 - BATCHES_AHEAD])
    watchdog.beat("after evaluating", watchdog.SLOW)
    stages = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *jax.device_get(batches))
    names = stage_names(network.tta_views, network.member)
    return {
        name: Predictions(losses, candidates, probabilities, labels)
        for name, (losses, candidates, probabilities) in zip(names, stages, strict=True)
    }


def read_outputs(
    logits_step: Callable[..., Any],
    variables: Variables,
    images: np.ndarray,
    batch_size: int,
    mesh: Mesh,
) -> Iterator[list[np.ndarray]]:
    """Yields a network's outputs for images, in their order, batch by batch.

    Args:
      logits_step: from `steps.make_logits_step`.
      variables: of the network.
      images: uint8 (N, S, S).
      batch_size: over all devices.
      mesh: from `sharding.create_mesh`.
    """
    left = len(images)
    for rows in padded_rows(left, batch_size):
        batch = sharding.shard_batch(images[rows[process_rows(batch_size)]], mesh)
        outputs = logits_step(variables, batch)
        watchdog.beat("calibrating", watchdog.SLOW)
        yield [np.asarray(output)[:left] for output in outputs]
        left -= batch_size
