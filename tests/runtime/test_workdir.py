"""A workdir has one writer, is writable and has space; otherwise it is refused at once."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hccr_jax.errors import InputError
from hccr_jax.runtime.workdir import check_room, check_writable, only_writer

HOLD = """
import sys, time
from pathlib import Path
from hccr_jax.runtime.workdir import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def enter(folder: Path) -> None:
    with only_writer(folder):
        pass


def test_a_second_writer_is_refused_until_the_first_is_gone_even_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    for _ in range(20):
        with pytest.raises(InputError, match=f"in use by process {holder.pid} on ."):
            enter(folder)
    holder.kill()
    holder.communicate()
    with only_writer(folder):
        assert str(os.getpid()) in (folder / "lock").read_text()


def test_a_new_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), only_writer(tmp_path / "a" / "b"):
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a"):
        (tmp_path / "a" / "result").touch()
    with pytest.raises(ValueError, match="bad"), only_writer(tmp_path / "a"):
        raise ValueError("bad")
    assert (tmp_path / "a" / "result").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: not a folder; choose another"):
        check_writable(tmp_path / "file" / "run")


def test_too_little_space_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    check_room(tmp_path, 1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(InputError, match=r"File too large: 3 MiB are needed"):
            check_room(tmp_path, 3 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
