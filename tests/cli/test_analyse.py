"""What a network confuses, and how sure a figure is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from hccr_jax.cli import analyse, command
from hccr_jax.inference.pretrained import load_pretrained
from hccr_jax.inference.recognizer import Recognizer
from hccr_jax.report import analysis


def test_confused_pairs_hold_every_mistake_once() -> None:
    rng = np.random.default_rng(1)
    labels, answers = rng.integers(0, 6, (2, 500))
    pairs = analysis.confused_pairs(labels, answers)
    assert sum(count for *_, count in pairs) == (labels != answers).sum()
    one, other, count = pairs[0]
    both = {one, other}
    mistakes = [(a, b) for a, b in zip(labels, answers, strict=True) if a != b and {a, b} == both]
    assert count == len(mistakes) == max(n for *_, n in pairs)


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("report") / "analysis.html"
    flags = [f"--workdir={finished}", f"--against={finished}", f"--output={output}"]
    assert command.main(["analyse", *flags]) == 0
    return output.read_text("utf-8")


def test_the_page_says_what_eval_json_says(finished: Path, page: str) -> None:
    results = json.loads((finished / "eval.json").read_text())
    assert f"{results['top1']:.2%}" in page
    assert f"{results['calibration_error']['calibrated']:.2%}" in page
    assert f"<dd>{results['count']:,}</dd>" in page


def test_the_page_needs_no_network_and_shows_every_part(page: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]{1,40})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for part in ("Hardest characters", "Calibration", "By number of strokes", "By writer"):
        assert part in page


def test_a_run_is_as_good_as_itself(page: str) -> None:
    assert "+0.00 points" in page
    assert "p = 1" in page
    assert ">0</td>" in page  # right only in the first


def test_predictions_are_the_recognizers(finished: Path) -> None:
    predicted = analyse.predict(str(finished), None, None)
    recognizer = Recognizer.load(finished)
    for row, candidates in enumerate(recognizer.classify(predicted.split.images[:8])):
        best = candidates[0]
        assert best.character == predicted.split.classes[predicted.candidates[row, 0]]
        assert best.probability == pytest.approx(predicted.confidence[row], rel=1e-4)


def test_another_split_has_its_own_interval(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.html"
    flags = [f"--workdir={finished}", "--split=validation", f"--output={output}"]
    assert command.main(["analyse", *flags]) == 0
    best = load_pretrained(finished).validation["top1"]
    assert f"{best:.2%}" in output.read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=/nowhere"], "no such folder"),
        (["--workdir={run}", "--split=tset"], "tset"),
        (["--workdir={run}", "--output=/nowhere/a.html"], "--output=/nowhere/a.html"),
    ],
)
def test_a_wrong_request_is_told_in_a_line(
    finished: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [flag.format(run=finished) for flag in flags]
    assert command.main(["analyse", *named]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
