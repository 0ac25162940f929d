"""A split for training: every image in normal form, in one memory-mapped array."""

import dataclasses
import hashlib
import inspect
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hccr_jax.data import store
from hccr_jax.data.images.normalize import normalize
from hccr_jax.errors import InputError
from hccr_jax.runtime.worker_pool import Advance, WorkerPool

_TASK_ROWS = 4096
_READ_ROWS = 64
_ROW = np.dtype([("label", "<i4"), ("writer", "<i4"), ("source", "<i4"), ("record", "<i4")])


@dataclasses.dataclass(frozen=True)
class Split:
    """A split in normal form; row i of every array is record i of the data set's split.

    Attributes:
      images: uint8 (N, S, S), ink high, paper 0; from `load_split` memory-mapped and read-only.
      labels: int32 (N,), index into `classes`.
      classes: the characters that occur in train, in the charset's order. `prepare` keeps no
        record of another class, in any split, so every label is in range.
      writers: str (N,), the writer of the row.
      record_numbers: int32 (N,), the record's number in the member it came from.
      sources: str (N,), archive and member that the row came from.
      teacher_logits: float16 (N, K), a teacher's logits for the images; None without a teacher, or
        if it is evaluated in every step.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    writers: np.ndarray
    sources: np.ndarray
    record_numbers: np.ndarray
    teacher_logits: np.ndarray | None = None


def load_split(
    name: str,
    data_dir: str | Path,
    split: str,
    image_px: int,
    margin_px: int,
    aspect: str = "keep",
) -> Split:
    """Returns a split of a prepared data set in normal form.

    The first call for a split, size and margin computes it on all cores and caches it in the data
    set's folder; later calls map the cache. Concurrent calls wait for the first. A truncated cache
    is computed again.

    Args:
      name: the data set, such as "casia_hwdb".
      data_dir: folder of all data sets.
      split: "train", "validation", "test", or several joined by "+".
      image_px: side S of the images.
      margin_px: pixels left free at each border.
      aspect: "keep" or "adaptive", see `normalize`.

    Raises:
      InputError: the data set is missing or has no such split, or the margin leaves no image.
    """
    if not 0 <= 2 * margin_px < image_px:
        raise InputError(f"margin_px={margin_px}: from 0 to below half of image_px={image_px}")
    manifest = store.read_manifest(name, data_dir)
    count = _count(manifest, split, name, data_dir)
    folder = store.dataset_folder(name, data_dir)
    form = f"{split}-{image_px}px-{margin_px}margin-{aspect}"
    cache = folder / "normal_form" / f"{form}-{_code_version()}"
    classes, shape = tuple(manifest["classes"]), (count, image_px, image_px)
    found = _read(cache, classes, shape)
    if found is None:
        with store.exclusive(cache.parent / f"{form}.lock"):
            found = _read(cache, classes, shape)
            if found is None:
                shutil.rmtree(cache, ignore_errors=True)
                _build(cache, folder, split, count, image_px, margin_px, aspect)
                _remove_other_versions(cache, form)
                found = _read(cache, classes, shape)
    if found is None:
        raise InputError(f"{cache}: cannot be read back: check the disk")
    return found


def _read(cache: Path, classes: tuple[str, ...], shape: tuple[int, ...]) -> Split | None:
    """Returns the split in a cache folder; None if it is missing or truncated."""
    try:
        names = json.loads((cache / "names.json").read_text("utf-8"))
        images, rows = np.load(cache / "images.npy", mmap_mode="r"), np.load(cache / "rows.npy")
        if images.shape != shape or rows.shape != shape[:1]:
            return None
        return Split(
            images=images,
            labels=np.ascontiguousarray(rows["label"]),
            classes=classes,
            writers=np.array(names["writers"])[rows["writer"]],
            sources=np.array(names["sources"])[rows["source"]],
            record_numbers=np.ascontiguousarray(rows["record"]),
        )
    except (OSError, EOFError, ValueError, KeyError, IndexError):
        return None


def join_splits(first: Split, second: Split) -> Split:
    """Returns the rows of `first` and those rows of `second` whose classes `first` has, in memory.

    Args:
      first: its classes are kept.
      second: has images of the same size.
    """
    place = {character: index for index, character in enumerate(first.classes)}
    new_label = np.array([place.get(character, -1) for character in second.classes], np.int32)
    labels = new_label[second.labels]
    rows = np.flatnonzero(labels >= 0)
    return Split(
        images=np.concatenate([first.images, second.images[rows]]),
        labels=np.concatenate([first.labels, labels[rows]]),
        classes=first.classes,
        writers=np.concatenate([first.writers, second.writers[rows]]),
        sources=np.concatenate([first.sources, second.sources[rows]]),
        record_numbers=np.concatenate([first.record_numbers, second.record_numbers[rows]]),
    )


def rows_spread(count: int, most: int) -> np.ndarray:
    """Returns at most `most` row numbers of a split, evenly spaced.

    >>> rows_spread(10, 4).tolist(), rows_spread(2, 4).tolist()
    ([0, 2, 5, 7], [0, 1])
    """
    size = min(count, most)
    return np.arange(size) * count // max(size, 1)


def padded_rows(count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the row numbers of batches of one size; the last row fills up an incomplete batch.

    All batches of one size need only one compiled program; the results are cut to `count` rows.

    >>> [rows.tolist() for rows in padded_rows(5, 3)]
    [[0, 1, 2], [3, 4, 4]]
    """
    for start in range(0, count, batch_size):
        yield np.minimum(np.arange(start, start + batch_size), count - 1)


