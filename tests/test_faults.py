"""Kills, signals, damage and stalls by the hundred: docs/reliability.md explains each.

Run with `launch/test.sh -m faults`.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from runs import (
    ROOT,
    assert_same_checkpoint,
    finish,
    rows,
    saved,
    start,
    start_group,
    steps_saved,
    wait_for,
)

from hccr_jax.runtime.checkpoints import Checkpoints

pytestmark = pytest.mark.faults

OFTEN = ["--config.checkpoint.every_steps=5", "--config.eval.every_steps=20"]

# Runs a training, and kills it when it reaches a fail point for the nth time.
KILL = """
import os, signal, sys
from hccr_jax import main
from hccr_jax.runtime import failpoints
name, last, count = sys.argv[1], int(sys.argv[2]), 0
def kill(reached):
    global count
    count += reached == name
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
failpoints.on_reach = kill
main.main(["main", *sys.argv[3:]])
"""
# Each fail point, and how often it is reached: from before the first step to after the last.
KILL_POINTS = {
    "while the network is made": 1,
    "before compiling": 1,
    "after the first step": 1,
    "between steps": 3,
    "before an evaluation": 1,
    "in an evaluation": 2,
    "before a save": 3,
    "between a save and its seal": 3,
    "before an old step is removed": 1,
    "while results are written": 1,
}


def complete(flags: list[str], workdir: Path, devices: int = 1) -> Path:
    """Runs a job to its end and returns its workdir."""
    process = start(flags, workdir, devices)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    return workdir


@pytest.fixture(scope="module")
def undisturbed(tiny_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of 40 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return complete([*tiny_job, *OFTEN, "--config.num_steps=40"], workdir)


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_kill_at_a_named_point_costs_no_bit(
    tiny_job: list[str], tmp_path: Path, undisturbed: Path, point: str
) -> None:
    flags = [*tiny_job, *OFTEN, "--config.num_steps=40"]
    command = [sys.executable, "-c", KILL, point, str(KILL_POINTS[point])]
    killed = subprocess.run(
        [*command, *flags, f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    complete(flags, tmp_path)
    assert_same_checkpoint(tmp_path, undisturbed, 40)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if not p.name.isdecimal()]


def test_fifty_kills_at_random_moments_cost_no_bit(tiny_job: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    flags = [*tiny_job, *OFTEN]
    endless = [*flags, "--config.num_steps=1000000"]
    workdir, startup = tmp_path / "killed", 0.0
    for _ in range(50):
        began, before = time.monotonic(), len(rows(workdir))
        # Half of the kills come before the first new step, half after some.
        waits_for_steps = startup == 0.0 or rng.random() < 0.5
        process = start(endless, workdir, devices=1)
        try:
            if waits_for_steps:
                enough = before + rng.integers(1, 30)
                wait_for(process, lambda enough=enough: len(rows(workdir)) >= enough)
                startup = time.monotonic() - began
                time.sleep(rng.uniform(0, 0.5))
            else:
                time.sleep(rng.uniform(0, startup))
        finally:
            process.kill()
            process.communicate()
    end = (steps_saved(workdir) or [0])[-1] + 7
    assert end > 50
    # Steps that are evaluated save other batch statistics for it: the same ends of both runs.
    last = [*flags, f"--config.num_steps={end}"]
    complete(last, workdir)
    assert_same_checkpoint(workdir, complete(last, tmp_path / "undisturbed"), end)


def test_twenty_sigterms_at_random_moments_save_and_end_with_143(
    tiny_job: list[str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    flags = [*tiny_job, "--config.checkpoint.every_steps=100000", "--config.eval.every_steps=50"]
    endless = [*flags, "--config.num_steps=1000000"]
    workdir, startup, ends = tmp_path / "stopped", 0.0, []
    for turn in range(20):
        began, before = time.monotonic(), len(rows(workdir))
        process = start(endless, workdir, devices=1)
        try:
            if turn % 2 == 0:
                wait_for(process, lambda before=before: len(rows(workdir)) > before)
                startup = time.monotonic() - began
                time.sleep(rng.uniform(0, 1.0))
            else:
                time.sleep(rng.uniform(0.3, startup))  # the interpreter itself takes a moment
            sent = time.monotonic()
            process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
            said = process.communicate(timeout=60)[1]
            ends.append(time.monotonic() - sent)
        finally:
            process.kill()
        assert process.returncode == 143, (turn, said)
        assert "Traceback" not in said
        if rows(workdir):
            assert steps_saved(workdir)[-1] == max(row["step"] for row in rows(workdir))
    assert max(ends) < 10, ends
    end = steps_saved(workdir)[-1] + 7
    last = [*flags, f"--config.num_steps={end}"]
    complete(last, workdir)
    assert_same_checkpoint(workdir, complete(last, tmp_path / "undisturbed"), end)


def test_every_file_of_a_step_can_be_lost(
    tiny_job: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    """Each is damaged in turn in the newest step; the run goes on from the one before."""
    steps = steps_saved(undisturbed)
    assert len(steps) >= 2
    newest = undisturbed / "checkpoints" / str(steps[-1])
    for file in sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file()):
        for damage in (bytes.__len__, lambda data: -1):  # zeroed, or deleted
            folder = tmp_path / "checkpoints"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(undisturbed / "checkpoints", folder)
            path = folder / str(steps[-1]) / file
            size = damage(path.read_bytes())
            path.unlink() if size < 0 else path.write_bytes(bytes(size or 1))
            with Checkpoints(folder) as checkpoints:
                assert checkpoints.latest_step() == steps[-2], file
    complete([*tiny_job, *OFTEN, "--config.num_steps=40"], tmp_path)
    assert_same_checkpoint(tmp_path, undisturbed, 40)


LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)]
HUNDRED = [
    "--config.num_steps=100", "--config.batch_size=32", "--config.eval.every_steps=100",
    "--config.log_every_steps=1",
]  # fmt: skip
# A network without batch norms: a deep stack of them, fresh, makes of rounding some thousand times
# as much in a step (docs/reliability.md). Nor Adam, which divides by small numbers.
CALM = [
    "--config.model.name=lenet5", "--config.model.width=1.0", "--config.model.dropout_rate=0.0",
    "--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.01",
    "--config.optimizer.decay_epochs=100.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def layouts(
    tiny_job: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[tuple[int, int], Path]]:
    """Returns a function that runs a job on each number of processes and devices of each."""

    def run_one(layout: tuple[int, int], flags: tuple[str, ...]) -> Path:
        processes, devices = layout
        workdir = tmp_path_factory.mktemp(f"layout_{processes}x{devices}")
        job = [*tiny_job, *HUNDRED, *flags]
        if processes == 1:
            return complete(job, workdir, devices)
        results = finish(start_group(job, workdir, processes, devices))
        assert [code for code, *_ in results] == [0] * processes, results
        return workdir

    def run(*flags: str) -> dict[tuple[int, int], Path]:
        with ThreadPoolExecutor(2) as pool:  # starting takes one core, and most of the time
            folders = pool.map(run_one, LAYOUTS, itertools.repeat(flags))
            return dict(zip(LAYOUTS, folders, strict=True))

    return run


def test_strict_runs_have_the_same_bits_on_every_layout(
    layouts: Callable[..., dict[tuple[int, int], Path]],
) -> None:
    folders = layouts("--config.strict_determinism=True")
    for layout in LAYOUTS[1:]:
        assert_same_checkpoint(folders[layout], folders[1, 1], 100)


def test_runs_on_every_layout_agree(
    layouts: Callable[..., dict[tuple[int, int], Path]],
) -> None:
    folders = layouts(*CALM)
    alone = saved(folders[1, 1], 100)
    assert rows(folders[1, 1])[99]["train/loss"] < rows(folders[1, 1])[0]["train/loss"] - 0.2
    for layout in LAYOUTS[1:]:
        other = saved(folders[layout], 100)
        assert max(np.abs(other[name] - alone[name]).max() for name in alone) < 1e-6, layout


def test_layouts_differ_no_more_than_rounding_does(
    tiny_job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MobileNet on four devices, and on one in another form of the same operations."""
    sgd = ["--config.optimizer.name=sgd", "--config.optimizer.learning_rate=1e-3"]
    flags = [*tiny_job, *HUNDRED, *sgd]
    alone = saved(complete(flags, tmp_path / "alone"), 100)
    shared = saved(complete(flags, tmp_path / "shared", devices=4), 100)
    monkeypatch.setenv("HCCR_CPU_KERNELS", "0")
    reformed = saved(complete(flags, tmp_path / "reformed"), 100)
    names = [name for name in alone if name.startswith("params")]
    gaps = [max(np.abs(other[n] - alone[n]).max() for n in names) for other in (shared, reformed)]
    print(f"on four devices {gaps[0]:.1e}, in another form {gaps[1]:.1e}")
    if gaps[1] == 0:
        pytest.skip("without a compiler there is one form")
    assert gaps[0] < 10 * gaps[1]


