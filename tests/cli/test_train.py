"""The command line: every wrong request ends in one line that says what to do, and exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from hccr_jax import main
from hccr_jax.cli.train import default_workdir
from hccr_jax.report import run_report
from hccr_jax.runtime.checkpoint_seal import write_seal

ROOT = Path(__file__).parents[2]
V2 = f"--config={ROOT / 'configs' / 'v2.py'}"
PAPER = ROOT / "configs" / "experiments" / "paper.py"


def run(*flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, on one device."""
    return subprocess.run(
        [sys.executable, "-m", "hccr_jax.main", *flags],
        cwd=cwd,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Runs the command in this process, checks that it was refused, and returns the line."""
    assert main.main(["main", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    return printed.err.strip()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Returns everything below a folder, with the files' contents."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture(scope="session")
def trained(tiny_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run of 5 steps, by the command line, on one device."""
    workdir = tmp_path_factory.mktemp("trained")
    result = run(*tiny_job, "--config.num_steps=5", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert f"report: {workdir / 'report.html'}" in result.stdout
    return workdir


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing: for example --config=configs/quickstart.py"),
        (
            ["--config=nowhere.py"],
            "--config=nowhere.py: no such file; the library has alexnet, default, ",
        ),
        (["--config", "nowhere.py"], "--config=nowhere.py: no such file; the library"),
        (["--config=quickstrat"], "--config=quickstrat: no such file; did you mean quickstart?"),
        (["--config=configs/v2_bset.py"], "no such file; did you mean v2_best or "),
        (["--config=experiments/papr:once"], "no such file; did you mean experiments/paper"),
        (["--config=experiments/paper:onec"], "such as --config=experiments/paper:once"),
        ([V2, "--config.optimizer.learning_rat=1"], "did you mean optimizer.learning_rate or "),
        (
            [f"--config={PAPER}"],
            "paper.py: holds several experiments: give one of baseline, once, none, ",
        ),
        ([f"--config={PAPER}:rate_1"], "no experiment 'rate_1': give one of baseline, once, "),
        ([f"--config={PAPER}:rate_1"], f"annealed, such as --config={PAPER}:rate_01"),
        ([V2 + ":x"], "v2.py:x: TypeError: get_config() takes 0 positional arguments but 1 was"),
        ([V2, "--config.batch_sise=8"], "config has no key 'batch_sise': did you mean batch_size"),
        ([V2, "--config.optimizer=adam"], "config has no key 'optimizer': did you mean optimizer."),
        ([V2, "--config.batch_size=-5"], "config.batch_size=-5: must be a whole number from 1"),
        ([V2, "--config.batch_size=many"], "config.batch_size=many: must be a whole number from 1"),
        (
            [V2, "--config.optimizer.learning_rate=nan"],
            "config.optimizer.learning_rate=nan: must be a number from 1e-12 to 1000",
        ),
        (
            [V2, "--config.num_epochs=3"],
            "config.num_steps=160000 and config.num_epochs=3: one must",
        ),
        ([V2, "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
        ([V2, "--mode=test"], "--mode=test: value should be one of <train|eval>"),
        ([V2, "runs/x"], "unexpected argument 'runs/x': every flag starts with --, see --help"),
        ([V2, "--checkpoint=x"], "--checkpoint goes with --mode=eval"),
    ],
)
def test_wrong_request_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: Sequence[str], message: str
) -> None:
    assert message in refused(capsys, *flags)


def test_an_experiment_is_a_config_of_its_own() -> None:
    parsed = main.parse(["main", f"--config={PAPER}:rate_0005", "--config.batch_size=64"])
    assert parsed.config.optimizer.learning_rate == 0.0005
    assert parsed.config.batch_size == 64
    assert default_workdir(parsed.config_name) == Path("runs/paper/rate_0005")
    assert default_workdir("v2") == default_workdir("configs/v2.py") == Path("runs/v2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(:\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import nothing_of_the_kind\n", "No module named 'nothing_of_the_kind'"),
        ("x = 1\n", "KeyError: 'get_config'"),
        ("def get_config():\n    return 3\n", "get_config() returns a int"),
        (
            "from configs import v2\n\n\ndef get_config():\n    config = v2.get_config()\n"
            "    config.model.widht = 2.0\n    return config\n",
            "config has no key 'model.widht': did you mean model.width",
        ),
    ],
)
def test_config_file_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(content)
    assert message in refused(capsys, f"--config={tmp_path / 'mine.py'}")


