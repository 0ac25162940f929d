"""What README.md says of a network trained on the real subset: drawings, pages, own characters.

  HCCR_RUN=runs/NAME HCCR_STROKES_RUN=runs/strokes_half launch/test.sh -m figures -s

prints and holds the figures; the first names a run on the real subset, the second one on simulated
writers (`configs/experiments/recipes.py` tells how it is made). What is not named is skipped.
"""

import base64
import functools
import http.server
import json
import os
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from browser import Browser, browse
from PIL import Image
from runs import ROOT

from hccr_jax import main
from hccr_jax.cli import command
from hccr_jax.data.casia import charset
from hccr_jax.data.casia.archives import list_members, read_member
from hccr_jax.data.synthetic import medians
from hccr_jax.demo import server as demo_server
from hccr_jax.inference import pages
from hccr_jax.inference.recognizer import Recognizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OWN = "业东世丛仇乘买亮乾亭丽享事书交仁京产习举"
pytestmark = [
    pytest.mark.figures,
]


def named_run(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no run")
    return Path(os.environ[variable]).absolute()


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return Recognizer.load(named_run("HCCR_RUN"))


class Scan(NamedTuple):
    character: str
    bitmap: np.ndarray


def read_writers(archive: Path, count: int | None = None) -> list[list[Scan]]:
    """Returns what the first writers of an archive wrote."""
    return [
        [Scan(charset.tag_to_character(r.tag), r.bitmap) for r in read_member(member)]
        for member in list_members([archive])[:count]
    ]


@pytest.fixture(scope="module")
def scans(casia_dir: Path) -> list[list[Scan]]:
    """Returns the test split of the real subset, writer by writer."""
    return read_writers(casia_dir / "HWDB1.1-100tst_gnt.zip")


@pytest.fixture(scope="module", params=["served", "built"])
def address(
    request: pytest.FixtureRequest, recognizer: Recognizer, tmp_path_factory
) -> Iterator[tuple[str, int]]:
    """Yields where the page is, recognised by Python or, built, by the browser itself."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    server: socketserver.BaseServer
    if request.param == "served":
        recognizer.warm_up()
        server = demo_server.create_server(recognizer, "127.0.0.1", 0)
    else:
        if not shutil.which("npm"):
            pytest.skip("npm is absent")
        page = tmp_path_factory.mktemp("page")
        build = [str(ROOT / "launch" / "build_demo.sh"), os.environ["HCCR_RUN"], str(page)]
        subprocess.run(build, check=True)
        handler = functools.partial(QuietHandler, directory=page)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def browser(address: tuple[str, int], tmp_path: Path) -> Iterator[Browser]:
    with browse(CHROMIUM, tmp_path) as browser:
        browser.open(f"http://{address[0]}:{address[1]}/")
        browser.wait_for("document.readyState == 'complete' && window.canvas && model !== null")
        yield browser


def by_hand(character: str, seed: int) -> list[list[list[float]]]:
    """Returns a character's strokes on a canvas of side 1000, leaning and unsteady."""
    rng = np.random.default_rng(seed)
    lean = 0.7 * np.eye(2) + rng.normal(0, 0.07, (2, 2))
    strokes = medians.class_strokes(charset.class_index()[character])
    drawn = (s @ lean + 0.5 + rng.normal(0, 0.015, 2) for s in strokes)
    drawn = (points + rng.normal(0, 0.0006, points.shape) for points in drawn)
    return [(1000 * points.clip(0.01, 0.99)).round(1).tolist() for points in drawn]


def test_200_drawings_are_read(browser: Browser, recognizer: Recognizer) -> None:
    right, milliseconds = 0, []
    for index in range(200):
        character = recognizer.classes[index % len(recognizer.classes)]
        browser.draw(by_hand(character, index))
        browser.wait_for("!busy && requested == version && candidates.length == 5")
        right += browser.evaluate("candidates[0].character") == character
        milliseconds.append(browser.evaluate("time"))
        browser.evaluate("document.getElementById('clear').click()")
    print(f"\n{right} of 200 drawings read, {np.median(milliseconds):.0f} ms, the median")
    assert right >= 190
    assert np.median(milliseconds) <= 30


def test_the_page_reads_500_scans_as_python_does(
    browser: Browser, recognizer: Recognizer, scans: list[list[Scan]], tmp_path: Path
) -> None:
    same = 0
    bitmaps = [scan.bitmap for writer in scans for scan in writer[:9]][:500]
    for bitmap in bitmaps:
        Image.fromarray(np.pad(bitmap, 20, constant_values=255)).save(tmp_path / "scan.png")
        text = base64.b64encode((tmp_path / "scan.png").read_bytes()).decode()
        bytes_ = f"Uint8Array.from(atob('{text}'), c => c.charCodeAt(0))"
        page = browser.evaluate(f"recognize(new Blob([{bytes_}], {{type: 'image/png'}}))")
        python = recognizer(tmp_path / "scan.png")
        same += [c["character"] for c in page] == [c.character for c in python]
    print(f"\n{same} of {len(bitmaps)} scans with the same five candidates")
    assert same == len(bitmaps) == 500


def compose(scans: list[Scan], columns: int, rng: np.random.Generator):
    """Returns a page of lines of characters under uneven light, and [(box, character)]."""
    side = np.median([max(scan.bitmap.shape) for scan in scans])
    lines = [scans[start : start + columns] for start in range(0, len(scans), columns)]
    page = np.full((int(len(lines) * side * 1.7) + 200, int(columns * side * 1.75) + 200), 255)
    truth, top = [], 60
    for line in lines:
        left, height = 60 + rng.integers(0, 40), max(scan.bitmap.shape[0] for scan in line)
        for scan in line:
            tall, wide = scan.bitmap.shape
            y = top + (height - tall) // 2 + rng.integers(-5, 6)
            area = page[y : y + tall, left : left + wide]
            area[:] = np.minimum(area, scan.bitmap)
            truth.append(((left, y, left + wide, y + tall), scan.character))
            left += wide + int(side * rng.uniform(0.25, 0.6))
        top += height + int(0.35 * side)
    light = np.linspace(0.97, 0.85, len(page))[:, None] * np.linspace(0.7, 0.97, page.shape[1])
    return (page * light + rng.normal(0, 3, page.shape)).clip(0, 255).astype(np.uint8), truth


def test_pages_are_read(recognizer: Recognizer, scans: list[list[Scan]]) -> None:
    written = [scan for writer in scans for scan in writer]
    found = right = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        start = rng.integers(0, len(written) - 120)
        page, truth = compose(written[start : start + 120], 12, rng)
        seen = [character for line in pages.read_page(page) for character in line]
        forms = np.stack([recognizer.to_normal_form(character.bitmap) for character in seen])
        read = [candidates[0].character for candidates in recognizer.classify(forms)]
        boxes = np.array([character.box for character in seen])
        for box, character in truth:
            distance = np.abs(boxes - box).max(axis=1)
            if distance.min() <= 6:
                found += 1
                right += read[distance.argmin()] == character
    print(f"\n{found / 7.2:.1f} % of 720 boxes found, {right / 7.2:.1f} % of the characters read")
    assert found >= 0.95 * 720
    assert right >= 0.90 * 720


def test_own_characters_need_few_pictures(
    casia_dir: Path, scans: list[list[Scan]], tmp_path: Path
) -> None:
    """20 characters by 30 writers to learn from, and by 60 others to test."""
    weights = named_run("HCCR_STROKES_RUN")
    writers = read_writers(casia_dir / "HWDB1.1-100trn_gnt.zip", 30)
    for split, hands in (("train", writers), ("test", scans)):
        for number, hand in enumerate(hands):
            for index, scan in enumerate(hand):
                if scan.character in OWN:
                    folder = tmp_path / "pictures" / split / scan.character
                    folder.mkdir(parents=True, exist_ok=True)
                    bitmap = np.pad(scan.bitmap, 12, constant_values=255)
                    Image.fromarray(bitmap).save(folder / f"{number}-{index}.png")
    data = [f"--pictures={tmp_path / 'pictures'}", f"--data_dir={tmp_path / 'data'}"]
    assert command.main(["prepare", *data, "--name=mine"]) == 0
    config = json.loads((weights / "config.json").read_text())
    top1: dict[str, list[float]] = {"from simulated writers": [], "from nothing": []}
    for start, scores in top1.items():
        for seed in range(3):
            workdir = tmp_path / f"{start}-{seed}"
            flags = [f"--config={ROOT / 'configs' / 'finetune.py'}", f"--workdir={workdir}"]
            flags += [f"--config.model.{k}={config['model'][k]}" for k in ("width", "stem_stride")]
            flags += [f"--config.data.data_dir={tmp_path / 'data'}", f"--config.seed={seed}"]
            if start == "from simulated writers":
                flags.append(f"--config.init_from={weights}")
            assert main.main(["main", *flags]) == 0
            scores.append(100 * json.loads((workdir / "eval.json").read_text())["top1"])
    for start, scores in top1.items():
        print(f"\n{start}: {np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f} %, {scores}")
    assert min(top1["from simulated writers"]) > max(top1["from nothing"]) + 30
