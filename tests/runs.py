"""What tests of whole runs share: starting them, stopping them, and reading what they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[1]
EVERY_STEP = ["--config.checkpoint.every_steps=1", "--config.checkpoint.keep_latest=99"]


def start(flags: list[str], workdir: Path, devices: int | None = None) -> subprocess.Popen[str]:
    """Starts the job in a process of its own, on as many devices as this one has by default."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices or jax.device_count())}
    command = [sys.executable, "-m", "hccr_jax.main", *flags, f"--workdir={workdir}"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rows(workdir: Path) -> list[dict[str, float]]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_saved(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def saved(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint by its path, read without this package."""
    arrays = {}
    folder = workdir.absolute() / "checkpoints" / str(step)
    for item in ("params", "eval_batch_stats", "progress"):
        path = folder / item
        if not path.exists():  # a network without batch norms
            continue
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            there = checkpointer.metadata(path).item_metadata.tree
            # As NumPy arrays, whatever devices they were saved from.
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
            arguments = ocp.args.PyTreeRestore(restore_args=kinds)
            tree = checkpointer.restore(path, args=arguments)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def assert_same_checkpoint(one: Path, other: Path, step: int) -> None:
    first, second = saved(one, step), saved(other, step)
    assert set(first) == set(second)
    assert first["progress['step']"] == step
    different = [name for name in first if first[name].tobytes() != second[name].tobytes()]
    assert different == []


def stop(number: signal.Signals, flags: list[str], workdir: Path, ready: Callable[[], bool]) -> int:
    """Starts a run, sends it a signal once it is ready, and returns its exit code."""
    process = start(flags, workdir)
    try:
        wait_for(process, ready)
        process.send_signal(number)
        process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def start_group(
    flags: list[str],
    workdir: Path,
    num_processes: int,
    num_devices: int = 1,
    program: tuple[str, ...] = ("-m", "hccr_jax.main"),
) -> list[subprocess.Popen[str]]:
    """Starts a job in some processes of so many devices each."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(num_processes),
    }
    command = [sys.executable, *program, *flags, f"--workdir={workdir}"]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=environment | {"JAX_PROCESS_ID": str(index)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(num_processes)
    ]  # fmt: skip


def finish(group: list[subprocess.Popen[str]], timeout: float = 600) -> list[tuple[int, str, str]]:
    """Waits for all and returns their exit codes, outputs and messages."""
    try:
        said = [process.communicate(timeout=timeout) for process in group]
    finally:
        for process in group:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(group, said, strict=True)]
