"""The wheel: what is in it, and that it works where there is no repository."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, rows, steps_saved

NOT_SHIPPED = {"__pycache__", ".ruff_cache", ".mypy_cache"}
OWN_CONFIG = """
from configs import quickstart

def get_config():
    config = quickstart.get_config()
    config.seed = 7
    return config
"""


def package_files() -> set[str]:
    """Returns every file of the package, by its path in the wheel."""
    found = set()
    for folder, name in ((ROOT / "hccr_jax", "hccr_jax"), (ROOT / "configs", "hccr_jax/configs")):
        for path in folder.rglob("*"):
            if path.is_file() and not NOT_SHIPPED & set(path.parts):
                found.add(f"{name}/{path.relative_to(folder).as_posix()}")
    return found


def test_packages_are_those_of_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    folders = {name.rpartition("/")[0] for name in package_files() if name.endswith(".py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {f.replace("/", ".") for f in folders}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a wheel built with the tools at hand, without a network."""
    found = [d.version for d in importlib.metadata.distributions(name="setuptools")]
    if not found or int(found[0].split(".")[0]) < 77:
        pytest.skip("setuptools 77 is needed to build a wheel")
    root = tmp_path_factory.mktemp("wheel")
    for name in ("hccr_jax", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    options = ["--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={root / 'dist'}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-qq", *options, str(root)], check=True)
    (path,) = (root / "dist").glob("hccr_jax-*.whl")
    return path


@pytest.mark.compiles
def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.startswith("hccr_jax/")} == package_files()
    kept = {Path(name).name for name in names if ".dist-info/" in name}
    assert {"LICENSE", "ARPHICPL.TXT", "entry_points.txt"} <= kept


@pytest.fixture(scope="module")
def hccr(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the command of a new environment that has this one's dependencies.

    The environment also has a package `configs` of someone else's.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-qq", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(p for p in sys.path if "-packages" in p))
    (packages / "configs").mkdir()
    (packages / "configs" / "__init__.py").write_text("raise ImportError('not ours')\n")
    return folder / "bin" / "hccr"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder that holds only a folder `configs` of someone else's, the current one."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "v2.yaml").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def run(hccr: Path, *arguments: str) -> str:
    """Runs a command, checks that it succeeds, and returns what it prints."""
    done = subprocess.run([hccr, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands_find_the_shipped_configs(hccr: Path, elsewhere: Path) -> None:
    assert "7,033,451" in run(hccr, "cost", "--config=v2", "--num_classes=3755")
    assert "7,033,451" in run(hccr, "cost", "--config=configs/v2.py", "--num_classes=3755")
    assert "--archives" in run(hccr, "prepare", "--help")
    assert "rate_0005" in run(hccr, "sweep", "--config=experiments/paper", "--list")
    assert not (elsewhere / "runs").exists()


@contextlib.contextmanager
def serving(hccr: Path, *arguments: str) -> Iterator[str]:
    """Yields the address of the drawing page."""
    process = subprocess.Popen([hccr, "serve", "--port=0", *arguments], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield re.findall(r"http://\S+", process.stdout.readline().decode())[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_training_prediction_and_the_page_work(
    hccr: Path, elsewhere: Path, tiny_job: list[str]
) -> None:
    flags = [*tiny_job[1:], "--config.num_epochs=0", "--config.num_steps=2"]
    run(hccr, "train", "--config=quickstart", *flags)
    assert steps_saved(elsewhere / "runs" / "quickstart") == [2]
    (elsewhere / "configs" / "mine.py").write_text(OWN_CONFIG)
    run(hccr, "train", "--config=configs/mine.py", *flags, "--workdir=own")
    assert '"seed": 7' in (elsewhere / "own" / "config.json").read_text()
    assert len(rows(elsewhere / "own")) > 1
    Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save("a.png")
    assert '"candidates"' in run(hccr, "predict", "--checkpoint=own", "a.png")
    with serving(hccr, "--checkpoint=own") as address, urlopen(address) as page:
        assert b"<canvas" in page.read()
    assert os.listdir(elsewhere / "configs")  # the same folder all along
