"""Checkpoints: Orbax behind one small face."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hccr_jax.errors import InputError

BEST_METRIC = "top1"


class Checkpoints:
    """The checkpoints of one run, in a folder; a context manager that waits for the last save.

    A step holds named pytrees of arrays, each of which can be restored alone, and `about`, a JSON
    object that travels with them (the class list, the config). Saving happens in the background; a
    step appears whole or not at all.
    """

    def __init__(self, folder: str | Path, keep_latest: int = 0, keep_best: int = 0) -> None:
        """Opens the folder.

        Args:
          folder: made if steps are to be saved.
          keep_latest: newest steps to keep; 0 opens the folder to read only, where a run may be
            writing at the same time.
          keep_best: steps of the highest validation top-1 to keep; while fewer have one, the newest
            of the others fill their place.
        """
        policies = [
            preservation_policy.LatestN(keep_latest),
            preservation_policy.BestN(get_metric_fn=_score, n=keep_best),
        ]
        writes = keep_latest > 0
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                best_fn=_score,  # without it Orbax does not write the metrics
                cleanup_tmp_directories=writes,
                create=writes,
            ),
        )

    def save(
        self,
        step: int,
        items: dict[str, Any],
        about: dict[str, Any],
        metrics: dict[str, float] | None,
    ) -> None:
        """Starts saving a step; returns once the arrays are copied.

        Args:
          step: not saved before.
          items: pytrees of arrays by name; empty ones are left out, since Orbax refuses them.
          about: JSON object.
          metrics: of the validation, with "top1"; None where there was none at this step.
        """
        arguments = {
            name: ocp.args.StandardSave(item)
            for name, item in items.items()
            if jax.tree.leaves(item)  # Orbax refuses an empty one, as of a network without norms
        }
        composite = ocp.args.Composite(**arguments, about=ocp.args.JsonSave(about))
        self._manager.save(step, args=composite, metrics=metrics or {}, force=True)

    def steps(self) -> list[int]:
        """Returns the steps there are, ascending, once those under way are saved."""
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step of the highest validation top-1, or the latest if none was validated."""
        scores = {step: self.metrics(step).get(BEST_METRIC) for step in self.steps()}
        rated = [step for step, score in scores.items() if score is not None]
        return max(rated, key=lambda step: (scores[step], step)) if rated else self.latest_step()

    def latest_step(self) -> int | None:
        """Returns the newest step, or None."""
        return max(self.steps(), default=None)

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the validation metrics saved with a step; empty where there were none."""
        path = self.folder / str(step) / "metrics" / "metrics"
        return json.loads(path.read_text()) if path.exists() else {}

    def about(self, step: int) -> dict[str, Any]:
        """Returns the JSON object saved with a step.

        Raises:
          InputError: the step's folder is damaged.
        """
        about = ocp.args.Composite(about=ocp.args.JsonRestore())
        try:
            return self._manager.restore(step, args=about)["about"]
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise InputError(
                f"{self.folder / str(step)}: not a checkpoint, or damaged; remove this folder to "
                f"go back to an older one"
            ) from error

    def restore(self, step: int, like: dict[str, Any], sharding: Sharding) -> dict[str, Any]:
        """Returns items of a step, bit for bit as saved, placed as `sharding` says.

        Args:
          step: one of `steps()`.
          like: for each item wanted, a pytree with the structure, shapes and dtypes to restore.
          sharding: of every array; may differ from that of the saving run.

        Raises:
          InputError: the step holds other arrays than `like`.
        """
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
        )
        arguments = {
            name: ocp.args.StandardRestore(item)
            for name, item in target.items()
            if jax.tree.leaves(item)
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split()).split(". ")[0][:200]
            raise InputError(
                f"{self.folder / str(step)}: not a checkpoint of this network: {reason}"
            ) from error
        return {name: restored[name] if name in arguments else like[name] for name in like}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _score(metrics: dict[str, float]) -> float:
    return metrics.get(BEST_METRIC, -math.inf)


def has_steps(folder: Path) -> bool:
    """Returns whether a folder holds a saved step; it may be missing."""
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def check_classes(saved: Sequence[str], current: Sequence[str], source: str | Path) -> None:
    """Checks that a checkpoint and a data set mean the same characters by the same numbers.

    Raises:
      InputError: names the checkpoint and the first difference.
    """
    if list(saved) == list(current):
        return
    pairs = enumerate(zip(saved, current, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(saved), len(current)))
    theirs = saved[place] if place < len(saved) else "none"
    ours = current[place] if place < len(current) else "none"
    raise InputError(
        f"{source}: trained on another class list ({len(saved)} classes, the data set has "
        f"{len(current)}; class {place} is {theirs} there and {ours} here)"
    )
