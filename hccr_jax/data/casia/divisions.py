"""Who is in which split: by names, by CASIA's writer numbers, or held out by a hash."""

import hashlib
import re
from collections.abc import Sequence

# Source: the official division of HWDB1.0 (001 to 420) and HWDB1.1 (1001 to 1300) by writer.
OFFICIAL_WRITERS = {
    "train": (range(1, 337), range(1001, 1241)),
    "test": (range(337, 421), range(1241, 1301)),
}
VALIDATION_FRACTION = 0.1
# With this salt the hash picks 24 of the 240 training writers of HWDB1.1 and 32 of the 336 of 1.0.
_VALIDATION_SALT = "validation 4 "
# A separate word (`HWDB1.1trn_gnt`) or capitalised (`Gnt1.1TrainPart1`), not part of `latest`.
_SPLIT_NAME = re.compile(
    r"(?:(?<![A-Za-z])|(?=T[rse]))(?i:(trn|train)|tst|test)(?:ing|set)?(?![a-z])"
)
# The test set of the ICDAR 2013 competition, `competition-gnt.zip`.
_COMPETITION = re.compile("competition", re.IGNORECASE)


def find_split(names: Sequence[str], writer: str) -> str | None:
    """Returns "train" or "test" by the first unambiguous name, else by the writer's number.

    Args:
      names: of the folders and archives around a file, from the innermost.
      writer: the official split of its number counts if no name has one.

    >>> find_split(["", "HWDB1.1trn_gnt_P1"], "1"), find_split(["Gnt1.1Test"], "1")
    ('train', 'test')
    >>> find_split(["latest"], "1"), find_split(["latest"], "anna")
    ('train', None)
    """
    for name in names:
        found = {"train" if trn else "test" for trn in _SPLIT_NAME.findall(name)}
        found |= {"test" for _ in _COMPETITION.findall(name)}
        if len(found) == 1:
            return found.pop()
    for split, ranges in OFFICIAL_WRITERS.items():
        if writer.isdecimal() and any(int(writer) in numbers for numbers in ranges):
            return split
    return None


def validation_writers(writers: Sequence[str]) -> frozenset[str]:
    """Returns the training writers that `hold_out` selects for validation.

    >>> len(validation_writers([str(i) for i in range(1001, 1241)]))
    24
    >>> validation_writers(["1001"]), len(validation_writers(["1001", "1002"]))
    (frozenset(), 1)
    """
    return hold_out(writers, _VALIDATION_SALT)


def hold_out(names: Sequence[str], salt: str) -> frozenset[str]:
    """Returns the names whose hash is in the lowest tenth of its range.

    Each name is decided independently of the others, but of two or more names at least one is
    held out and at least one is not.

    Args:
      names: of writers, or other identifiers.
      salt: hashed with each name; another salt selects other names.
    """

    def place(name: str) -> float:
        digest = hashlib.sha256(f"{salt}{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    ranked = sorted(set(names), key=place)
    count = max(sum(place(name) < VALIDATION_FRACTION for name in ranked), 1)
    return frozenset(ranked[: max(min(count, len(ranked) - 1), 0)])
