"""A data set as a TensorFlow Datasets builder: original bitmaps in ArrayRecord files.

Reading and writing need no TensorFlow. Whole shards are parsed, serialised and written by the
worker processes, because TFDS's own writer works on one core and holds a split in memory (up to
1 GB, beyond which it asks for TensorFlow).
"""

import collections
import dataclasses
import functools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from hccr_jax.data import labelled_images, store
from hccr_jax.data.casia import charset, gnt
from hccr_jax.data.casia.archives import Member, divide, fingerprint, read_member
from hccr_jax.errors import InputError
from hccr_jax.runtime.worker_pool import Advance, WorkerPool

# Small enough to keep all cores busy on a small set, large enough that the full one has few files.
_SHARD_BYTES = 24 << 20
# A class is of unusual size when it is off the median by more than this part and this number of
# images: real classes of HWDB1.1 lack a few of 240 writers.
_UNUSUAL_PART = 1 / 3
_UNUSUAL_COUNT = 3
_SHOWN_DOUBTS = 3

Counts = collections.Counter[Any]


class CasiaHwdb(FileReaderBuilder):
    """Handwritten characters with class, writer and origin.

    Splits `train`, `validation` (a tenth of the training writers) and `test`, in the order of the
    members and of their records. Source of the format and of the data: C.-L. Liu, F. Yin,
    D.-H. Wang and Q.-F. Wang, "CASIA Online and Offline Chinese Handwriting Databases", ICDAR 2011.
    """

    VERSION = tfds.core.Version(store.VERSION)
    # Nothing is downloaded; left alone, TFDS looks for a list of download addresses in the package.
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        *,
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
          members: what to prepare the data set from; none to read it only.
          skip_faults: count damaged records and go on, instead of raising InputError.
          skipped: (reason, "count" or "bytes") → number passed over before, for the manifest.
          characters: the charset: what else is there is passed over; none for level 1.
          faults: pictures that could not be used already, a line each, for the manifest.
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
        with WorkerPool() as pool:
            wanted = frozenset(self._characters or charset.level1())
            shards = self._write(pool, members, ["train"], wanted)
            trained = frozenset(character for _, _, character in _characters(shards))
            shards += self._write(pool, members, ["validation", "test"], trained)
        self._check(shards, trained)
        splits = [self._finish(split, shards) for split in members]
        self.info.set_splits(tfds.core.SplitDict([split for split in splits if split]))
        manifest = _manifest(self._members, shards, self._skipped, self._characters)
        manifest["faults"] = self._faults
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        Path(self.data_dir, store.MANIFEST).write_text(text, "utf-8")

    def _check(self, shards: "list[_Shard]", trained: frozenset[str]) -> None:
        """Stops at pictures that cannot be used, telling them, and where nothing is to learn."""
        self._faults += [fault for shard in shards for fault in shard.faults]
        if not self._skip_faults:
            labelled_images.check_faults(self._faults)
        if not trained:
            archives = ", ".join(sorted({member.archive for member in self._members}))
            kind = "character of the charset" if self._characters else "level-1 character"
            raise InputError(
                f"{archives}: no {kind} of a training writer: the archives of the "
                f"training writers are needed"
            )

    def _write(
        self,
        pool: WorkerPool,
        members: dict[str, list[Member]],
        splits: Sequence[str],
        classes: frozenset[str],
    ) -> "list[_Shard]":
        tasks = [
            _Task(split, self.data_dir, number, group, classes, self._skip_faults, self._characters)
            for split in splits
            for number, group in enumerate(_groups(members[split]))
        ]
        total = sum(member.num_bytes for split in splits for member in members[split])
        return pool.run(_write_shard, tasks, total, f"{self.name}: {', '.join(splits)}", "B")

    def _finish(self, split: str, shards: "list[_Shard]") -> tfds.core.SplitInfo | None:
        """Gives the shards that hold records their final names, which count them."""
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
        """Does nothing: TFDS would ask its cloud storage, which does not know this data set."""


@functools.cache
def features(characters: tuple[str, ...] = ()) -> tfds.features.FeaturesDict:
    """Returns the features of one record; ArrayRecord compresses the bitmap, without loss.

    Args:
      characters: the charset, in the order of the labels; none for level 1.
    """
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(None, None), dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(names=characters or charset.level1()),
            "character": tfds.features.Text(),
            "writer": tfds.features.Text(),
            "source": tfds.features.Text(doc="archive and member name"),
            "record": tfds.features.Scalar(np.int32, doc="number of the record in its member"),
        }
    )


@dataclasses.dataclass(frozen=True)
class _Task:
    """One file to write: its split, folder and number, its members, the characters wanted.

    `characters` is the data set's charset, none for level 1.
    """

    split: str
    folder: str
    number: int
    members: Sequence[Member]
    classes: frozenset[str]
    skip_faults: bool
    characters: tuple[str, ...] = ()


