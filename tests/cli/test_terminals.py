"""Every command prints in terminals of every encoding, and JSON stays JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hccr_jax.cli import command
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer

ROOT = Path(__file__).parents[2]
# All with the C locale and without Python's own switch to UTF-8, as of old terminals and services.
TERMINALS = {
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "GBK": {"PYTHONIOENCODING": "gbk"},
    "the C locale": {},
}
HELP = """
from hccr_jax.cli import command
for name in command.COMMANDS:
    assert command.run_process([name, "--help"]) == 0
assert command.run_process(["--help"]) == 0
"""


def run(terminal: str, program: list[str], **variables: str) -> subprocess.CompletedProcess[bytes]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run(
        [sys.executable, *program],
        env=kept | locale | TERMINALS[terminal] | variables,
        cwd=ROOT,
        capture_output=True,
    )


@pytest.mark.parametrize("terminal", TERMINALS)
def test_every_help_is_printed(terminal: str) -> None:
    done = run(terminal, ["-c", HELP])
    assert (done.returncode, done.stderr) == (0, b"")
    encoding = TERMINALS[terminal].get("PYTHONIOENCODING", "ascii")
    text = done.stdout.decode(encoding)
    assert "in a folder named by its character: " in text
    assert ("永 or U+6C38" in text) == (encoding == "gbk")
    assert ("\\u6c38 or U+6C38" in text) == (encoding != "gbk")


def test_errors_and_tables_are_printed() -> None:
    done = run("ASCII", ["-m", "hccr_jax", "train", "--config=永"])
    assert done.returncode == 2
    assert done.stderr.startswith(b"--config=\\u") or done.stderr.startswith(b"--config=\\x")
    assert done.stderr.count(b"\n") == 1
    done = run("ASCII", ["-m", "hccr_jax", "cost", "--config=lenet5", "--num_classes=8"])
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"conv 5\\xd75/1" in done.stdout
    assert b"        156\n" in done.stdout  # (5·5 + 1) · 6 parameters of the first layer


def test_predictions_are_json_that_reads_as_on_any_other_terminal(
    finished: Path, tmp_path: Path
) -> None:
    bitmap = draw("丈", create_writer(3), np.random.default_rng(3))
    for name in (b"\xb0\xa1.png", "永é😀.png".encode()):  # 啊 in GBK
        path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
        Image.fromarray(np.pad(bitmap, 30, constant_values=255)).save(path)
    flags = [f"--checkpoint={finished}", str(tmp_path)]
    done = run("ASCII", ["-m", "hccr_jax", "predict", *flags], JAX_NUM_CPU_DEVICES="1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.decode("ascii").splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["啊.png", "永é😀.png"]
    assert {c["character"] for c in lines[0]["candidates"]} <= set("一丁七万丈三上下")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "gbk", "utf-8"])
def test_json_has_no_escapes_but_its_own(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    value = {"file": "永é\x80😀\udcff.png"}
    with open(writer, "w", encoding=encoding, errors="backslashreplace") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        command.print_json(value)
    with open(reader, "rb") as stream:
        assert json.loads(stream.read().decode(encoding)) == value
