"""The wrapper around all commands: help, wrong requests, old names, and configs by name or path."""

import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import hccr_jax
from hccr_jax.cli import command, config_files

ROOT = Path(__file__).parents[2]
OWN_CONFIG = """
from configs import v2

def get_config():
    config = v2.get_config()
    config.batch_size = 64
    return config
"""


def config_of(*flags: str) -> ConfigDict:
    return command.parse("train", flags).config


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    assert [words[0] for words in listed] == list(command.COMMANDS)
    assert all(len(words) > 4 for words in listed)


def test_every_module_but_the_shared_ones_is_a_command() -> None:
    modules = {path.stem for path in (ROOT / "hccr_jax" / "cli").glob("*.py")}
    assert modules - {"__init__", "command", "config_files"} == set(command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_shows_examples_and_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"\n  hccr {name} " in text
    assert "\nFlags:" in text
    assert "\n  --" in text


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hccr_jax {hccr_jax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "hccr trian: no such command: did you mean hccr train?"),
        (["--config=v2"], "hccr --config=v2: no such command: see hccr --help"),
        (["serve", "--prot=1"], "Unknown command line flag 'prot'. Did you mean: port ?"),
        (["serve", "runs/v2"], "unexpected argument 'runs/v2': every flag starts with --, see "),
        (["cost", "--config.seed=1"], "--config is missing: for example --config=v2"),
    ],
)
def test_a_wrong_request_is_reported_in_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1


def test_a_wrong_flag_is_reported_before_jax_is_imported() -> None:
    code = (
        "import sys; from hccr_jax.cli import command\n"
        "for name in command.COMMANDS: assert command.main([name, '--flga=1']) == 2\n"
        "assert command.main(['train', '--config=v2', '--config.seed=-1']) == 2\n"
        "assert not {'jax', 'flax', 'tensorflow_datasets', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_closed_pipe_is_no_error() -> None:
    program = f"{sys.executable} -m hccr_jax benchmark --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith(".\n0\n")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "flags",
    [
        ["--config=v2"],
        ["--config", "v2"],
        ["--config=configs/v2.py"],
        [f"--config={ROOT / 'configs' / 'v2.py'}"],
    ],
)
def test_a_shipped_config_goes_by_its_name_or_path(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()  # another folder of that name hides nothing
    (tmp_path / "configs" / "mine.py").write_text(OWN_CONFIG)
    monkeypatch.chdir(tmp_path)
    assert config_of(*flags).num_steps == 160_000
    assert config_of("--config=experiments/paper:rate_0005").optimizer.learning_rate == 0.0005
    assert config_of("--config=configs/mine.py").batch_size == 64


def test_a_config_of_ones_own_finds_its_own_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    theirs = "from hccr_jax.configs import v2\n\ndef get_config():\n    config = v2.get_config()\n"
    (tmp_path / "configs" / "v2.py").write_text(f"{theirs}    config.seed = 5\n    return config\n")
    (tmp_path / "configs" / "mine.py").write_text(OWN_CONFIG)
    foreign = tmp_path / "site" / "configs"  # an installed package of that name
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise ImportError('not ours')\n")
    monkeypatch.syspath_prepend(str(foreign.parent))
    config = config_of(f"--config={tmp_path / 'configs' / 'mine.py'}")
    assert (config.seed, config.batch_size) == (5, 64)
    assert "configs" not in sys.modules


def test_keys_are_typed_and_the_last_value_counts() -> None:
    flags = ["--config.num_epochs=3", "--config.num_steps=0", "--noconfig.optimizer.staircase"]
    config = config_of("--config=v2", *flags, "--config.seed", "1", "--config.seed=2")
    assert (config.num_epochs, config.seed) == (3.0, 2)
    assert type(config.num_epochs) is float
    assert config.optimizer.staircase is False
    with pytest.raises(AttributeError):
        config.optimizer.learning_rat = 1.0


def test_keys_of_0_1_are_accepted_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["config.steps_per_call = 7", "config.data.strokes.haste = 0.5"]
    lines += ["config.data.name = 'strokes'", "return config"]
    head = "from configs import v2\n\ndef get_config():\n    config = v2.get_config()\n    "
    (tmp_path / "old.py").write_text(head + "\n    ".join(lines) + "\n")
    config = config_of(f"--config={tmp_path / 'old.py'}", "--config.eval.views=3")
    assert config.steps_per_execution == 7
    assert config.data.synthetic.cursiveness == 0.5
    assert config.data.name == "synthetic"
    assert config.eval.tta_views == 3
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 4
    assert warnings[-1] == (
        "warning: --config.eval.views is now --config.eval.tta_views; version 0.2 still takes the "
        "old one"
    )
    assert config_of("--config=strokes") == config_of("--config=synthetic")
    assert "strokes" not in config.data


def test_flags_of_0_1_are_accepted_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    values = command.parse("benchmark", ["--config=v2", "--peer=torch", "--suite=forms"])
    assert (values.baseline, values.suite) == ("torch", "kernels")
    assert capsys.readouterr().err.count("warning: ") == 2


def test_experiments_are_found_by_name() -> None:
    names = [experiment.name for experiment in config_files.list_experiments("experiments/paper")]
    assert names[0] == "baseline"
