"""Folders and files of any name work, or are refused before any work; ~ is the user's home."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hccr_jax.cli import command
from hccr_jax.data.prepare import prepare
from hccr_jax.data.store import dataset_folder
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer
from hccr_jax.errors import InputError
from hccr_jax.inference.recognizer import Recognizer
from hccr_jax.paths import expand
from hccr_jax.runtime import sharding
from hccr_jax.runtime.checkpoints import Checkpoints

ODD = "lr[0.1]*?{a}#%20: 永 '\"&;$\\"
NOT_UTF8 = os.fsdecode(b"\xb0\xa1")  # 啊 in GBK
# Every flag and key of a path, by command.
PATH_FLAGS = {
    "train": [
        "workdir",
        "checkpoint",
        "config.data.data_dir",
        "config.init_from",
        "config.teacher.checkpoint",
    ],
    "prepare": ["archives", "test_archives", "pictures", "data_dir"],
    "predict": ["checkpoint", "annotate"],
    "serve": ["checkpoint"],
    "export": ["checkpoint", "output", "data_dir"],
    "analyse": ["workdir", "against", "output", "data_dir"],
    "sweep": ["data_dir", "workdir", "output", "render"],
    "benchmark": ["output", "render"],
}


def save_picture(path: Path) -> None:
    bitmap = draw("丈", create_writer(3), np.random.default_rng(3))
    Image.fromarray(np.pad(bitmap, 30, constant_values=255)).save(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a home, in another folder than the current one."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def recognizer(finished: Path) -> Recognizer:
    return Recognizer.load(finished)


@pytest.fixture
def warm(recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores every run, but uses the program that is compiled already."""
    load = Recognizer.load

    def load_once(path: str | Path) -> Recognizer:
        fresh = load(path)
        fresh._step = recognizer._step
        return fresh

    monkeypatch.setattr(Recognizer, "load", load_once)


@pytest.mark.parametrize(
    "name",
    [
        "[", "]", "lr[0.1]", "a?b", "a*b", "**", "{a}", "a#b", "a%20b", "a:b", "gs:", "file:x",
        "a b", " a ", "永", "a\\b", "a\nb", "'a'", '"', "~a", "-a", "$a", ODD, NOT_UTF8,
    ],
)  # fmt: skip
def test_checkpoints_are_read_back_from_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    replicated = sharding.replicated(sharding.create_mesh())
    items = {"params": {"kernel": jnp.arange(6.0), "bias": {"x": jnp.ones((3, 2))}}}
    folder = tmp_path / name / "checkpoints"
    with Checkpoints(folder, keep_latest=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, items, {"classes": ["永"]}, None)
    assert [path.name for path in folder.iterdir()] == ["2"]
    assert os.listdir(tmp_path) == [name], "something was saved elsewhere"
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 2
        restored = checkpoints.restore(2, items, replicated)
    assert (restored["params"]["kernel"] == np.arange(6.0)).all()


