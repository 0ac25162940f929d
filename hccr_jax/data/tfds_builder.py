"""A data set as a TensorFlow Datasets builder: original bitmaps in ArrayRecord files.

Reading and writing need no TensorFlow; see `shards` for why TFDS's own writer is not used.
"""

import json
import statistics
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from hccr_jax.data import labelled_images, store
from hccr_jax.data.casia import charset
from hccr_jax.data.casia.archives import Member, divide, fingerprint
from hccr_jax.data.casia.divisions import SPLITS, UNKNOWN_WRITER
from hccr_jax.data.shards import Counts, Shard, Task, features, group_members, write_shard
from hccr_jax.errors import InputError, shorten
from hccr_jax.runtime.worker_pool import WorkerPool

# A class is of unusual size if it differs from the median by more than this part and this number
# of images: real classes of HWDB1.1 lack a few of 240 writers.
_UNUSUAL_PART = 1 / 3
_UNUSUAL_COUNT = 3
_SHOWN_DOUBTS = 3
_DIGEST = struct.Struct("8s")
# The archives with symbols have 171 classes beside the 3,755.
_USUAL_FOREIGN_PART = 0.1


class CasiaHwdb(FileReaderBuilder):
    """Handwritten characters with class, writer and origin.

    Splits `train`, `validation` (a tenth of the training writers) and `test`, in the order of the
    members and of their records. Source of the format and of the data: C.-L. Liu, F. Yin,
    D.-H. Wang and Q.-F. Wang, "CASIA Online and Offline Chinese Handwriting Databases", ICDAR 2011.
    """

    VERSION = tfds.core.Version(store.VERSION)
    # Nothing is downloaded; by default TFDS looks for a list of URLs in the package.
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        data_dir: str | Path,
        name: str = "casia_hwdb",
        members: Sequence[Member] = (),
        skip_faults: bool = False,
        skipped: Counts | None = None,
        characters: Sequence[str] = (),
        faults: Sequence[str] = (),
    ):
        """Creates the builder.

        Args:
          data_dir: folder of all data sets.
          name: the data set's name.
          members: the source of a data set to prepare; none to read it only.
          skip_faults: count damaged records and go on, instead of raising InputError.
          skipped: (reason, "count" or "bytes") → number skipped so far, for the manifest.
          characters: the charset, others are skipped; none for level 1.
          faults: a line for each picture found unusable so far, for the manifest.
        """
        self.name = name
        self._members = members
        self._skip_faults = skip_faults
        self._skipped = skipped or Counts()
        self._characters = tuple(characters)
        self._faults = list(faults)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            description="Handwritten characters with class, writer and origin.",
            features=features(self._characters),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the shards and the manifest into the temporary folder that TFDS then renames."""
        del dl_manager, download_config
        members = divide(self._members)
        # One writer cannot be divided, and several in one file cannot be told apart.
        self._by_record = not members["validation"] and not any(m.character for m in self._members)
        if self._by_record:
            members["validation"] = members["train"]
        with WorkerPool() as pool:
            classes = frozenset(self._characters or charset.level1())
            shards = self._write(pool, members, ["train"], classes)
            trained = frozenset(character for _, _, character in _characters(shards))
            shards += self._write(pool, members, ["validation", "test"], trained)
        self._check(shards, trained)
        splits = [self._finish(split, shards) for split in members]
        self.info.set_splits(tfds.core.SplitDict([split for split in splits if split]))
        manifest = _manifest(self._members, shards, self._skipped, self._characters)
        manifest["faults"] = self._faults
        manifest["leaks"] = _leaks(shards)
        if self._by_record and "validation" in manifest["characters_per_split"]:
            manifest["validation_by_record"] = True
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        Path(self.data_dir, store.MANIFEST).write_text(text, "utf-8")

    def _check(self, shards: list[Shard], trained: frozenset[str]) -> None:
        """Raises InputError if pictures are unusable or no class has a training image."""
        self._faults += [fault for shard in shards for fault in shard.faults]
        if not self._skip_faults:
            labelled_images.check_faults(self._faults)
        archives = shorten(sorted({member.archive for member in self._members}), ", ")
        if not trained:
            if any(shard.swapped for shard in shards if shard.split == "train"):
                hint = "are the two bytes of each tag swapped? CASIA has the high byte first"
            elif any(member.character for member in self._members):
                hint = "pictures of it are needed that are not for the test"
            else:
                hint = "the archives of the training writers are needed"
            kind = "character of the charset" if self._characters else "level-1 character"
            raise InputError(f"{archives}: no {kind} to train on: {hint}")
        if len(trained) < 2:
            raise InputError(
                f"{archives}: {next(iter(trained))} is the only character with training images: "
                f"at least two are needed to tell one from the other"
            )

    def _write(
        self,
        pool: WorkerPool,
        members: dict[str, list[Member]],
        splits: Sequence[str],
        classes: frozenset[str],
    ) -> list[Shard]:
        tasks = [
            Task(
                split=split,
                folder=self.data_dir,
                number=number,
                members=group,
                classes=classes,
                skip_faults=self._skip_faults,
                characters=self._characters,
                by_record=self._by_record and split != "test",
            )
            for split in splits
            for number, group in enumerate(group_members(members[split]))
        ]
        total = sum(member.num_bytes for split in splits for member in members[split])
        return pool.run(write_shard, tasks, total, f"{self.name}: {', '.join(splits)}", "B")

    def _finish(self, split: str, shards: list[Shard]) -> tfds.core.SplitInfo | None:
        """Renames the shards with records to their final names, which number them."""
        shards = [shard for shard in shards if shard.split == split]
        filled = [shard for shard in shards if shard.num_records]
        template = self._get_filename_template(split_name=split)
        for index, shard in enumerate(filled):
            final = template.sharded_filepath(shard_index=index, num_shards=len(filled))
            shard.path.rename(final)
        for shard in shards:
            shard.path.unlink(missing_ok=True)
        if not filled:
            return None
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.num_records for shard in filled],
            num_bytes=sum(shard.num_bytes for shard in filled),
            filename_template=template,
        )


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Does nothing: TFDS would query its cloud storage, which has no such data set."""


