"""The checkpoints of a run, saved and restored by Orbax, each sealed by checksums."""

import concurrent.futures
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from hccr_jax.errors import InputError
from hccr_jax.runtime import checkpoint_seal, distributed
from hccr_jax.runtime.failpoints import failpoint

BEST_METRIC = "top1"
ASIDE = ".damaged"
_METADATA = "about"  # the name on disk
_MISREAD = re.compile(r"[\[\]*?:\\\udc80-\udcff]")
_OPEN_FOLDERS = Path("/proc/self/fd")


class Checkpoints:
    """The checkpoints of one run, in a folder; a context manager that waits for the last save.

    A step holds named pytrees of arrays, each of which can be restored alone (an evaluation needs
    no optimizer state), its validation metrics, and its metadata, a JSON object (the class list,
    the config). Saving happens in the background; a step appears complete or not at all. Its last
    file is its seal, the checksums of all others: Orbax commits atomically but restores flipped
    bits without an error. A step that does not match its seal is reported and skipped.
    """

    def __init__(self, folder: str | Path, keep_latest: int = 0, keep_best: int = 0) -> None:
        """Opens the folder.

        Args:
          folder: created for saving, when unfinished steps of a killed run are removed as well.
          keep_latest: newest steps to keep; 0 opens the folder read-only, while a run may be
            writing to it.
          keep_best: steps of the highest validation top-1 to keep; if fewer have one, the newest
            of the others take their place.
        """
        self.folder = Path(folder).absolute()
        self._descriptor: int | None = None
        self._keep = keep_latest, keep_best
        self._writes = keep_latest > 0 and distributed.is_primary()
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._finisher = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._intact: dict[int, bool] = {}
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            self._path(0)  # refuses a folder now, not after the first steps

    def save(
        self,
        step: int,
        items: dict[str, Any],
        metadata: dict[str, Any],
        metrics: dict[str, float] | None,
    ) -> None:
        """Starts saving a step; returns once the arrays are copied.

        Args:
          step: an existing one is replaced.
          items: pytrees of arrays by name; empty ones are left out, since Orbax refuses them.
          metadata: JSON object.
          metrics: of the validation, with "top1"; None without a validation at this step.

        Raises:
          OSError: the previous save, or this one, failed; its step does not exist.
        """
        self.wait()
        arguments: dict[str, Any] = {
            name: ocp.args.StandardSave(item)
            for name, item in items.items()
            if jax.tree.leaves(item)  # the batch statistics of a network without norms are empty
        }
        arguments[_METADATA] = ocp.args.JsonSave(metadata)
        arguments["metrics"] = ocp.args.JsonSave(metrics or {})
        try:
            composite = ocp.args.Composite(**arguments)
            self._checkpointer.save(self._path(step), composite, force=True)
        except Exception as error:
            raise self._failure(step, error) from error
        self._saving = step, self._finisher.submit(self._finish, step)

    def check(self) -> None:
        """Raises OSError if the last save has failed; does not wait for one in progress."""
        if self._saving and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
          OSError: it failed; its step does not exist.
        """
        if not self._saving:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:
            raise self._failure(step, error) from error

    def steps(self) -> list[int]:
        """Returns the undamaged steps, ascending, after the save in progress."""
        self.wait()
        return self._intact_steps()

    def best_step(self) -> int | None:
        """Returns the step of the highest validation top-1, or the latest if none was validated.

        With several processes all must call it, in step; all get the primary process's result,
        since a folder may look different to each while the primary one cleans it up.
        """
        return self._agree(lambda: max(self.steps(), key=self._rank, default=None))

    def latest_step(self) -> int | None:
        """Returns the newest step, or None; called like `best_step`."""
        return self._agree(lambda: max(self.steps(), default=None))

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the validation metrics saved with a step; empty if there were none."""
        return self._read(step, "metrics")

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the JSON object saved with a step."""
        return self._read(step, _METADATA)

    def restore(
        self, step: int, abstract_items: dict[str, Any], sharding: Sharding
    ) -> dict[str, Any]:
        """Returns items of a step, bit for bit as saved, placed as `sharding` says.

        Args:
          step: one of `steps()`.
          abstract_items: for each item to restore, a pytree with its structure, shapes and dtypes
            (`jax.ShapeDtypeStruct` or arrays).
          sharding: of every array; may differ from that of the saving run.

        Raises:
          InputError: the step holds other arrays than `abstract_items`.
        """
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_items,
        )
        arguments = {
            name: ocp.args.StandardRestore(item)
            for name, item in target.items()
            if jax.tree.leaves(item)
        }
        try:
            restored = self._checkpointer.restore(
                self._path(step), args=ocp.args.Composite(**arguments)
            )
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split()).split(". ")[0][:200]
            raise InputError(
                f"{self.folder / str(step)}: not a checkpoint of this network: {reason}"
            ) from error
        return abstract_items | {name: restored[name] for name in arguments}

    def _path(self, step: int) -> Path:
        """Returns a step's path for Orbax.

        Orbax takes `[]*?` in a path for a pattern, `gs:` for a protocol and `\\` for `/`, and no
        bytes that are not UTF-8: it saves elsewhere, or what nothing can read, without an error.
        Such a folder is opened here, and its path is the one that Linux has for open folders.

        Raises:
          InputError: such a folder on another system.
        """
        if not _MISREAD.search(str(self.folder)):
            return self.folder / str(step)
        if self._descriptor is None:
            if not _OPEN_FOLDERS.is_dir():
                raise InputError(
                    f"{self.folder}: a folder of checkpoints must not have any of []*?:\\ in its "
                    f"path here: choose another"
                )
            self.folder.mkdir(parents=True, exist_ok=True)  # by whichever process comes first
            self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        return _OPEN_FOLDERS / str(self._descriptor) / str(step)

    def _agree(self, choose: Callable[[], int | None]) -> int | None:
        self.wait()
        step = choose() if distributed.is_primary() else None
        agreed = distributed.broadcast(-1 if step is None else step)
        return None if agreed < 0 else agreed

    def _rank(self, step: int) -> tuple[float, int]:
        return self.metrics(step).get(BEST_METRIC, -math.inf), step

    def _finish(self, step: int) -> None:
        """Seals a step after it was written, and only then removes the older ones."""
        self._checkpointer.wait_until_finished()
        if not self._writes:
            return
        failpoint("between a save and its seal")
        checkpoint_seal.write_seal(self.folder / str(step))
        self._intact[step] = True
        steps, (latest, best) = self._intact_steps(), self._keep
        ranked = sorted(steps, key=self._rank, reverse=True)
        for old in set(steps) - {*steps[-latest:], *ranked[:best]}:
            failpoint("before an old step is removed")
            shutil.rmtree(self.folder / str(old))

    def _intact_steps(self) -> list[int]:
        return [step for step in find_steps(self.folder) if self._is_intact(step)]

    def _is_intact(self, step: int) -> bool:
        """Returns whether a step is as it was written; a damaged one is reported and renamed."""
        if step not in self._intact:
            path = self.folder / str(step)
            damage = checkpoint_seal.find_damage(path)
            self._intact[step] = damage is None
            if damage:
                print(f"{path}: damaged ({damage}): skipped", file=sys.stderr)
                if self._writes:
                    aside = path.with_name(path.name + ASIDE)
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
        return self._intact[step]

    def _remove_unfinished(self) -> None:
        """Removes the steps that a run was saving when it was killed."""
        for path in self.folder.iterdir():
            if ocp.utils.is_tmp_checkpoint(path) or (
                _is_step(path) and not checkpoint_seal.is_sealed(path)
            ):
                shutil.rmtree(path)

    def _failure(self, step: int, error: Exception) -> OSError:
        if self._writes:
            self._remove_unfinished()
        reason = " ".join(str(error).split())[:300]
        return OSError(f"{self.folder / str(step)}: could not be saved: {reason}")

    def _read(self, step: int, name: str) -> dict[str, Any]:
        # Not through Orbax, which would wait for the other processes.
        return json.loads((self.folder / str(step) / name / "metadata").read_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._checkpointer.close()
            if self._descriptor is not None:
                os.close(self._descriptor)


def find_steps(folder: Path) -> list[int]:
    """Returns the finished steps in a folder, ascending; the folder need not exist."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        int(path.name) for path in paths if _is_step(path) and checkpoint_seal.is_sealed(path)
    )


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir()


def check_classes(saved: Sequence[str], current: Sequence[str], source: str | Path) -> None:
    """Checks that a checkpoint and a data set have the same classes in the same order.

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