def test_a_checkpoint_moves_between_eight_one_and_four_devices(
    tiny_job: list[str], tmp_path: Path
) -> None:
    """Restored and saved again without a step between, every bit is as it was."""
    flags = [*tiny_job, "--config.batch_size=16", "--config.eval.batch_size=16"]
    complete([*flags, "--config.num_steps=2"], tmp_path, devices=8)
    first = saved(tmp_path, 2)
    move = (
        "import sys; from pathlib import Path; from hccr_jax import main\n"
        "from hccr_jax.runtime import sharding\n"
        "from hccr_jax.runtime.checkpoints import Checkpoints\n"
        "from hccr_jax.runtime.startup import Timeline\n"
        "from hccr_jax.train import saved_state\n"
        "from hccr_jax.train.setup import create_training_setup\n"
        "folder = Path(sys.argv[1]) / 'checkpoints'\n"
        "config = main.parse(['main', *sys.argv[2:]]).config\n"
        "setup = create_training_setup(config, Timeline())\n"
        "with Checkpoints(folder, 5, 5) as checkpoints:\n"
        "    setup, state = saved_state.restore_state(setup, checkpoints)\n"
        "    step = int(state.step)\n"
        "    averages = checkpoints.restore(\n"
        "        step, {'eval_batch_stats': state.batch_stats},\n"
        "        sharding.replicated(setup.network.mesh),\n"
        "    )['eval_batch_stats']\n"
        "    items = saved_state.checkpoint_items(setup, state, averages)\n"
        "    metadata = saved_state.checkpoint_metadata(setup)\n"
        "    checkpoints.save(step, items, metadata, {'top1': 0.5})\n"
    )
    for devices in (1, 4):
        subprocess.run(
            [sys.executable, "-c", move, str(tmp_path), *flags, "--config.num_steps=2"],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}, cwd=ROOT, check=True,
        )  # fmt: skip
        moved = saved(tmp_path, 2)
        assert {k: v.tobytes() for k, v in moved.items()} == {
            k: v.tobytes() for k, v in first.items()
        }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Returns a file system of 8 MiB, or skips the test where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_refused_before_and_reported_during_a_run(
    tiny_job: list[str], small_disk: Path
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(8 << 20 >> 1))
    often = [*tiny_job, "--config.checkpoint.every_steps=5", "--config.eval.every_steps=10"]
    endless = [*often, "--config.num_steps=1000000"]
    process = start(endless, small_disk / "run", devices=1)
    seals = (small_disk / "run" / "checkpoints").glob
    wait_for(process, lambda: any(seals("*/manifest.json")))
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(9 << 20))  # takes what there is
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1, said
    # Threads of the libraries may complain as well, before and after.
    told = [line for line in said.splitlines() if line.startswith(str(small_disk / "run"))]
    assert any("No space left on device" in line for line in told), said
    with Checkpoints(small_disk / "run" / "checkpoints") as checkpoints:
        good = checkpoints.latest_step()
    assert good
    process = start(endless, small_disk / "run", devices=1)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    assert re.search(r"No space left on device: \d+ MiB are needed", said), said
    filler.unlink()
    complete([*often, f"--config.num_steps={good + 3}"], small_disk / "run")