def test_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = run(V2, "--config.learning_rate=1", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "config has no key 'learning_rate': did you mean optimizer.learning_rate or "
        "optimizer.end_learning_rate?\n"
    )
    assert tree(tmp_path) == {}


def test_missing_data_is_told_with_the_way_to_get_it(tmp_path: Path) -> None:
    # From another folder than the repository's, as whoever installed the package would.
    result = run(V2, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    for advice in (
        "Gnt1.1TrainPart1.zip, Gnt1.1TrainPart2.zip and Gnt1.1Test.zip",
        "https://nlpr.ia.ac.cn/databases/",
        "`hccr prepare --archives=",
        "--data_dir=data --name=casia_hwdb`",
        "`launch/quickstart.sh` runs without any download",
    ):
        assert advice in result.stderr
    assert tree(tmp_path) == {}


def test_help_shows_examples() -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "python -m hccr_jax.main --config=configs/quickstart.py --workdir=" in result.stdout
    for flag in ("--config", "--workdir", "--mode", "--checkpoint"):
        assert f"\n  {flag}" in result.stdout


def test_evaluation_without_a_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(capsys, V2, "--mode=eval", f"--workdir={tmp_path / 'none'}")
    assert line.startswith(f"{tmp_path / 'none'}: no such folder; give the --workdir of a run")
    (tmp_path / "empty").mkdir()
    line = refused(capsys, V2, "--mode=eval", f"--workdir={tmp_path / 'empty'}")
    assert line.startswith(f"{tmp_path / 'empty'}: no checkpoint in this folder; give the")
    line = refused(capsys, V2, "--mode=eval", f"--checkpoint={tmp_path / 'other'}")
    assert line.startswith(f"{tmp_path / 'other'}: no such folder")
    assert tree(tmp_path) == {"empty": None}


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_file_in_the_place_of_the_workdir(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, V2, f"--workdir={tmp_path / place}")
    assert line == (
        f"--workdir={tmp_path / place}: {tmp_path / 'file'}: not a folder; choose another"
    )
    (tmp_path / "checkpoints").mkdir()
    flags = [V2, "--mode=eval", f"--checkpoint={tmp_path}", f"--workdir={tmp_path / place}"]
    assert "not a folder; choose another" in refused(capsys, *flags)
    assert tree(tmp_path) == {"checkpoints": None, "file": b"mine"}


def test_batch_that_does_not_split_over_the_devices(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert jax.device_count() == 4
    line = refused(capsys, V2, "--config.batch_size=6", f"--workdir={tmp_path / 'run'}")
    assert line == (
        "config.batch_size=6: must be a multiple of 4, the number of devices, such as 4 or 8"
    )
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.data.test_split=tset", "split 'tset' of synthetic_8c_12w_3t_cursive100 in "),
        ("--config.batch_size=96", "config.batch_size=96: more than the 88 training images"),
    ],
)
def test_data_that_does_not_fit_is_told_before_the_training(
    capsys: pytest.CaptureFixture[str],
    tiny_job: list[str],
    trained: Path,
    tmp_path: Path,
    flag: str,
    message: str,
) -> None:
    assert trained.exists(), "so the data are prepared and nothing shows a progress bar"
    assert message in refused(capsys, *tiny_job, flag, f"--workdir={tmp_path / 'run'}")
    assert tree(tmp_path) == {}


def test_resuming_with_another_config(
    capsys: pytest.CaptureFixture[str], tiny_job: list[str], trained: Path
) -> None:
    before = tree(trained)
    line = refused(capsys, *tiny_job, "--config.model.width=0.2", f"--workdir={trained}")
    assert line == (
        f"config.model.width=0.2, but the run was started with 0.1 ({trained / 'config.json'}): "
        f"resume with the old value or choose another --workdir"
    )
    assert tree(trained) == before


