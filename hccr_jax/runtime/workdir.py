"""The folder of a run: one that can be written, has room, and has one writer."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from hccr_jax.errors import InputError


def check_writable(workdir: Path) -> None:
    """Checks that a workdir is a folder that can be written, or can be made.

    Raises:
      InputError: says why not.
    """
    path = workdir.absolute()
    there = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        reason = "no permission to write" if there.is_dir() else "not a folder"
        raise InputError(f"--workdir={workdir}: {there}: {reason}; choose another")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made where missing, against other processes that ask for it.

    The lock goes when its holder ends, however that happens. A folder that was made here and that
    an exception finds empty is removed again.

    Raises:
      InputError: another process has it, or the folder cannot be written; says who, or why.
    """
    folder = folder.absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise InputError(
                f"{folder}: in use by {holder}: wait for it, or choose another --workdir"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        try:
            yield
        except BaseException:
            if made and os.listdir(folder) == ["lock"]:
                (folder / "lock").unlink()
                with contextlib.suppress(OSError):
                    for path in made:
                        path.rmdir()
            raise


def check_room(folder: Path, num_bytes: int) -> None:
    """Checks that a folder's file system has room, by taking it for a moment.

    Raises:
      InputError: says how much is needed.
    """
    path = folder / "room"
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror}: {num_bytes / 2**20:,.0f} MiB are needed"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file in whole, in place of what it held."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
