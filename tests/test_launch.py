"""The launchers start several processes that train one network."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import ROOT, rows, steps_saved, wait_for

LAUNCH = ROOT / "launch"
# What Slurm does for a job, in small: tasks with numbers of their own on this machine.
SCONTROL = """#!/usr/bin/env bash
[[ "$1" == show ]] && echo localhost
"""
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
code=0
for task in $(jobs -p); do wait "$task" || code=$?; done
exit "$code"
"""


def has_environment() -> bool:
    return (ROOT / ".venv" / "bin" / "python").exists()


def start_local(flags: list[str], workdir: Path) -> subprocess.Popen[str]:
    command = [LAUNCH / "local.sh", "-n", "2", *flags, f"--workdir={workdir}"]
    return subprocess.Popen(
        command, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, text=True, cwd="/",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["--parts=z", "--parts=e", "--python=nowhere", "--unknown"])
def test_gpu_refuses_a_wrong_request(flag: str, tmp_path: Path) -> None:
    command = [LAUNCH / "gpu.sh", f"--output={tmp_path / 'results'}", flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("part", "acdeg")  # b needs PyTorch, f is a sweep as in e
def test_gpu_tries_its_parts_on_a_cpu(part: str, tmp_path: Path) -> None:
    command = [LAUNCH / "gpu.sh", "--dry_run", f"--parts={part}", f"--output={tmp_path}"]
    done = subprocess.run([*command, f"--python={sys.executable}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert summary
    assert all(line.endswith("done") for line in summary)


@pytest.mark.slow
@pytest.mark.skipif(not has_environment(), reason="no .venv: it would be made")
def test_local_passes_a_signal_on_and_all_processes_stop_at_the_same_step(
    tiny_job: list[str], tmp_path: Path
) -> None:
    never = ["--config.eval.every_steps=100000", "--config.checkpoint.every_steps=100000"]
    process = start_local([*tiny_job, *never, "--config.num_steps=100000"], tmp_path)
    try:
        wait_for(process, lambda: bool(rows(tmp_path)))
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert steps_saved(tmp_path) == [rows(tmp_path)[-1]["step"]]
    assert "Traceback" not in said


@pytest.mark.parametrize("arguments", [["-n", "none"], ["-n", "0"], ["--config=configs/v2.py"]])
def test_local_refuses_a_wrong_number(arguments: list[str]) -> None:
    if arguments[0] != "-n" and Path("/dev/nvidia0").exists():
        pytest.skip("there are GPUs")
    done = subprocess.run([LAUNCH / "local.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "-n" in done.stderr


@pytest.mark.slow
def test_slurm_script_starts_its_tasks(tiny_job: list[str], tmp_path: Path) -> None:
    tools, root = tmp_path / "bin", tmp_path / "root"
    tools.mkdir()
    root.mkdir()
    (root / ".venv").symlink_to(sys.prefix)
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "JAX_NUM_CPU_DEVICES": "1",
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    flags = [*tiny_job, "--config.num_steps=2", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [LAUNCH / "slurm.sbatch", *flags], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 × " in done.stdout
    assert steps_saved(tmp_path / "run") == [2]


def test_job_set_numbers_its_pods_as_the_processes_expect() -> None:
    """Checked by hand against the schema of JobSet v1alpha2: no error."""
    job_set = yaml.safe_load((LAUNCH / "k8s-jobset.yaml").read_text())
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert set(variables) == {
        "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID",
    }  # fmt: skip
    assert int(variables["JAX_NUM_PROCESSES"]["value"]) == job["completions"] == job["parallelism"]
    # A pod's name is that of the job set, the replicated job, and two numbers.
    host, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    name = job_set["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert [p["containerPort"] for p in container["ports"]] == [int(port)]
    index = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert "job-completion-index" in index