def test_a_second_run_on_a_workdir_is_refused_every_time(
    tiny_job: list[str], tmp_path: Path
) -> None:
    first = start([*tiny_job, "--config.num_steps=1000000"], tmp_path, devices=1)
    try:
        wait_for(first, lambda: bool(rows(tmp_path)))
        for _ in range(5):  # four at a time
            others = [start(tiny_job, tmp_path, devices=1) for _ in range(4)]
            for other in others:
                said = other.communicate(timeout=120)[1]
                assert other.returncode == 2, said
                assert said.count("\n") == 1, said
    finally:
        first.kill()
        first.communicate()


MALFORMED = [
    "batch_size=-5", "batch_size=0", "batch_size=1.5", "batch_size=many", "num_steps=-1",
    "num_epochs=nan", "optimizer.learning_rate=nan", "optimizer.learning_rate=0.0",
    "optimizer.learning_rate=-1.0", "optimizer.learning_rate=inf", "optimizer.name=adamm",
    "optimizer.schedule=linear", "optimizer.decay_rate=2.0", "optimizer.decay_epochs=0.0",
    "model.name=mobilenet", "model.width=0.0", "model.dropout_rate=1.0", "model.dropout=0.1",
    "model.stem_stride=3", "model.dtype=float16", "data.image_px=0", "data.margin_px=32",
    "data.placement=gpu", "augment.rotate_deg=400.0", "augment.flip_prob=0.5",
    "augment.resize_min=3.0", "loss.label_smoothing=1.0", "eval.tta_views=9", "seed=-1",
    "gradient_accumulation_steps=0", "strict_determinism=maybe", "checkpoint.keep_latest=0",
]  # fmt: skip


def test_malformed_configs_are_refused_at_once(tiny_job: list[str], tmp_path: Path) -> None:
    assert len(MALFORMED) >= 30
    for change in MALFORMED:
        began = time.monotonic()
        process = start([*tiny_job, f"--config.{change}"], tmp_path / "run")
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 2, (change, said)
        assert said.count("\n") == 1, (change, said)
        assert time.monotonic() - began < 2, change
    assert not (tmp_path / "run").exists()


