"""The training program compiled for a GPU: its counts stay below what was reached."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

from hccr_jax.cli import command

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
HAS_PLUGIN = any(map(importlib.util.find_spec, PLUGINS))


def count(config: str, batch_size: int, devices: int) -> dict:
    """A process of its own: JAX runs on the CPU here, and would not load the plugin."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    arguments = [
        f"--config={ROOT / 'configs' / config}.py", "--suite=compiled", f"--devices={devices}",
        f"--batch_size={batch_size}", "--num_classes=3755",
    ]  # fmt: skip
    command = [sys.executable, "-m", "hccr_jax", "benchmark", *arguments]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PLUGIN, reason="needs the extra cuda12 or cuda13")
@pytest.mark.parametrize(
    ("config", "batch_size", "devices", "launches", "gigabytes"),
    [
        ("v2", 1024, 1, 400, 9.5), ("v2", 256, 1, 400, 3.0), ("v1", 1024, 1, 300, 8.5),
        ("v2", 8 * 1024, 8, 450, 9.5),
    ],
)  # fmt: skip
def test_counts_stay_below_their_bounds(config, batch_size, devices, launches, gigabytes):
    row = count(config, batch_size, devices)
    assert row["launches"] <= launches
    assert row["gigabytes"] <= gigabytes
    assert row["exchanges"] == (devices > 1)
    if devices == 1:
        assert row["host_turns"] == 0
    assert sum(row["spilled_bytes"].values()) == 0


@pytest.mark.skipif(HAS_PLUGIN, reason="the extra is installed")
def test_without_the_extra_the_command_says_which(capsys):
    config = f"--config={ROOT / 'configs' / 'v2.py'}"
    assert command.main(["benchmark", config, "--suite=compiled"]) == 2
    said = capsys.readouterr().err
    assert "--target=h200: JAX cannot compile for it: pip install 'hccr_jax[cuda12]'" in said
    assert said.count("\n") == 1