def _characters(shards: Sequence[Shard]) -> Counts:
    return sum((shard.characters for shard in shards), Counts())


def _manifest(
    members: Sequence[Member],
    shards: Sequence[Shard],
    skipped_before: Counts,
    characters: tuple[str, ...],
) -> dict[str, Any]:
    """Returns the content of the data set as JSON: characters by split, archive, writer, class.

    `doubts` are lines for a person, on readable records that may be wrong; `not_trained` are the
    characters of a custom charset that no training writer wrote.
    """
    skipped = sum((shard.skipped for shard in shards), Counts(skipped_before))
    archives: Counts = Counts()
    writers: dict[str, Counts] = {}
    classes: dict[str, Counts] = {}
    for shard in shards:
        for (archive, writer, character), count in shard.characters.items():
            archives[archive] += count
            writers.setdefault(shard.split, Counts())[writer] += count
            classes.setdefault(shard.split, Counts())[character] += count
    ordered = {
        split: {c: counts[c] for c in characters or charset.level1() if c in counts}
        for split, counts in classes.items()
    }
    return {
        "fingerprint": fingerprint(members, characters),
        "classes": list(ordered["train"]),
        "characters_per_split": {split: counts.total() for split, counts in classes.items()},
        "characters_per_archive": archives,
        "characters_per_writer": writers,
        "characters_per_class": ordered,
        "skipped": {
            reason: {"count": count, "bytes": skipped[reason, "bytes"]}
            for (reason, unit), count in sorted(skipped.items())
            if unit == "count"
        },
        "doubts": []
        if any(member.character for member in members)
        else _doubts(shards, ordered) + _doubts_of_tags(shards, skipped),
        "not_trained": [c for c in characters if c not in ordered["train"]],
    }


def _leaks(shards: Sequence[Shard]) -> list[str]:
    """Returns lines on images of one split that are in another too, in whatever files."""
    images = {
        split: {
            digest
            for s in shards
            if s.split == split
            for (digest,) in _DIGEST.iter_unpack(s.digests)
        }
        for split in SPLITS
    }
    pairs = [(split, other) for split in SPLITS[1:] for other in SPLITS[: SPLITS.index(split)]]
    common = {pair: len(images[pair[0]] & images[pair[1]]) for pair in pairs}
    return [
        f"{count:,} of {len(images[split]):,} different images of {split} are in {other} too"
        for (split, other), count in common.items()
        if count
    ]


def _doubts(shards: Sequence[Shard], classes: dict[str, dict[str, int]]) -> list[str]:
    """Returns lines on signs of wrong tags; a writer of CASIA writes each class once."""
    repeats = Counts(
        {
            f"{character} {count} times by writer {writer}": count
            for (_, writer, character), count in sorted(_characters(shards).items())
            if count > 1 and writer != UNKNOWN_WRITER
        }
    )
    doubts = []
    if repeats:
        doubts.append(f"written more than once by one writer: {_most_common(repeats)}")
    for split, counts in classes.items():
        usual = statistics.median(counts.values())
        distance = {
            f"{character} has {count}": abs(count - usual)
            for character, count in counts.items()
            if abs(count - usual) > max(_UNUSUAL_PART * usual, _UNUSUAL_COUNT)
        }
        if distance:
            message = f"classes of unusual size in {split}, where the median has {usual:g}"
            doubts.append(f"{message}: {_most_common(Counts(distance))}")
    return doubts


def _doubts_of_tags(shards: Sequence[Shard], skipped: Counts) -> list[str]:
    """Returns lines on tags that may be of another encoding; all of them are readable."""
    doubts = []
    kept, swapped = sum(shard.num_records for shard in shards), sum(s.swapped for s in shards)
    foreign = skipped["not a level-1 character", "count"]
    if foreign > _USUAL_FOREIGN_PART * (kept + foreign):
        doubts.append(f"{foreign:,} of {kept + foreign:,} are of no level-1 character")
    # The tag of 43 level-1 characters of 100 is another's when its bytes are swapped.
    if swapped > kept:
        doubts.append(
            f"{kept:,} are of the charset, but {swapped:,} if their two bytes were swapped: CASIA "
            f"has the high byte first"
        )
    return doubts


def _most_common(findings: Counts) -> str:
    return shorten([text for text, _ in findings.most_common()], ", ", limit=_SHOWN_DOUBTS)
