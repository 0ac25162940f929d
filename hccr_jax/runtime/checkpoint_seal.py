"""The seal of a checkpoint: SHA-256 sums of its files, written last, by which damage is found."""

import hashlib
import json
from pathlib import Path

from hccr_jax.runtime.workdir import replace_text

SEAL = "manifest.json"


def write_seal(folder: Path) -> None:
    """Writes the sums of all files below a folder into it, as the last file of a checkpoint."""
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in _files(folder)}
    replace_text(folder / SEAL, _to_text(sums))


def is_sealed(folder: Path) -> bool:
    """Returns whether a folder was finished."""
    return (folder / SEAL).is_file()


def find_damage(folder: Path) -> str | None:
    """Returns how a folder differs from its seal, or None.

    Args:
      folder: not being written to.

    Returns:
      The first file that was changed, with the kind of change; "manifest.json: missing" for a
      folder that was never finished.
    """
    try:
        text = (folder / SEAL).read_text(encoding="utf-8")
        sums = json.loads(text)
        if _to_text(sums) != text:
            return f"{SEAL}: changed"
    except FileNotFoundError:
        return f"{SEAL}: missing"
    except (OSError, ValueError) as error:
        return f"{SEAL}: {error}"
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name, expected in sums.items():
        if name not in files:
            return f"{name}: missing"
        try:
            if _sum(files[name]) != expected:
                return f"{name}: changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    if unknown := sorted(files.keys() - sums.keys()):
        return f"{unknown[0]}: not of this checkpoint"
    return None


def _to_text(sums: dict[str, str]) -> str:
    return json.dumps(sums, indent=0, sort_keys=True) + "\n"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
