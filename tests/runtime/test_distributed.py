"""Several processes train what one process trains, and end together."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import ROOT, assert_same_checkpoint, finish, rows, start_group

STRICT = ["--config.strict_determinism=True", "--config.batch_size=16"]


@pytest.mark.slow
def test_two_processes_train_as_one_to_the_bit(
    tiny_job: list[str], tmp_path: Path, train: Callable[..., Path]
) -> None:
    flags = [*tiny_job, *STRICT, "--config.num_steps=4"]
    results = finish(start_group(flags, tmp_path, num_processes=2))
    assert [code for code, *_ in results] == [0, 0], results
    assert "test: top-1" in results[0][1]
    assert "top-1" not in results[1][1], "only the primary process prints"
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
def test_a_wrong_environment_is_reported(changes: dict[str, str], message: str) -> None:
    environment = {
        "JAX_COORDINATOR_ADDRESS": "localhost:9",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    code = "from hccr_jax.runtime import distributed; distributed.initialize(9)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment | changes,
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert re.search(f"InputError: {re.escape(message)}", done.stderr), done.stderr
