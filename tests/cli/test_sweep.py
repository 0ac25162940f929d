"""The sweep through real runs of seconds: skipped, failed, stopped, resumed, rendered."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hccr_jax.cli import command

ROOT = Path(__file__).parents[2]
FILE = """
from hccr_jax.configs import default

NAMES = {names}
CHANGES = {{
    "tiny": {{}},
    "other": {{"checkpoint.keep_best": 2}},
    "broken": {{"batch_size": 96}},
    "long": {{"num_steps": {num_steps}, "eval.every_steps": 100000}},
}}


def get_config(name):
    config = default.get_config()
    config.update_from_flattened_dict({job} | CHANGES[name])
    return config
"""
NAMES = {
    "tiny": "as it is",
    "Others": {"broken": "too large", "other": "keeps two"},
    "long": "long",
}


@pytest.fixture
def file(tiny_job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an experiments file of tiny jobs; runs start where they find the package."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    path = tmp_path / "tiny.py"
    write(path, tiny_job)
    return path


def write(path: Path, tiny_job: list[str], num_steps: int = 100_000, **names: object) -> None:
    job = {}
    for flag in tiny_job[1:]:
        key, value = flag.removeprefix("--config.").split("=")
        job[key] = ast.literal_eval(value) if value[0].isdigit() else value
    path.write_text(FILE.format(names=NAMES | names, num_steps=num_steps, job=job))


def run(file: Path, *flags: str) -> int:
    folder = file.parent
    return command.main(["sweep", f"--config={file}", f"--workdir={folder / 'runs'}", *flags])


def rows(file: Path) -> list[dict]:
    path = file.parent / "runs" / "results.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_sweep_runs_all_and_names_what_failed(
    file: Path, tiny_job: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    page = file.parent / "page.md"
    page.write_text("<!-- table: runs/results.jsonl -->\n<!-- end -->\n")
    flags = ("--only=other,broken,tiny", f"--render={page}")
    assert run(file, *flags) == 1
    printed = capfd.readouterr()
    assert "[2/3] broken, seed 0: failed with exit code 2" in printed.err
    assert "config.batch_size=96: more than the 88 training images" in printed.err
    assert printed.err.endswith("failed: broken-seed0\n")
    assert [(row["name"], row["group"], row["changes"]) for row in rows(file)] == [
        ("tiny", "", {}),
        ("other", "Others", {"checkpoint.keep_best": 2}),
    ]
    for row in rows(file):
        folder = file.parent / "runs" / f"{row['name']}-seed0"
        assert row["eval"] == json.loads((folder / "eval.json").read_text())
        assert row["curve"]["step"] == [4, 8]
    assert "| as it is | " in page.read_text("utf-8")
    assert "| keeps two | " in page.read_text("utf-8")

    # The second time nothing runs, and what is told of the runs is brought up to date.
    before = (file.parent / "runs" / "tiny-seed0" / "metrics.jsonl").read_bytes()
    write(file, tiny_job, tiny="as it was")
    assert run(file, "--only=tiny") == 0
    printed = capfd.readouterr()
    assert printed.out.startswith("[1/1] tiny, seed 0: validation ")
    assert printed.out.count("\n") == 1
    assert before == (file.parent / "runs" / "tiny-seed0" / "metrics.jsonl").read_bytes()
    assert [row["description"] for row in rows(file)] == ["as it was", "keeps two"]


def stop(file: Path, number: signal.Signals, *, group: bool) -> int:
    """Starts a long run by the sweep, stops both or the sweep alone, and returns its exit code."""
    program = [sys.executable, "-m", "hccr_jax", "sweep", f"--config={file}", "--only=long"]
    program += ["--seeds=3,4", f"--workdir={file.parent / 'runs'}"]
    process = subprocess.Popen(program, start_new_session=True, stdout=subprocess.DEVNULL)
    metrics = file.parent / "runs" / "long-seed3" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 600
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (os.killpg if group else os.kill)(process.pid, number)
        return process.wait(timeout=300)
    finally:
        process.kill()


@pytest.mark.slow
def test_ctrl_c_saves_and_the_next_sweep_goes_on(
    file: Path, tiny_job: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert stop(file, signal.SIGINT, group=True) == 130  # a terminal sends it to both
    assert "[1/2] long, seed 3: stopped" in capfd.readouterr().err
    folder = file.parent / "runs" / "long-seed3"
    (checkpoint,) = (p for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())
    assert not (folder / "eval.json").exists()
    write(file, tiny_job, num_steps=int(checkpoint.name) + 2)
    assert run(file, "--only=long", "--seeds=3") == 0
    assert f"resuming at step {checkpoint.name}\n" in capfd.readouterr().out
    (row,) = rows(file)
    assert row["seed"] == row["eval"]["seed"] == 3
    assert row["curve"]["step"] == [int(checkpoint.name) + 2]


@pytest.mark.slow
def test_sigterm_is_passed_on(file: Path) -> None:
    assert stop(file, signal.SIGTERM, group=False) == 143
    folders = [path.name for path in (file.parent / "runs").iterdir()]
    assert folders == ["long-seed3"]
    checkpoints = file.parent / "runs" / "long-seed3" / "checkpoints"
    assert [path.name.isdecimal() for path in checkpoints.iterdir()].count(True) == 1


def test_list_names_the_experiments(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file, "--list") == 0
    words = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert words[:2] == [["tiny", "as it is"], []]
    assert ["other", "keeps two"] in words


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing: for example --config=configs/experiments/paper.py"),
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        ([f"--config={ROOT / 'configs' / 'v2.py'}"], "has no NAMES: not a file of experiments"),
        (["--config={}", "--only=tinny"], "--only=tinny: choose from tiny, broken, other, long"),
        (["--config={}", "--seeds=a"], "--seeds=a: must be whole numbers, such as 0,1,2"),
        (["--config={}", "--render=none.md"], "--render=none.md: no such page"),
        (["--config={}", "now"], "unexpected argument 'now'"),
        (["--confg={}"], "Unknown command line flag 'confg'"),
    ],
)
def test_wrong_request_is_told_in_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert command.main(["sweep", *(flag.format(file) for flag in flags)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert [path.name for path in file.parent.iterdir()] == ["tiny.py"]
