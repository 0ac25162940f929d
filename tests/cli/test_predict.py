"""Any picture of a character means the same, pages are read in order, and 90 % means 90 %."""

import contextlib
import dataclasses
import io
import json
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from hccr_jax.cli import command
from hccr_jax.data.images import files, ink
from hccr_jax.data.images.normalize import normalize
from hccr_jax.data.splits import load_split
from hccr_jax.data.synthetic.archives import write_member
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer
from hccr_jax.errors import InputError
from hccr_jax.evaluation.evaluate import evaluate
from hccr_jax.inference import pages
from hccr_jax.inference.pretrained import NORMAL_FORM, load_pretrained
from hccr_jax.inference.recognizer import Recognizer
from hccr_jax.metrics import calibration

CHARACTERS = "一丁七万丈三上下"


@pytest.fixture(scope="module")
def recognizer(finished: Path) -> Recognizer:
    return Recognizer.load(finished)


@pytest.fixture
def warm(recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command line use what is compiled already, whatever run it names."""
    load = Recognizer.load

    def load_once(path: str) -> Recognizer:
        fresh = load(path)
        fresh._step = recognizer._step
        return fresh

    monkeypatch.setattr(Recognizer, "load", load_once)


def write(character: str, seed: int = 0) -> np.ndarray:
    return draw(character, create_writer(seed), np.random.default_rng(seed))


def on_paper(bitmap: np.ndarray, margin: int = 30) -> np.ndarray:
    return np.pad(bitmap, margin, constant_values=255)


def save(image: Image.Image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, **options)
    return data.getvalue()


def colour(grey: np.ndarray) -> Image.Image:
    """Dark blue ink on yellowish paper."""
    paper, ink = np.array([250.0, 240.0, 215.0]), np.array([25.0, 35.0, 120.0])
    share = (255.0 - grey[..., None]) / 255.0
    return Image.fromarray(np.rint(paper + share * (ink - paper)).astype(np.uint8))


def transparent(grey: np.ndarray) -> Image.Image:
    image = np.zeros((*grey.shape, 4), np.uint8)
    image[..., 3] = 255 - grey
    return Image.fromarray(image)


def turned(grey: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by a quarter to the right
    return save(Image.fromarray(np.rot90(grey).copy()), format="JPEG", quality=98, exif=exif)


def in_shade(grey: np.ndarray) -> Image.Image:
    light = np.linspace(0.6, 0.95, grey.shape[1])
    noise = np.random.default_rng(0).normal(0, 2, grey.shape)
    return Image.fromarray(np.clip(grey * light + noise, 0, 255).astype(np.uint8))


def enlarge(grey: np.ndarray, factor: int) -> Image.Image:
    image = Image.fromarray(grey)
    size = image.width * factor, image.height * factor
    return image.resize(size, Image.Resampling.BICUBIC)


VARIANTS = {
    "PNG": lambda grey: save(Image.fromarray(grey), format="PNG"),
    "JPEG": lambda grey: save(Image.fromarray(grey), format="JPEG", quality=95),
    "inverted": lambda grey: save(Image.fromarray(255 - grey), format="PNG"),
    "transparent": lambda grey: save(transparent(grey), format="PNG"),
    "coloured": lambda grey: save(colour(grey), format="PNG"),
    "palette": lambda grey: save(Image.fromarray(grey).convert("P"), format="PNG"),
    "16 bits": lambda grey: save(Image.fromarray(grey.astype(np.uint16) * 257), format="PNG"),
    "upscaled": lambda grey: save(enlarge(grey, 5), format="PNG"),
    "wide": lambda grey: save(
        Image.fromarray(np.pad(grey, ((0, 0), (0, 900)), "edge")), format="PNG"
    ),
    "turned by EXIF": turned,
    "in the shade": lambda grey: save(in_shade(grey), format="PNG"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_picture_of_a_character_has_its_normal_form(name: str):
    for seed, character in enumerate("永国我鼎"):
        bitmap = write(character, seed)
        data = VARIANTS[name](on_paper(bitmap))
        (picture,) = files.read_pictures(io.BytesIO(data), name)
        ours = normalize(ink.to_bitmap(picture.grey), 64, 4).astype(float)
        expected = normalize(bitmap, 64, 4).astype(float)
        assert np.abs(ours - expected).mean() < 5.0
        assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.98


def test_arrays_and_images_and_files_have_the_same_answer(recognizer: Recognizer, tmp_path: Path):
    grey = on_paper(write("丈", 3))
    path = tmp_path / "a.png"
    Image.fromarray(grey).save(path)
    answer = recognizer(path)
    assert sum(c.probability for c in answer) <= 1.0 + 1e-9
    assert [c.probability for c in answer] == sorted((c.probability for c in answer), reverse=True)
    others = [str(path), Image.open(path), grey, grey[..., None], np.repeat(grey[..., None], 3, 2)]
    others += [255 - grey, grey / 255.0]
    for picture in others:
        assert recognizer(picture) == answer
    assert list(recognizer.recognize([grey] * 3, top=2)) == [answer[:2]] * 3
    assert [c.character for c in recognizer(transparent(grey))] == [c.character for c in answer]
    assert len(recognizer(grey > 128, top=8)) == 8


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.int32), np.zeros((0, 4), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)],
)
def test_what_is_no_picture_is_refused(recognizer: Recognizer, array: np.ndarray):
    with pytest.raises(InputError, match=r"^image: "):
        recognizer(array)


def test_a_gnt_file_is_answered_as_in_an_evaluation(
    finished: Path, tmp_path: Path, warm: None, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "eval.json").unlink()  # so the probabilities are the network's own
    pretrained = load_pretrained(run)
    network, data = pretrained.network, pretrained.config.data
    (name,) = (path.name for path in Path(data.data_dir).glob("synthetic_8c*"))
    split = load_split(name, data.data_dir, "test", *(data[key] for key in NORMAL_FORM))
    answers = evaluate(dataclasses.replace(network, eval_batch_size=20), split)

    folder = tmp_path / "in"
    folder.mkdir()
    for writer in sorted(set(split.writers)):
        file = folder / f"{writer}.gnt"
        file.write_bytes(write_member("".join(sorted(split.classes)), int(writer), seed=0))
    capsys.readouterr()
    assert command.main(["predict", f"--checkpoint={run}", str(folder), "--top=5"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: ")
    assert err.count("\n") == 1
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == len(split.labels) == 24
    for line in lines:
        writer, record = Path(line["file"]).stem, line["record"]
        (row,) = np.flatnonzero((split.writers == writer) & (split.record_numbers == record))
        assert line["label"] == split.classes[split.labels[row]]
        best = [split.classes[i] for i in answers.candidates[row]]
        assert [c["character"] for c in line["candidates"]] == best
        given = [c["probability"] for c in line["candidates"]]
        np.testing.assert_allclose(given, answers.probabilities[row], atol=1e-6)


def test_no_number_of_images_compiles_anew(recognizer: Recognizer):
    recognizer.warm_up()
    programs = recognizer._step._cache_size()
    for count in (1, 2, 7, 33, 300):
        assert len(recognizer.classify(np.zeros((count, 32, 32), np.uint8))) == count
    assert recognizer._step._cache_size() == programs


def test_a_run_calibrates_itself_on_validation_writers(finished: Path, recognizer: Recognizer):
    results = json.loads((finished / "eval.json").read_text())
    data = load_pretrained(finished).config.data
    (name,) = (path.name for path in Path(data.data_dir).glob("synthetic_8c*"))
    form = [data[key] for key in NORMAL_FORM]
    logits = {}
    for part in ("validation", "test"):
        split = load_split(name, data.data_dir, part, *form)
        logits[part] = recognizer._outputs(split.images[:64])[0], split.labels
    fitted = calibration.fit_temperature(*logits["validation"])
    assert results["temperature"] == pytest.approx(fitted, rel=1e-4)
    assert recognizer.temperature == results["temperature"]
    errors = results["calibration_error"]
    for key, temperature in (("as_trained", 1.0), ("calibrated", fitted)):
        weights = calibration.probabilities(logits["test"][0], temperature)
        is_right = weights.argmax(1) == logits["test"][1]
        error = calibration.calibration_error(weights.max(1), is_right)
        assert errors[key] == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize("change", [{"step": 7}, {"views": 5}, {"temperature": None}])
def test_the_temperature_of_other_weights_is_not_used(finished: Path, tmp_path: Path, change: dict):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    results = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(results | change))
    other = Recognizer.load(run / "checkpoints")
    assert (other.temperature, other.is_calibrated) == (1.0, False)


@pytest.mark.parametrize("seed", range(5))
def test_connected_parts_are_those_of_scipy(seed: int):
    mask = np.random.default_rng(seed).random((40, 57)) < (0.1, 0.3, 0.45, 0.6, 0.0)[seed]
    parts = pages.find_parts(mask)
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    assert len(parts.area) == count
    expected = {
        (x.start, y.start, x.stop, y.stop, int((labels[y, x] == index + 1).sum()))
        for index, (y, x) in enumerate(ndimage.find_objects(labels))
    }
    assert set(zip(*(array.tolist() for array in parts[:5]), strict=True)) == expected


def compose(text: list[str], vertical: bool = False, slope: float = 0.0, pitch: int = 130):
    """Returns a page of characters, and their boxes line by line."""
    longest = max(map(len, text))
    rng = np.random.default_rng(5)
    page = np.full((pitch * (longest + 1), pitch * (longest + 1)), 255, np.uint8)
    boxes = []
    for i, line in enumerate(text):
        boxes.append([])
        for j, character in enumerate(line):
            bitmap = write(character, 10 * i + j)
            height, width = bitmap.shape
            x, y = (
                (page.shape[1] - pitch * (i + 1), pitch * j) if vertical else (pitch * j, pitch * i)
            )
            middle = 60 + rng.integers(-4, 5)
            left, top = x + 70 - width // 2, y + middle - height // 2 + round(slope * x) + 30
            page[top : top + height, left : left + width] = bitmap
            boxes[-1].append((left, top, left + width, top + height))
    return page, boxes


def assert_near_boxes(lines: list, boxes: list) -> None:
    assert [len(line) for line in lines] == [len(line) for line in boxes]
    for line, expected in zip(lines, boxes, strict=True):
        for character, box in zip(line, expected, strict=True):
            assert np.abs(np.subtract(character.box, box)).max() <= 3


TEXT = ["永国我鼎和平", "一二三天地", "水火木金土人", "十口"]


@pytest.mark.parametrize("vertical", [False, True])
def test_characters_of_a_page_are_found_in_order(vertical: bool):
    # The strokes of 二 and 三 lie as far apart as two characters of a column.
    text = [line.replace("二三", "中") for line in TEXT] if vertical else TEXT
    page, boxes = compose(text, vertical)
    lines = pages.read_page(page, vertical)
    assert_near_boxes(lines, boxes)
    for line, expected in zip(lines, boxes, strict=True):
        for character, (left, top, right, bottom) in zip(line, expected, strict=True):
            form = normalize(character.bitmap, 64, 4).astype(float)
            alone = normalize(page[top:bottom, left:right], 64, 4)
            assert np.abs(form - alone).mean() < 4.0


def test_a_page_may_lean_lie_in_the_shade_and_be_dark():
    page, boxes = compose(TEXT, slope=0.04)
    assert_near_boxes(pages.read_page(page), boxes)
    page, boxes = compose(TEXT)
    for picture in (np.asarray(in_shade(page)), 255 - page):
        assert_near_boxes(pages.read_page(picture), boxes)


def test_a_large_page_keeps_its_boxes():
    page, boxes = compose(TEXT)
    lines = pages.read_page(np.asarray(enlarge(page, 3)))
    for line, expected in zip(lines, boxes, strict=True):
        for character, box in zip(line, expected, strict=True):
            assert np.abs(np.subtract(character.box, np.multiply(box, 3))).max() <= 10


def test_a_page_is_printed_and_drawn(
    finished: Path, tmp_path: Path, warm: None, capsys: pytest.CaptureFixture[str]
):
    page, boxes = compose(["万丈", "上"])
    path, drawn = tmp_path / "page.png", tmp_path / "drawn.png"
    Image.fromarray(page).save(path)
    flags = ["--page", f"--annotate={drawn}", "--reject_at=1", "--top=2"]
    assert command.main(["predict", f"--checkpoint={finished}", str(path), *flags]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["width"], answer["height"]) == page.shape[::-1]
    for line, expected in zip(answer["lines"], boxes, strict=True):
        assert line["text"] == "".join(c["candidates"][0]["character"] for c in line["characters"])
        assert np.abs(np.subtract([c["box"] for c in line["characters"]], expected)).max() <= 3
        assert line["box"][0] == min(c["box"][0] for c in line["characters"])
        assert all(c["rejected"] and len(c["candidates"]) == 2 for c in line["characters"])
    picture = np.asarray(Image.open(drawn)).astype(int)
    assert picture.shape == (*page.shape, 3)
    assert (np.abs(picture - page[..., None]).max(axis=2) > 40).sum() > 500


def test_the_command_line(
    finished: Path,
    tmp_path: Path,
    warm: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    names = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for name, character in zip(names, "万上", strict=True):
        Image.fromarray(on_paper(write(character))).save(name)
    (tmp_path / "notes.txt").write_text("no picture")
    start = ["predict", f"--checkpoint={finished}"]

    assert command.main([*start, str(tmp_path), "--top=3", "--reject_at=0"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == list(map(str, names))
    assert all(len(line["candidates"]) == 3 and not line["rejected"] for line in lines)

    assert command.main([*start, *map(str, names), "--table", "--time"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == list(map(str, names))
    assert "2 characters in" in err

    stdin = io.TextIOWrapper(io.BytesIO(names[0].read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert command.main([*start, "--top=3", "-"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["candidates"] == lines[0]["candidates"]

    assert command.main(["predict", "--help"]) == 0
    assert "--page" in capsys.readouterr().out


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge() -> bytes:
    """A PNG file of a kilobyte that claims 30,000 × 30,000 pixels."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


GOOD = save(Image.fromarray(on_paper(write("万"))), format="PNG")
BAD = {
    "text.png": (b"This is no picture.", "no PNG, JPEG, BMP, TIFF or WebP and no GNT file"),
    "truncated.png": (GOOD[: len(GOOD) // 2], "damaged: "),
    "truncated.jpg": (VARIANTS["JPEG"](on_paper(write("万")))[:700], "damaged: "),
    "head.png": (GOOD[:20], "damaged: "),
    "huge.png": (huge(), "million"),
    "large.png": (huge().replace(struct.pack(">I", 30_000), struct.pack(">I", 8_000)), "damaged"),
    "empty.png": (b"", "empty"),
    "white.png": (save(Image.new("L", (50, 40), 255), format="PNG"), "no ink found"),
    "clear.png": (save(Image.new("RGBA", (50, 40)), format="PNG"), "no ink found"),
    "cut.gnt": (write_member("万丈", 1001, 0)[:-5], "byte "),
}


@pytest.mark.parametrize("page", [False, True])
def test_bad_pictures_are_told_in_one_line_each(
    page: bool, finished: Path, tmp_path: Path, warm: None, capsys: pytest.CaptureFixture[str]
):
    for name, (data, _) in BAD.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.png").write_bytes(GOOD)
    flags = [f"--checkpoint={finished}", *["--page"] * page]
    assert command.main(["predict", *flags, str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    told = dict(line.split(": ", 1) for line in err.splitlines())
    assert {Path(name.partition(",")[0]).name for name in told} == BAD.keys()
    for name, reason in told.items():
        assert BAD[Path(name.partition(",")[0]).name][1] in reason
    answered = [Path(json.loads(line)["file"]).name for line in out.splitlines()]
    assert answered == ["cut.gnt", "good.png"]  # the record before the damage


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "palette", "turned by EXIF"])
def test_damaged_bytes_are_read_or_refused(kind: str):
    data, rng = VARIANTS[kind](on_paper(write("万"))), np.random.default_rng(0)
    for _ in range(50):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(InputError):
            for picture in files.read_pictures(io.BytesIO(bytes(damaged)), "x"):
                ink.to_bitmap(picture.grey, "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint is missing: for example --checkpoint=runs/v2"),
        (["--checkpoint=none"], "no picture is named: give files or folders, or - for stdin"),
        (["--checkpoint=.", "none.png"], "none.png: no such file or folder"),
        (
            ["--checkpoint=.", "EMPTY"],
            "EMPTY: no file in this folder ends with "
            ".png, .jpg, .jpeg, .bmp, .tif, .tiff, .webp, .gnt",
        ),
        (
            ["--checkpoint=none", "--annotate=a.png", "-"],
            "--vertical and --annotate go with --page",
        ),
        (
            ["--checkpoint=none", "-"],
            "none: no such folder; give the --workdir of a run, or its folder checkpoints",
        ),
        (["--top=0"], "flag --top=0: 0 is not a positive integer"),
    ],
)
def test_a_wrong_request_is_told_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    assert command.main(["predict", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", message + "\n")
