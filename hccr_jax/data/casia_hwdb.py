"""The data set as a TensorFlow Datasets builder: original bitmaps in ArrayRecord files.

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

from hccr_jax.data import charset, gnt, store
from hccr_jax.data.archives import Member, divide, fingerprint, read_member
from hccr_jax.data.workers import Advance, WorkerPool
from hccr_jax.errors import InputError

# Small enough to keep all cores busy on a small set, large enough that the full one has few files.
_SHARD_BYTES = 24 << 20
# A class is of unusual size when it is off the median by more than this part and this number of
# images: real classes of HWDB1.1 lack a few of 240 writers.
_UNUSUAL_PART = 1 / 3
_UNUSUAL_COUNT = 3
_SHOWN_DOUBTS = 3

Counts = collections.Counter[Any]


class CasiaHwdb(FileReaderBuilder):
    """Handwritten level-1 Chinese characters with class, writer and origin.

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
    ):
        """Creates the builder.

        Args:
          data_dir: folder of all data sets.
          name: the data set's name.
          members: what to prepare the data set from; none to read it only.
          skip_faults: count damaged records and go on, instead of raising InputError.
          skipped: (reason, "count" or "bytes") → number passed over before, for the manifest.
        """
        self.name = name
        self._members = members
        self._skip_faults = skip_faults
        self._skipped = skipped or Counts()
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            description="Handwritten level-1 Chinese characters with class, writer and origin.",
            features=features(),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the shards and the manifest into the temporary folder that TFDS then renames."""
        del dl_manager, download_config
        members = divide(self._members)
        with WorkerPool() as pool:
            shards = self._write(pool, members, ["train"], frozenset(charset.level1()))
            trained = frozenset(character for _, _, character in _characters(shards))
            if not trained:
                archives = ", ".join(sorted({member.archive for member in self._members}))
                raise InputError(
                    f"{archives}: no level-1 character of a training writer: the archives of the "
                    f"training writers are needed"
                )
            shards += self._write(pool, members, ["validation", "test"], trained)
        splits = [self._finish(split, shards) for split in members]
        self.info.set_splits(tfds.core.SplitDict([split for split in splits if split]))
        manifest = _manifest(self._members, shards, self._skipped)
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        Path(self.data_dir, store.MANIFEST).write_text(text, "utf-8")

    def _write(
        self,
        pool: WorkerPool,
        members: dict[str, list[Member]],
        splits: Sequence[str],
        classes: frozenset[str],
    ) -> "list[_Shard]":
        tasks = [
            _Task(split, self.data_dir, number, group, classes, self._skip_faults)
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
def features() -> tfds.features.FeaturesDict:
    """Returns the features of one record; ArrayRecord compresses the bitmap, without loss."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(None, None), dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(names=charset.level1()),
            "character": tfds.features.Text(),
            "writer": tfds.features.Text(),
            "source": tfds.features.Text(doc="archive and member name"),
            "record": tfds.features.Scalar(np.int32, doc="number of the record in its member"),
        }
    )


@dataclasses.dataclass(frozen=True)
class _Task:
    """One file to write: its split, folder and number, its members, the characters wanted."""

    split: str
    folder: str
    number: int
    members: Sequence[Member]
    classes: frozenset[str]
    skip_faults: bool


@dataclasses.dataclass
class _Shard:
    """What went into a file, by (archive, writer, character), and what did not.

    `skipped` counts by (reason, "count" or "bytes").
    """

    split: str
    path: Path
    num_records: int = 0
    num_bytes: int = 0
    characters: Counts = dataclasses.field(default_factory=Counts)
    skipped: Counts = dataclasses.field(default_factory=Counts)

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
    serializer = tfds.core.ExampleSerializer(features().get_serialized_info())
    writer = array_record_module.ArrayRecordWriter(str(shard.path), "group_size:1")
    for member in task.members:
        done = 0
        for example, end in _examples(member, task, shard):
            serialized = serializer.serialize_example(features().encode_example(example))
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
    for number, record in enumerate(read_member(member, shard.skip if task.skip_faults else None)):
        character = charset.tag_to_character(record.tag)
        num_bytes = gnt.HEADER.size + record.bitmap.size
        if character is None and task.skip_faults:
            shard.skip("unknown tag", num_bytes)
        elif character is None:
            raise InputError(
                f"{member.source}: byte {record.offset}: unknown tag {record.tag.hex()}; "
                f"--on_error=skip goes on without it"
            )
        elif character not in charset.class_index():
            shard.skip("not a level-1 character", num_bytes)
        elif character not in task.classes:
            shard.skip("class without training characters", num_bytes)
        else:
            shard.characters[member.archive, member.writer, character] += 1
            example = {
                "image": record.bitmap,
                "label": charset.class_index()[character],
                "character": character,
                "writer": member.writer,
                "source": member.source,
                "record": number,
            }
            yield example, record.offset + num_bytes


def _characters(shards: Sequence[_Shard]) -> Counts:
    return sum((shard.characters for shard in shards), Counts())


def _manifest(
    members: Sequence[Member], shards: Sequence[_Shard], skipped_before: Counts
) -> dict[str, Any]:
    """Returns what the data set holds, as JSON: characters by split, archive, writer, class.

    `doubts` are lines for a person, on what may be wrong though it can be read.
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
        split: {c: counts[c] for c in charset.level1() if c in counts}
        for split, counts in classes.items()
    }
    return {
        "fingerprint": fingerprint(members),
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
        "doubts": _doubts(shards, ordered),
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