# Runs a training; at SIGUSR1 its main thread waits for ever, as for a disk that does not respond.
HANG = """
import signal, sys, time
from hccr_jax import main
from hccr_jax.runtime import distributed, signals
signals.install()
def wait_for_ever(number, frame):
    time.sleep(1e6)
signal.signal(signal.SIGUSR1, wait_for_ever)
distributed.shutdown(main.main(["main", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("event", ["kill", "stop", "stall"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others(
    tiny_job: list[str], tmp_path: Path, event: str, victim: int
) -> None:
    """A second process is killed, stopped, or its step hangs, in the middle of the run."""
    seconds = 5.0
    flags = [
        *tiny_job, "--config.num_steps=1000000", "--config.eval.every_steps=1000000",
        f"--config.watchdog_seconds={seconds}",
    ]  # fmt: skip
    group = start_group(flags, tmp_path, num_processes=2, program=("-c", HANG))
    try:
        wait_for(group[0], lambda: len(rows(tmp_path)) >= 20)
        began, lost, left = time.monotonic(), group[victim], group[1 - victim]
        if event == "kill":
            lost.kill()
        elif event == "stop":
            lost.send_signal(signal.SIGSTOP)
        else:
            lost.send_signal(signal.SIGUSR1)
        said = left.communicate(timeout=seconds + 20)[1]
        took = time.monotonic() - began
        assert left.returncode not in (0, 143), said
        assert took < seconds + 10, took
        if event == "stop" and victim == 1:
            # The watchdog reports it, or JAX's own heartbeats, which may miss it a moment earlier.
            ours = r"\nlate: process 1 .* last heard of \d+ s ago\n"
            theirs = r"unhealthy \(stopped sending heartbeats\):\n1\n"
            assert re.search(f"{ours}|{theirs}", said), said
        if event == "stall" and victim == 1:  # both watch, and either may be the first to end
            lost.kill()
            said += lost.communicate()[1]
            pattern = r"\n(late|at the same point): process 1 .* in wait_for_ever"
            assert re.search(pattern, said), said
    finally:
        for process in group:
            process.kill()
            process.communicate()


def test_twenty_thousand_steps_leave_memory_and_files_flat(
    tiny_job: list[str], tmp_path: Path
) -> None:
    flags = [
        *tiny_job, "--config.num_steps=20000", "--config.log_every_steps=50",
        "--config.eval.every_steps=1000", "--config.checkpoint.every_steps=500",
    ]  # fmt: skip
    process = start(flags, tmp_path, devices=1)
    seen: list[tuple[int, float]] = []  # open files and MiB, twice a second
    while process.poll() is None:
        done = rows(tmp_path)
        if done and done[-1]["step"] > 2000:
            with contextlib.suppress(OSError, AttributeError):  # it may just have ended
                handles = len(os.listdir(f"/proc/{process.pid}/fd"))
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory = re.search(r"VmRSS:\s+(\d+)", status).group(1)
                seen.append((handles, int(memory) / 1024))
        time.sleep(0.5)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    # A save opens some files and closes them: the middle of a third of the run counts.
    third = len(seen) // 3
    early, late = (np.median(part, axis=0) for part in (seen[:third], seen[-third:]))
    assert late[0] <= early[0] + 2, "open files"
    assert late[1] < early[1] + 30, "MiB"
    assert (tmp_path / "metrics.jsonl").stat().st_size < 1 << 20


def test_a_data_file_that_is_cut_short_is_reported_and_made_again(
    tiny_job: list[str], tmp_path: Path
) -> None:
    data = f"--config.data.data_dir={tmp_path / 'data'}"
    flags = [*tiny_job, data, "--config.batch_size=64", "--config.eval.every_steps=1000000"]
    process = start([*flags, "--config.num_steps=1000000"], tmp_path / "run", devices=1)
    try:
        wait_for(process, lambda: bool(rows(tmp_path / "run")))
        (images,) = (tmp_path / "data").rglob("normalize/train-*/images.npy")
        os.truncate(images, 200)
        said = process.communicate(timeout=10)[1]
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert "bus error: a file that is mapped into memory was cut short" in said
    assert "goes on from the last checkpoint" in said
    complete([*flags, "--config.num_steps=2"], tmp_path / "again")


def test_a_worker_that_is_killed_is_reported(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from hccr_jax.runtime.worker_pool import WorkerPool
from tests_worker import die
if __name__ == "__main__":
    with WorkerPool() as pool:
        try:
            pool.run(die, [1, 2, 3], 3, "dying", "task")
        except OSError as error:
            print(error)
"""
    (tmp_path / "tests_worker.py").write_text(
        "import os, signal\ndef die(task, advance):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "program.py").write_text(code)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    assert "a worker process died" in done.stdout, done.stderr
    assert time.monotonic() - began < 10
