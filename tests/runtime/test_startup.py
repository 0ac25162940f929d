"""Settings that precede the start of JAX, and the report of a run's startup."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hccr_jax.runtime import xla_flags
from hccr_jax.runtime.startup import Timeline

PROGRAM = """
import os, pathlib
from hccr_jax.runtime import startup
startup.prepare_process()
import jax, jax.numpy as jnp
jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
print(os.environ.get("XLA_FLAGS", ""))
"""

# Writes glibc's report of its heaps ("arenas") after each of many threads has allocated memory.
HEAPS = """
import ctypes, runpy, sys, threading
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
def count():
    hold = threading.Barrier(8)
    def ask():
        libc.malloc(1000)
        hold.wait()
    threads = [threading.Thread(target=ask) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    file = ctypes.c_void_p(libc.fopen(sys.argv[-1].encode(), b"w"))
    libc.malloc_info(0, file), libc.fclose(file)
sys.argv = ["main", "--help", sys.argv[1]]
try:
    runpy.run_module("hccr_jax.main", run_name="__main__")
finally:
    count()
"""


def run(**variables: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def programs(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*-cache")}


def test_compiled_programs_are_kept_for_the_next_process(tmp_path: Path) -> None:
    folder, _ = run(XDG_CACHE_HOME=str(tmp_path))
    assert Path(folder).is_relative_to(tmp_path)
    first = programs(tmp_path)
    assert first
    run(XDG_CACHE_HOME=str(tmp_path))
    assert programs(tmp_path) == first, "the second process compiled something again"


@pytest.mark.parametrize("variables", [{}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}])
def test_the_cache_is_in_the_home_and_never_in_the_current_folder(
    variables: dict[str, str], tmp_path: Path
) -> None:
    program = "from hccr_jax.ops import native; print(native.cache_folder())"
    kept = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | variables | {"HOME": str(tmp_path)}, cwd="/",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / ".cache" / "hccr_jax")


def test_a_user_of_no_list_and_without_a_home_has_a_cache_of_its_own(tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    kept = {k: v for k, v in kept.items() if not k.startswith("JAX_")}
    prefix = ["unshare", "--user", "--map-user=4242"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare cannot make a namespace of users here")

    def folder() -> Path:
        done = subprocess.run(
            [*prefix, sys.executable, "-c", PROGRAM], env=kept | {"TMPDIR": str(tmp_path)},
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == ""
        return Path(done.stdout.splitlines()[0])

    own = tmp_path / "hccr_jax-4242"
    assert folder() == own / "compiled"
    assert programs(own)
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)  # anybody could have put a library there
    assert folder().parent.parent == tmp_path
    assert folder() != own / "compiled"


def test_settings_of_the_environment_are_kept(tmp_path: Path) -> None:
    own = "--xla_cpu_enable_fast_math=true"
    folder, flags = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path), XLA_FLAGS=own)
    assert folder == str(tmp_path)
    assert flags.endswith(own)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other memory management")
def test_a_training_has_one_heap_for_all_its_threads(tmp_path: Path) -> None:
    # Once a thread has a heap of its own, JAX's threads share it: then each step's working memory
    # is mapped again, and a step took 1.6 times as long.
    information = tmp_path / "heaps.xml"
    subprocess.run([sys.executable, "-c", HEAPS, str(information)], capture_output=True, check=True)
    assert information.read_text().count("<heap nr=") == 1


def test_a_phase_lasts_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.5, 14.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    timeline = Timeline()
    timeline.lap("imports")
    timeline.lap("compile")
    assert str(timeline) == "first step done after 4.0 s: imports 1.5 s, compile 2.5 s"


def test_flags_of_the_environment_have_the_last_word(tmp_path: Path, monkeypatch) -> None:
    own = "--xla_gpu_enable_command_buffer="
    monkeypatch.setenv("XLA_FLAGS", own)
    (tmp_path / "jax_cuda12_plugin").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):  # a process that starts another
        xla_flags.set_flags()
        assert os.environ["XLA_FLAGS"] == f"--xla_gpu_enable_command_buffer=+WHILE {own}"
