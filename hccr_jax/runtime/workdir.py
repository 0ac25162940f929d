"""The folder of a run: found, writable, with enough disk space, and with one writer."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from hccr_jax.errors import InputError
from hccr_jax.paths import expand


def check_writable(workdir: Path) -> None:
    """Checks that a workdir is writable, or can be created.

    Raises:
      InputError: gives the reason if not.
    """
    path = workdir.absolute()
    existing = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        reason = "no permission to write" if existing.is_dir() else "not a folder"
        raise InputError(f"--workdir={workdir}: {existing}: {reason}; choose another")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Locks a folder, which is created if missing, against other processes.

    The lock is released when its holder ends, even if killed. A folder that was created here and is
    still empty at an exception is removed again.

    Raises:
      InputError: another process, which is named, has the lock, or the folder is not writable.
    """
    folder = folder.absolute()
    created = [path for path in (folder, *folder.parents) if not path.exists()]
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
            if created and os.listdir(folder) == ["lock"]:
                (folder / "lock").unlink()
                with contextlib.suppress(OSError):
                    for path in created:
                        path.rmdir()
            raise


def find_checkpoints(path: str | Path, source: str = "") -> Path:
    """Returns the folder of a run's checkpoints.

    Args:
      path: that folder, or the run's.
      source: where the path comes from, as in "config.init_from=", to begin the error with.

    Raises:
      InputError: there is no such folder.
    """
    folder = expand(path)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if not folder.is_dir():
        raise InputError(
            f"{source}{folder}: no such folder; give the --workdir of a run, or its folder "
            f"checkpoints"
        )
    return folder


def check_room(folder: Path, num_bytes: int) -> None:
    """Checks a folder's free disk space, by allocating it for a moment.

    Raises:
      InputError: gives the space needed.
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
    """Replaces a UTF-8 file atomically."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