@dataclasses.dataclass
class _Shard:
    """What went into a file, by (archive, writer, character), and what did not.

    `skipped` counts by (reason, "count" or "bytes"); `faults` tells the pictures among it.
    """

    split: str
    path: Path
    num_records: int = 0
    num_bytes: int = 0
    characters: Counts = dataclasses.field(default_factory=Counts)
    skipped: Counts = dataclasses.field(default_factory=Counts)
    faults: list[str] = dataclasses.field(default_factory=list)

    def skip(self, reason: str, num_bytes: int) -> None:
        self.skipped[reason, "count"] += 1
        self.skipped[reason, "bytes"] += num_bytes


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """Returns runs of consecutive members, about `_SHARD_BYTES` or a little less in each."""
    total = sum(member.num_bytes for member in members)
    num_groups = -(-total // _SHARD_BYTES)
    groups: list[list[Member]] = [[] for _ in range(num_groups)]
    end = 0
    for member in members:
        groups[min(end * num_groups // max(total, 1), num_groups - 1)].append(member)
        end += member.num_bytes
    return [group for group in groups if group]


def _write_shard(task: _Task, advance: Advance) -> _Shard:
    """Streams members into one ArrayRecord file: memory holds a few records at a time."""
    # The final name holds the number of files, known only once the empty ones are out.
    shard = _Shard(task.split, Path(task.folder, f"{task.split}.{task.number}.part"))
    kinds = features(task.characters)
    serializer = tfds.core.ExampleSerializer(kinds.get_serialized_info())
    writer = array_record_module.ArrayRecordWriter(str(shard.path), "group_size:1")
    for member in task.members:
        done = 0
        for example, end in _examples(member, task, shard):
            serialized = serializer.serialize_example(kinds.encode_example(example))
            writer.write(serialized)
            shard.num_records += 1
            shard.num_bytes += len(serialized)
            advance(end - done)
            done = end
        advance(member.num_bytes - done)
    writer.close()
    return shard


def _examples(member: Member, task: _Task, shard: _Shard) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields (example, end of its record in the member) and counts what is kept and what is not."""
    place = _place(task.characters)
    for number, (character, record, end) in enumerate(_records(member, task, shard)):
        num_bytes = end - record.offset
        if character is None and task.skip_faults:
            shard.skip("unknown tag", num_bytes)
        elif character is None:
            raise InputError(
                f"{member.source}: byte {record.offset}: unknown tag {record.tag.hex()}; "
                f"--on_error=skip goes on without it"
            )
        elif character not in place:
            kind = "not in the charset" if task.characters else "not a level-1 character"
            shard.skip(kind, num_bytes)
        elif character not in task.classes:
            shard.skip("class without training characters", num_bytes)
        else:
            shard.characters[member.archive, member.writer, character] += 1
            example = {
                "image": record.bitmap,
                "label": place[character],
                "character": character,
                "writer": member.writer,
                "source": member.source,
                "record": number,
            }
            yield example, end


def _records(
    member: Member, task: _Task, shard: _Shard
) -> Iterator[tuple[str | None, gnt.Record, int]]:
    """Yields (character, record, end of it in the member); None where no character has its tag."""
    if member.character:
        try:
            record = gnt.Record(b"", labelled_images.read_bitmap(member), 0)
            yield member.character, record, member.num_bytes
        except InputError as error:
            shard.faults.append(str(error))
            shard.skip("unusable picture", member.num_bytes)
        return
    for record in read_member(member, shard.skip if task.skip_faults else None):
        end = record.offset + gnt.HEADER.size + record.bitmap.size
        yield charset.tag_to_character(record.tag), record, end


@functools.cache
def _place(characters: tuple[str, ...]) -> dict[str, int]:
    """Returns the map from a character to its label."""
    return {character: index for index, character in enumerate(characters or charset.level1())}


def _characters(shards: Sequence[_Shard]) -> Counts:
    return sum((shard.characters for shard in shards), Counts())


def _manifest(
    members: Sequence[Member],
    shards: Sequence[_Shard],
    skipped_before: Counts,
    characters: tuple[str, ...],
) -> dict[str, Any]:
    """Returns what the data set holds, as JSON: characters by split, archive, writer, class.

    `doubts` are lines for a person, on what may be wrong though it can be read; `not_trained` are
    the characters of a charset of one's own that no training writer wrote.
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
        "doubts": [] if any(member.character for member in members) else _doubts(shards, ordered),
        "not_trained": [c for c in characters if c not in ordered["train"]],
    }


def _doubts(shards: Sequence[_Shard], classes: dict[str, dict[str, int]]) -> list[str]:
    """Returns a few lines on what hints at wrong tags: a writer of CASIA writes each class once."""
    repeats = Counts(
        {
            f"{character} {count} times by writer {writer}": count
            for (_, writer, character), count in sorted(_characters(shards).items())
            if count > 1
        }
    )
    doubts = []
    if repeats:
        doubts.append(f"written more than once by one writer: {_worst(repeats)}")
    for split, counts in classes.items():
        usual = statistics.median(counts.values())
        distance = {
            f"{character} has {count}": abs(count - usual)
            for character, count in counts.items()
            if abs(count - usual) > max(_UNUSUAL_PART * usual, _UNUSUAL_COUNT)
        }
        if distance:
            message = f"classes of unusual size in {split}, where the median has {usual:g}"
            doubts.append(f"{message}: {_worst(Counts(distance))}")
    return doubts


def _worst(findings: Counts) -> str:
    """Returns the gravest findings and how many more there are, on one line."""
    shown = [text for text, _ in findings.most_common(_SHOWN_DOUBTS)]
    more = len(findings) - len(shown)
    return ", ".join([*shown, *([f"{more:,} more"] if more else [])])
