"""A user's files and folders: their paths, their walk, and names fit to be shown."""

import os
from collections.abc import Iterator
from pathlib import Path

from hccr_jax.errors import InputError


def expand(path: str | Path) -> Path:
    """Returns a path as a user wrote it, `~` and `~name` at its start replaced as in a shell.

    Where there is no user of that name, it is the name of a file.

    Raises:
      InputError: it is empty, or there is no home folder.
    """
    text = os.fspath(path)
    if not text:
        raise InputError("an empty path: name a file or folder, or leave it out")
    expanded = os.path.expanduser(text)
    if text.split("/")[0] == "~" and (expanded == text or os.environ.get("HOME") == ""):
        raise InputError(f"{text}: there is no home folder: set HOME, or write the path without ~")
    return Path(expanded)


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields (folder, names of its files) for a folder and all below it, both in order of names.

    Links are followed, except to a folder around them: what is there is found anyway. Hidden names
    are left out, among them the `._name` that macOS writes beside a file, and its `__MACOSX`.

    Raises:
      InputError: a folder cannot be read, or something is neither a file nor a folder.
    """
    pending: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while pending:
        folder, around = pending.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            entries = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
            folders = [entry.name for entry in entries if entry.is_dir()]
            files = [entry.name for entry in entries if not entry.is_dir()]
            odd = [entry.name for entry in entries if not (entry.is_dir() or entry.is_file())]
        except OSError as error:
            place = shown(error.filename or folder)
            raise InputError(f"{place}: cannot be read: {error.strerror}") from error
        if (status.st_dev, status.st_ino) in around:
            continue
        if odd:
            raise InputError(f"{shown(folder / odd[0])}: not a file, or a broken link: remove it")
        yield folder, files
        around |= {(status.st_dev, status.st_ino)}
        pending += [(folder / name, around) for name in reversed(folders)]


def shown(path: str | Path) -> str:
    """Returns a path as text that can be encoded: bytes that are not UTF-8 are read as GBK.

    Chinese Windows packs names in GBK. Bytes that are neither are shown as `\\xff`.

    >>> shown("a/\\udcd3\\udcc0.png"), shown("永/\\udcff.png")
    ('a/永.png', '永/\\\\xff.png')
    """
    return "/".join(map(_shown_name, str(path).split("/")))


def _shown_name(name: str) -> str:
    data = name.encode("utf-8", "surrogateescape")
    for encoding in ("utf-8", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            pass
    return data.decode("utf-8", "backslashreplace")