def test_a_whole_run_in_a_folder_of_an_odd_name(
    train: Callable[..., Path], warm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ODD
    data = f"--config.data.data_dir={folder / 'data'}"
    train(8, data, workdir=folder / "run")
    assert json.loads((folder / "run" / "eval.json").read_text())["count"] == 24
    save_picture(folder / "a.png")
    flags = ["--page", f"--annotate={folder / 'b.png'}", f"--checkpoint={folder / 'run'}"]
    capsys.readouterr()
    assert command.main(["predict", *flags, str(folder / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(folder / "a.png")
    assert (folder / "b.png").read_bytes().startswith(b"\x89PNG")
    output = folder / "run.safetensors"
    flags = [f"--checkpoint={folder / 'run'}", "--format=safetensors", f"--output={output}"]
    assert command.main(["export", *flags]) == 0
    assert output.stat().st_size > 0


@pytest.mark.parametrize("name", ["**", "a**b", NOT_UTF8])
def test_a_data_dir_that_cannot_be_read_back_is_refused_first(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its path must not have") as error:
        dataset_folder("mine", tmp_path / name)
    assert str(error.value).isprintable()
    (tmp_path / "in" / "丈").mkdir(parents=True)
    save_picture(tmp_path / "in" / "丈" / "a.png")
    with pytest.raises(InputError, match="its path must not have"):
        prepare([], tmp_path / name, pictures=tmp_path / "in")
    assert not (tmp_path / name).exists()


def test_a_config_in_a_folder_with_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    text = "from configs import v2\n\nget_config = v2.get_config\n"
    (tmp_path / "a:b" / "mine.py").write_text(text)
    assert command.parse("train", [f"--config={tmp_path}/a:b/mine.py"]).config.num_steps == 160_000


@pytest.mark.parametrize(("name", "flag"), [(n, f) for n, fs in PATH_FLAGS.items() for f in fs])
def test_the_home_is_put_for_a_tilde(name: str, flag: str, home: Path) -> None:
    config = ["--config=v2"] if flag.startswith("config.") else []
    values = command.parse(name, [*config, f"--{flag}=~/永/a b"])
    node = values
    for part in flag.split("."):
        node = getattr(node, part)
    (value,) = node if isinstance(node, list) else [node]
    assert str(value) == f"{home}/永/a b"


def test_no_flag_of_a_path_is_left_out() -> None:  # --charset may be a word: its reader expands ~
    for name in command.COMMANDS:
        listed = {flag for flag in PATH_FLAGS.get(name, []) if not flag.startswith("config.")}
        defined = command._load_command(name)[1]
        texts = {flag: defined[flag].help for flag in defined if flag not in ("help", "config")}
        named = {flag for flag, text in texts.items() if re.search("(?i)folder|file|page wh", text)}
        assert named - {"charset", "format", "on_error", "tta", "verify"} <= listed


def test_the_home_is_put_in_a_config_file_and_for_its_own_path(home: Path) -> None:
    text = "from configs import v2\n\ndef get_config():\n    config = v2.get_config()\n"
    text += "    config.data.data_dir = '~/data'\n    return config\n"
    (home / "mine.py").write_text(text)
    config = command.parse("train", ["--config=~/mine.py"]).config
    assert config.data.data_dir == f"{home}/data"


def test_predict_reads_and_writes_in_the_home(
    finished: Path, warm: None, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, home / "run")
    save_picture(home / "a.png")
    flags = ["--checkpoint=~/run", "--page", "--annotate=~/b.png"]
    assert command.main(["predict", *flags, "~/a.png"]) == 0
    assert (home / "b.png").read_bytes().startswith(b"\x89PNG")
    assert Recognizer.load("~/run")("~/a.png")
    assert os.listdir() == [], "something is in the current folder"
    assert command.main(["predict", *flags[:2], "--annotate=~/a.png", "~/a.png"]) == 2
    assert "is the page itself: choose another" in capsys.readouterr().err


def test_a_tilde_elsewhere_and_of_nobody_is_part_of_a_name(home: Path) -> None:
    for name in ("a~", "./~/a", "a/~/b", "~nobody-of-this-name/a", "~$a.png"):
        assert expand(name) == Path(name)
    assert expand("~") == home
    assert expand("~root") == Path(os.path.expanduser("~root"))


@pytest.mark.parametrize("flag", ["--workdir=", "--config.data.data_dir=", "--checkpoint="])
def test_an_empty_path_is_refused(
    flag: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["train", "--config=v2", "--mode=eval", flag]) == 2
    error = capsys.readouterr().err
    assert flag.removeprefix("--") in error
    assert error.count("\n") == 1
    assert os.listdir() == []


@pytest.mark.parametrize("variables", [{"HOME": ""}, {}])
def test_without_a_home_a_tilde_is_refused(variables: dict[str, str], tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if key != "HOME"}
    program = [sys.executable, "-m", "hccr_jax", "train", "--config=v2", "--workdir=~/x"]
    if not variables:
        program = [*as_unknown_user(), *program]
    done = subprocess.run(
        program, env=kept | variables, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no home folder: set HOME, or write the path without ~" in done.stderr
    assert done.stderr.count("\n") == 1


def as_unknown_user() -> list[str]:
    """Returns a prefix that runs a command as a user whom no list of users has."""
    prefix = ["unshare", "--user", "--map-user=4242"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("unshare cannot make a namespace of users here")
    return prefix


def test_missing_pictures_and_a_missing_checkpoint_are_named_together(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["predict", "--checkpoint=none", "a.png", "~/b.png"]) == 2
    assert capsys.readouterr().err == (
        "a.png: no such file or folder; ~/b.png: no such file or folder; none: no such folder; "
        "give the --workdir of a run, or its folder checkpoints\n"
    )


def test_predict_reads_folders_as_prepare_does(
    finished: Path, warm: None, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "in"
    (folder / "sub").mkdir(parents=True)
    save_picture(folder / "b.png")
    shutil.copy(folder / "b.png", os.fsdecode(os.fsencode(folder) + b"/\xb0\xa1.png"))
    shutil.copy(folder / "b.png", folder / "._b.png")
    (folder / "notes.txt").write_text("no picture")
    (home / "elsewhere").mkdir()
    shutil.copy(folder / "b.png", home / "elsewhere" / "c.PNG")
    (folder / "sub" / "link").symlink_to(home / "elsewhere")
    (folder / "sub" / "loop").symlink_to(folder)
    assert command.main(["predict", f"--checkpoint={finished}", "~/in"]) == 0
    out, err = capsys.readouterr()
    names = [json.loads(line)["file"] for line in out.splitlines()]
    expected = ["b.png", "啊.png", "sub/link/c.PNG"]
    assert names == [f"{folder}/{name}" for name in expected]
    assert "passed over 1 files that are no pictures: notes.txt\n" in err