def load_bitmaps(
    name: str, data_dir: str | Path, split: str, rows: Sequence[int] | np.ndarray
) -> list[np.ndarray]:
    """Returns the original bitmaps of some rows, uint8 (H, W) of any size, 255 is paper.

    Args:
      name: the data set.
      data_dir: folder of all data sets.
      split: as for `load_split`.
      rows: row numbers in that split, in any order.

    Raises:
      InputError: the data set is missing or has no such split, or a row is out of range.
    """
    count = _count(store.read_manifest(name, data_dir), split, name, data_dir)
    wrong = [int(row) for row in rows if not 0 <= row < count]
    if wrong:
        raise InputError(f"row {wrong[0]} of {name}, {split}: it has rows 0 to {count - 1}")
    source = _records(store.dataset_folder(name, data_dir), split)
    return [source[int(row)]["image"] for row in rows]


def _count(manifest: dict[str, Any], split: str, name: str, data_dir: str | Path) -> int:
    """Returns the number of records of a split; the InputError for an unknown one lists them."""
    counts, parts = manifest["characters_per_split"], split.split("+")
    if len(set(parts)) < len(parts) or not set(parts) <= set(counts):
        raise InputError(
            f"split {split!r} of {name} in {data_dir}: it has {', '.join(counts)}, each once, "
            f"several joined by '+'"
        )
    return sum(counts[part] for part in parts)


def _code_version() -> str:
    """Returns a digest of the code of the normal form: a change invalidates the caches."""
    return hashlib.sha256(Path(inspect.getfile(normalize)).read_bytes()).hexdigest()[:12]


def _records(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds  # slow to import, and needed on first use only

    return tfds.builder_from_directory(folder).as_data_source(split)


@dataclasses.dataclass(frozen=True)
class _Task:
    """Rows `start` to `stop` of a split, to be written to the array in the file `images`."""

    folder: Path
    split: str
    start: int
    stop: int
    images: Path
    margin_px: int
    aspect: str


def _build(
    cache: Path,
    folder: Path,
    split: str,
    count: int,
    image_px: int,
    margin_px: int,
    aspect: str,
) -> None:
    """Computes a split under a temporary name and renames it; the caller holds the lock."""
    temporary = cache.with_name(f"{cache.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shape = (count, image_px, image_px)
    images = temporary / "images.npy"
    np.lib.format.open_memmap(images, mode="w+", dtype=np.uint8, shape=shape).flush()
    tasks = [
        _Task(folder, split, start, min(start + _TASK_ROWS, count), images, margin_px, aspect)
        for start in range(0, count, _TASK_ROWS)
    ]
    with WorkerPool() as pool:
        parts = pool.run(_normalize_rows, tasks, count, f"Normal form of {split}", "image")
    rows = np.empty(count, _ROW)
    rows["label"] = np.concatenate([part.labels for part in parts])
    rows["record"] = np.concatenate([part.record_numbers for part in parts])
    writers, rows["writer"] = np.unique(
        np.concatenate([part.writers for part in parts]), return_inverse=True
    )
    sources, rows["source"] = np.unique(
        np.concatenate([part.sources for part in parts]), return_inverse=True
    )
    np.save(temporary / "rows.npy", rows)
    names = {"writers": writers.tolist(), "sources": sources.tolist()}
    (temporary / "names.json").write_text(json.dumps(names, ensure_ascii=False), "utf-8")
    temporary.rename(cache)


class _Part(NamedTuple):
    """The rows of one task, arrays as in `Split`."""

    labels: np.ndarray
    writers: np.ndarray
    sources: np.ndarray
    record_numbers: np.ndarray


def _normalize_rows(task: _Task, advance: Advance) -> _Part:
    """Fills the task's rows of the image array and returns the other columns."""
    source = _records(task.folder, task.split)
    classes = json.loads((task.folder / store.MANIFEST).read_text("utf-8"))["classes"]
    place = {character: index for index, character in enumerate(classes)}
    images = np.load(task.images, mmap_mode="r+")
    labels, writers, sources, numbers = [], [], [], []
    for start in range(task.start, task.stop, _READ_ROWS):
        rows = range(start, min(start + _READ_ROWS, task.stop))
        for row, record in zip(rows, source.__getitems__(rows), strict=True):
            images[row] = normalize(record["image"], images.shape[1], task.margin_px, task.aspect)
            labels.append(place[record["character"].decode()])
            writers.append(record["writer"].decode())
            sources.append(record["source"].decode())
            numbers.append(record["record"])
        advance(len(rows))
    images.flush()
    return _Part(
        np.array(labels, np.int32),
        np.array(writers),
        np.array(sources),
        np.array(numbers, np.int32),
    )


def _remove_other_versions(cache: Path, form: str) -> None:
    """Removes the caches of other versions of the code: a split can take gigabytes."""
    for path in cache.parent.glob(f"{form}-*"):
        if path != cache:
            shutil.rmtree(path, ignore_errors=True)


class Batch(NamedTuple):
    """This process's rows of a global batch: images uint8 (B, S, S) and labels int32 (B,)."""

    images: np.ndarray
    labels: np.ndarray


def gather(split: Split, rows: np.ndarray) -> Batch:
    """Returns the given rows of a split, copied into memory."""
    return Batch(split.images[rows], split.labels[rows])
