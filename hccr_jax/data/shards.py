"""The files of a data set: ArrayRecord shards, each written by one worker process.

Whole shards are parsed, serialised and written by the workers, because TFDS's own writer works on
one core and holds a split in memory (up to 1 GB, beyond which it needs TensorFlow).
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from hccr_jax.data import labelled_images
from hccr_jax.data.casia import charset, gnt
from hccr_jax.data.casia.archives import Member, read_member
from hccr_jax.errors import InputError
from hccr_jax.runtime.worker_pool import Advance

# Small enough to keep all cores busy on a small set, large enough that the full one has few files.
_SHARD_BYTES = 24 << 20
_VALIDATION_PERIOD = 10

Counts = collections.Counter[Any]


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
class Task:
    """A file to write.

    Attributes:
      split, folder, number: of the file.
      members: the sources of its records.
      classes: the characters to keep.
      skip_faults: count damaged records and go on, instead of raising InputError.
      characters: the data set's charset; none for level 1.
      by_record: train and validation are of the same members: each class's second record and every
        tenth after it are for validation.
    """

    split: str
    folder: str
    number: int
    members: Sequence[Member]
    classes: frozenset[str]
    skip_faults: bool
    characters: tuple[str, ...] = ()
    by_record: bool = False


@dataclasses.dataclass
class Shard:
    """A written file and its counts.

    Attributes:
      characters: counted by (archive, writer, character).
      skipped: records left out, counted by (reason, "count" or "bytes").
      faults: a line for each unusable picture among them.
      swapped: records whose tag would be of the charset if its two bytes were swapped.
      digests: 8 bytes of a hash of each record's character and bitmap.
    """

    split: str
    path: Path
    num_records: int = 0
    num_bytes: int = 0
    characters: Counts = dataclasses.field(default_factory=Counts)
    skipped: Counts = dataclasses.field(default_factory=Counts)
    faults: list[str] = dataclasses.field(default_factory=list)
    swapped: int = 0
    digests: bytearray = dataclasses.field(default_factory=bytearray)

    def skip(self, reason: str, num_bytes: int) -> None:
        """Counts a record that is left out."""
        self.skipped[reason, "count"] += 1
        self.skipped[reason, "bytes"] += num_bytes


def group_members(members: Sequence[Member]) -> list[list[Member]]:
    """Returns runs of consecutive members, about `_SHARD_BYTES` or a little less in each."""
    total = sum(member.num_bytes for member in members)
    numgroup_members = -(-total // _SHARD_BYTES)
    groups: list[list[Member]] = [[] for _ in range(numgroup_members)]
    end = 0
    for member in members:
        groups[min(end * numgroup_members // max(total, 1), numgroup_members - 1)].append(member)
        end += member.num_bytes
    return [group for group in groups if group]


def write_shard(task: Task, advance: Advance) -> Shard:
    """Streams members into one ArrayRecord file: memory holds a few records at a time."""
    # The final name has the number of files, which is known only without the empty ones.
    shard = Shard(task.split, Path(task.folder, f"{task.split}.{task.number}.part"))
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
    if task.by_record and task.split == "validation":
        shard.skipped.clear()  # counted with the training records
        shard.swapped = 0
    return shard


def _examples(member: Member, task: Task, shard: Shard) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields (example, end of its record in the member); counts the kept and the skipped."""
    place, seen = _place(task.characters), Counts()
    for number, (character, record, end) in enumerate(_records(member, task, shard)):
        num_bytes = end - record.offset
        shard.swapped += charset.tag_to_character(record.tag[::-1]) in place
        if character is None and task.skip_faults:
            shard.skip("unknown tag", num_bytes)
        elif character is None:
            raise InputError(
                f"{member.source}: byte {record.offset}: unknown tag {record.tag.hex()}; "
                f"--on_error=skip skips it"
            )
        elif character not in place:
            kind = "not in the charset" if task.characters else "not a level-1 character"
            shard.skip(kind, num_bytes)
        elif character not in task.classes:
            shard.skip("class without training characters", num_bytes)
        elif task.by_record and _validates(seen, character) != (task.split == "validation"):
            continue
        else:
            shard.characters[member.archive, member.writer, character] += 1
            shard.digests += _digest(character, record.bitmap)
            example = {
                "image": record.bitmap,
                "label": place[character],
                "character": character,
                "writer": member.writer,
                "source": member.source,
                "record": number,
            }
            yield example, end


def _digest(character: str, bitmap: np.ndarray) -> bytes:
    content = f"{character} {bitmap.shape} ".encode() + bitmap.tobytes()
    return hashlib.blake2b(content, digest_size=8).digest()


def _validates(seen: Counts, character: str) -> bool:
    """Counts a record of a class; returns whether it is for validation, if records are divided."""
    seen[character] += 1
    return seen[character] % _VALIDATION_PERIOD == 2


def _records(
    member: Member, task: Task, shard: Shard
) -> Iterator[tuple[str | None, gnt.Record, int]]:
    """Yields (character, record, end of it in the member); None for an unknown tag."""
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
