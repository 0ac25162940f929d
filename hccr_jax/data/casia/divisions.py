"""Who is in which split: by names, by CASIA's writer numbers, or held out by a hash."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

# Source: the official division of HWDB1.0 (001 to 420) and HWDB1.1 (1001 to 1300) by writer.
OFFICIAL_WRITERS = {
    "train": (range(1, 337), range(1001, 1241)),
    "test": (range(337, 421), range(1241, 1301)),
}
VALIDATION_FRACTION = 0.1
# With this salt the hash picks 24 of the 240 training writers of HWDB1.1 and 32 of the 336 of 1.0.
_VALIDATION_SALT = "validation 4 "
SPLITS = ("train", "validation", "test")
# The writer of pictures without one, and of a file that holds several.
UNKNOWN_WRITER = "unknown"
# A separate word (`HWDB1.1trn_gnt`, `train_data`) or capitalised (`Gnt1.1TrainPart1`), not part of
# `latest` or `trainer`. The test set of the ICDAR 2013 competition is `competition-gnt.zip`.
_SPLIT_NAME = re.compile(
    r"(?:(?<![A-Za-z])|(?=T[rse]|Va))"
    r"(?i:(?P<train>train(?:ing)?|trn)|(?P<test>test(?:ing)?|tst)"
    r"|(?P<validation>val|valid(?:ation)?))"
    r"(?i:(?:data)?sets?|data|images?|imgs?|pictures?|pics?|samples?|files?|s)?(?![a-z])"
    r"|(?P<train_>训练|訓練)|(?P<test_>测试|測試|(?i:competition))|(?P<validation_>验证|驗證)"
)


def split_of(name: str) -> str:
    """Returns the split that a name denotes: of a folder, an archive or a file, or in a table.

    Returns:
      "train", "validation" or "test"; "" if it denotes none, or several.

    >>> [split_of(name) for name in ("HWDB1.1trn_gnt", "test_data", "验证集", "Val")]
    ['train', 'test', 'validation', 'validation']
    >>> [split_of(name) for name in ("latest", "evaluation", "train_test_split", "dev")]
    ['', '', '', '']
    """
    words = _SPLIT_NAME.finditer(unicodedata.normalize("NFC", name))
    found = {word.lastgroup.rstrip("_") for word in words if word.lastgroup}
    return found.pop() if len(found) == 1 else ""


def find_split(names: Sequence[str], writer: str = "") -> str:
    """Returns the split by the first name that denotes one, else by the writer's number.

    Args:
      names: of the folders and archives around a file, from the innermost.
      writer: the official split of its number counts if no name has one.

    >>> find_split(["", "HWDB1.1trn_gnt_P1"], "1"), find_split(["Gnt1.1Test"], "1")
    ('train', 'test')
    >>> find_split(["latest"], "1"), find_split(["latest"], "anna")
    ('train', '')
    """
    for split in filter(None, map(split_of, names)):
        return split
    for split, ranges in OFFICIAL_WRITERS.items():
        if writer.isdecimal() and any(int(writer) in numbers for numbers in ranges):
            return split
    return ""


def validation_writers(writers: Sequence[str]) -> frozenset[str]:
    """Returns the training writers that `hold_out` selects for validation; never the unknown.

    >>> len(validation_writers([str(i) for i in range(1001, 1241)]))
    24
    >>> validation_writers(["1001"]), len(validation_writers(["1001", "1002"]))
    (frozenset(), 1)
    """
    return hold_out([writer for writer in writers if writer != UNKNOWN_WRITER], _VALIDATION_SALT)


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