def test_checkpoint_of_another_class_list(
    capsys: pytest.CaptureFixture[str], tiny_job: list[str], trained: Path, tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(trained, run_folder)
    for path in run_folder.glob("checkpoints/*/about/metadata"):
        about = json.loads(path.read_text("utf-8"))
        assert about["classes"] == ["丁", "七", "三", "上", "万", "下", "一", "丈"]
        about["classes"][2] = "叁"
        path.write_text(json.dumps(about), "utf-8")
        write_seal(path.parents[1])
    before = tree(run_folder)
    for flags in (["--mode=eval"], ["--config.num_steps=9"]):
        line = refused(capsys, *tiny_job, *flags, f"--workdir={run_folder}")
        assert line.startswith(str(run_folder / "checkpoints"))
        assert "trained on another class list (8 classes, the data set has 8; class 2 is 叁" in line
    assert {k: v for k, v in before.items() if k.startswith("checkpoints/")} == {
        k: v for k, v in tree(run_folder).items() if k.startswith("checkpoints/")
    }


def test_evaluation_gives_the_numbers_of_the_training_run(
    tiny_job: list[str], trained: Path, tmp_path: Path
) -> None:
    # The network is the checkpoint's, whatever the config says.
    flags = [*tiny_job, "--mode=eval", "--config.model.width=1.0"]
    expected = (trained / "eval.json").read_text()
    checkpoints = tree(trained / "checkpoints")
    result = run(*flags, f"--checkpoint={trained}", f"--workdir={tmp_path / 'new'}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "new" / "eval.json").read_text() == expected
    assert (tmp_path / "new" / "report.html").is_file()
    assert (trained / "eval.json").read_text() == expected
    assert tree(trained / "checkpoints") == checkpoints


def test_evaluation_on_distorted_images(tiny_job: list[str], trained: Path, tmp_path: Path) -> None:
    flags = ["main", *tiny_job, "--mode=eval", f"--checkpoint={trained}", f"--workdir={tmp_path}"]
    asked = ["--config.eval.robustness=True", "--config.eval.paper_protocol=True"]
    assert main.main([*flags, *asked, "--config.eval.robustness_images=0"]) == 0
    results = json.loads((tmp_path / "eval.json").read_text())
    robustness = results["robustness"]
    assert results["count"] == results["paper_protocol"]["count"] == robustness["images"] == 24
    assert [robustness[name]["count"] for name in ("rotation", "flip", "resize")] == [24] * 3
    assert robustness["all"]["count"] == 72
    for score in ("top1", "top5", "loss"):
        mean = np.mean([robustness[name][score] for name in ("rotation", "flip", "resize")])
        assert robustness["all"][score] == pytest.approx(mean)
    # Where a curve distorts nothing, and has every image, it meets the plain test.
    curves = robustness["curves"]
    assert curves["images"] == 24
    for curve, varied, nothing in (("rotation", "angle_deg", 0), ("aspect", "factor", 1.0)):
        place = curves[curve][varied].index(nothing)
        for score in ("top1", "top5"):
            assert curves[curve][score][place] == results[score]
            assert len(curves[curve][score]) == len(curves[curve][varied])
    page = (tmp_path / "report.html").read_text("utf-8")
    for shown in ("Distorted images", "85.03 %", "65.97 %", "Top-1, flipped and turned"):
        assert shown in page
    for name in ("robustness", "robustness_sets", "robustness_failures"):
        assert run_report.PLOTS[name] in page

    # An evaluation without them shows nothing of the one before.
    assert main.main(flags) == 0
    assert (
        not {"robustness", "paper_protocol"}
        & json.loads((tmp_path / "eval.json").read_text()).keys()
    )
    assert "istorted" not in (tmp_path / "report.html").read_text("utf-8").split("Config")[0]


def test_one_device_and_four_learn_the_same(
    tiny_job: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jax.device_count() == 4
    flags = [*tiny_job, "--config.num_steps=5", f"--workdir={tmp_path}"]
    assert main.main(["main", *flags]) == 0
    assert "4 × cpu" in capsys.readouterr().out

    def logged(name: str, workdir: Path) -> list[float]:
        rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return [row[name] for row in rows if name in row]

    # Adam's first steps have one size whatever the gradient's: they blow up what rounding left.
    for name, first, all_steps in (("train/loss", 1e-5, 1e-3), ("train/gradient_norm", 1e-4, 1e-2)):
        one, four = logged(name, trained), logged(name, tmp_path)
        assert len(one) == len(four) == 5
        np.testing.assert_allclose(four[0], one[0], rtol=first)
        np.testing.assert_allclose(four, one, rtol=all_steps)
