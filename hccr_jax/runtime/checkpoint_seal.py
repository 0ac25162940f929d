"""SHA-256 sums of a folder's files: what is read is what was written, or the damage has a name."""

import hashlib
import json
from pathlib import Path

from hccr_jax.runtime.workdir import replace_text

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the sums of all files below a folder into it; the last thing to be written there."""
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in _files(folder)}
    replace_text(folder / NAME, json.dumps(sums, indent=0, sort_keys=True) + "\n")


def has(folder: Path) -> bool:
    """Returns whether a folder was finished."""
    return (folder / NAME).is_file()


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with a folder that has a manifest, or None.

    Args:
      folder: nobody writes to it.

    Returns:
      The first file that is not as it was, and how; "manifest.json: missing" where a folder was
      never finished.
    """
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        sums = json.loads(text)
        if json.dumps(sums, indent=0, sort_keys=True) + "\n" != text:
            return f"{NAME}: changed"
    except FileNotFoundError:
        return f"{NAME}: missing"
    except (OSError, ValueError) as error:
        return f"{NAME}: {error}"
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name, wanted in sums.items():
        if name not in there:
            return f"{name}: missing"
        try:
            if _sum(there[name]) != wanted:
                return f"{name}: changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    if new := sorted(there.keys() - sums.keys()):
        return f"{new[0]}: not of this checkpoint"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
