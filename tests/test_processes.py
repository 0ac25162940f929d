"""Several processes train what one process trains, and end together."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import ROOT, assert_same_checkpoint, rows

STRICT = ["--config.strict_determinism=True", "--config.batch_size=16"]


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


def test_two_processes_train_as_one_to_the_bit(
    tiny_job: list[str], tmp_path: Path, train: Callable[..., Path]
) -> None:
    flags = [*tiny_job, *STRICT, "--config.num_steps=4"]
    results = finish(start_group(flags, tmp_path, num_processes=2))
    assert [code for code, *_ in results] == [0, 0], results
    assert "test: top-1" in results[0][1]
    assert "top-1" not in results[1][1], "only the first process talks"
    alone = train(4, *STRICT)  # in this process, on four devices
    assert_same_checkpoint(tmp_path, alone, 4)
    names = ("train/loss", "train/accuracy", "eval/loss", "eval/top1")
    for one, other in zip(rows(tmp_path), rows(alone), strict=True):
        assert [one.get(name) for name in names] == [other.get(name) for name in names]
    files = [sorted(p.name for p in folder.iterdir()) for folder in (tmp_path, alone)]
    without_events = [[n for n in names if not n.startswith("events")] for names in files]
    assert without_events[0] == without_events[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: must be below JAX_NUM_PROCESSES=2"),
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID='': must be a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS='host': must be host:port"),
    ],
)
def test_a_wrong_environment_is_told(changes: dict[str, str], message: str) -> None:
    environment = {
        "JAX_COORDINATOR_ADDRESS": "localhost:9",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    code = "from hccr_jax import processes; processes.join(9)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment | changes,
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert re.search(f"InputError: {re.escape(message)}", done.stderr), done.stderr
