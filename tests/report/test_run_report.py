import base64
import html.parser
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hccr_jax.data.casia import charset
from hccr_jax.errors import InputError
from hccr_jax.report import image_grids, plots, run_report
from hccr_jax.runtime import run_log


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def assert_picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert 600 <= image.width <= 2400
        assert 100 <= image.height <= 2400
        assert len(np.unique(np.asarray(image))) > 10, "an empty sheet"


class Page(html.parser.HTMLParser):
    """Collects what a browser would load and show, and checks that every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open_tags: list[str] = []
        self.sources: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data


def bars(count: int) -> np.ndarray:
    images = np.zeros((count, 32, 32), np.uint8)
    images[:, 14:18, 4:28] = 255
    return images


def test_curves_are_pictures_of_what_was_logged(tmp_path):
    rows: list[dict] = [
        {
            "step": step,
            "train/loss": 8 / step,
            "train/accuracy": 1 - 1 / step,
            "learning_rate": 1e-3,
            "images_per_second": 1e4,
        }
        for step in range(1, 200)
    ]
    rows.append({"step": 100, "eval/loss": 0.5, "eval/top1": 0.8, "eval/top5": 0.9})
    write_rows(tmp_path / "metrics.jsonl", rows)
    names = [path.name for path in plots.write_curves(tmp_path)]
    assert names == ["accuracy.png", "loss.png", "learning_rate.png"]
    for name in names:
        assert_picture(tmp_path / "plots" / name)


def test_curves_of_nothing_logged(tmp_path):
    assert plots.write_curves(tmp_path) == []
    write_rows(tmp_path / "metrics.jsonl", [{"step": 5, "eval/loss": 1.0}])
    assert [path.name for path in plots.write_curves(tmp_path)] == ["loss.png"]


def test_the_last_row_of_a_repeated_step_wins(tmp_path):
    first = [{"step": step, "train/loss": 9.0} for step in (10, 20, 30)]
    evaluation = {"step": 20, "eval/top1": 0.5}
    resumed = [{"step": step, "train/loss": 1.0} for step in (20, 30, 40)]
    write_rows(tmp_path / "metrics.jsonl", [*first, evaluation, *resumed])
    rows = run_log.read_metrics(tmp_path / "metrics.jsonl")
    assert list(rows) == [10, 20, 30, 40]
    assert [row["train/loss"] for row in rows.values()] == [9.0, 1.0, 1.0, 1.0]
    assert rows[20]["eval/top1"] == 0.5


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "trai', encoding="utf-8")
    assert list(run_log.read_metrics(path)) == [1]


def test_a_run_that_diverged_still_has_curves(tmp_path):
    losses = [1.0, 2.0, float("nan"), float("inf")]
    write_rows(
        tmp_path / "metrics.jsonl",
        [{"step": step, "train/loss": loss} for step, loss in enumerate(losses)],
    )
    assert len(plots.write_curves(tmp_path)) == 1


@pytest.mark.parametrize("width", [1, 3, 7])
def test_running_mean_is_a_convolution(width):
    values = np.random.default_rng(0).normal(size=50)
    kernel = np.ones(width)
    expected = np.convolve(values, kernel, "same") / np.convolve(np.ones(50), kernel, "same")
    np.testing.assert_allclose(plots.running_mean(values, width), expected, atol=1e-12)


def test_sheets_name_characters_that_no_font_has(tmp_path):
    classes = [*charset.level1()[:7], "\U00020000"]
    labels = np.arange(8)
    warped = np.roll(bars(8), 5, axis=1).astype(np.float32) / 255
    assert_picture(image_grids.write_augmented_sheet(tmp_path, bars(8), warped, labels, classes))

    guesses = (labels[:, None] + np.arange(5)) % 8
    guesses[1::2] = guesses[1::2, ::-1]  # every second prediction is wrong
    sure = np.tile([0.6, 0.2, 0.1, 0.05, 0.05], (8, 1))
    image_grids.write_mistakes(tmp_path, bars(8), labels, guesses, sure, classes)
    assert_picture(tmp_path / "plots" / "mistakes.png")


def test_a_faultless_model_leaves_no_sheet_of_mistakes(tmp_path):
    labels, sure = np.arange(5), np.full((5, 5), 0.2)
    guesses = (labels[:, None] + np.arange(5)) % 5
    classes = charset.level1()[:5]
    assert image_grids.write_mistakes(tmp_path, bars(5), labels, guesses[:, ::-1], sure, classes)
    assert image_grids.write_mistakes(tmp_path, bars(5), labels, guesses, sure, classes) is None
    assert not (tmp_path / "plots" / "mistakes.png").exists()


def test_the_same_run_gives_the_same_picture(tmp_path):
    classes = charset.level1()[:4]
    arguments = (bars(4), bars(4), range(4), classes)
    first = image_grids.write_augmented_sheet(tmp_path, *arguments).read_bytes()
    assert image_grids.write_augmented_sheet(tmp_path, *arguments).read_bytes() == first


def test_report_is_one_self_contained_page(tmp_path):
    results = {
        "step": 160000,
        "split": "test",
        "count": 223991,
        "top1": 0.904,
        "top5": 0.9876,
        "robustness": {"flip": {"top1": 0.8765}},
    }
    config = {"model": {"name": "<script>alert(1)</script>"}, "data": {"name": 'a "b" & <c>'}}
    (tmp_path / "eval.json").write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "train/loss": 2.0}])
    (loss,) = plots.write_curves(tmp_path)

    path = run_report.write_report(tmp_path)
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    page = Page(text)
    assert "script" not in page.seen
    assert "c" not in page.seen
    assert "<script>alert(1)</script>" in page.text
    for shown in (
        "90.40 %",
        "98.76 %",
        "223,991",
        "160,000",
        "test",
        "87.65 %",
        "93.60 %",
        "91.60 %",
    ):
        assert shown in page.text
    (source,) = page.sources
    scheme, _, data = source.partition(",")
    assert scheme == "data:image/png;base64"
    assert base64.b64decode(data) == loss.read_bytes()


def test_report_of_an_evaluation_alone(tmp_path):
    (tmp_path / "eval.json").write_text('{"top1": 0.5}', encoding="utf-8")
    page = Page(run_report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert "50.00 %" in page.text
    assert page.sources == []


def test_report_of_an_empty_workdir_names_it(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        run_report.write_report(tmp_path)


@pytest.mark.parametrize("content", ['{"top1": 0.', "[1, 2]"])
def test_report_names_a_damaged_file(tmp_path, content):
    (tmp_path / "eval.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"eval\.json"):
        run_report.write_report(tmp_path)
