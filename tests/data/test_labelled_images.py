"""Labelled pictures, charset files, other CASIA archives, fine-tuning."""

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import saved
from test_prepare import bitmap, member

from hccr_jax import main as main_lib
from hccr_jax.cli.command import main
from hccr_jax.data import labelled_images, splits, store
from hccr_jax.data.casia import charset
from hccr_jax.data.casia.gnt import pack_record
from hccr_jax.data.images import ink
from hccr_jax.data.images.normalize import normalize
from hccr_jax.data.prepare import prepare
from hccr_jax.errors import InputError
from hccr_jax.inference.pretrained import load_pretrained
from hccr_jax.runtime.startup import Timeline
from hccr_jax.train.setup import create_training_setup

# In the order of the data set's classes, which is Unicode's.
CHARACTERS = "A一丁永𠀀"


def picture(seed: int, side: int = 48) -> np.ndarray:
    """Returns a character of a few strokes, uint8 (side, side)."""
    rng = np.random.default_rng(seed)
    page = np.full((side, side), 255, np.uint8)
    for place in rng.integers(8, side - 8, 3):
        page[place : place + 3, 8 : side - 8] = 60
        page[8 : side - 8, place : place + 2] = 90
    return page


def save(path: Path, page: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).save(path)
    return path


def write_folder(root: Path, per_character: int = 12, characters: str = CHARACTERS) -> Path:
    """Writes pictures in folders: the first by its code, a supplementary one by its own name."""
    for place, character in enumerate(characters):
        name = f"U+{ord(character):04X}" if place == 0 else character
        for number in range(per_character):
            save(root / name / f"{number}.png", picture(1000 * ord(character) + number))
    return root


def splits_of(name: str, data_dir: Path) -> dict[str, set[str]]:
    names = store.read_manifest(name, data_dir)["characters_per_split"]
    return {split: set(splits.load_split(name, data_dir, split, 32, 2).sources) for split in names}


def test_a_folder_becomes_a_data_set(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine")
    manifest = prepare([], tmp_path / "data", "mine", pictures=root).manifest
    assert manifest["classes"] == list(CHARACTERS)
    counts = manifest["characters_per_class"]
    for character in CHARACTERS:
        assert sum(counts[split][character] for split in counts) == 12
        assert counts["test"][character] >= 1
        assert counts["validation"][character] >= 1
    assert counts["train"].keys() == set(CHARACTERS)
    loaded = splits.load_split("mine", tmp_path / "data", "train", 32, 2)
    for row, source in enumerate(loaded.sources):
        file = tmp_path / source
        assert charset.parse_character(file.parent.name) == loaded.classes[loaded.labels[row]]
        exact = normalize(ink.to_bitmap(np.asarray(Image.open(file))), 32, 2)
        np.testing.assert_array_equal(loaded.images[row], exact)


def test_a_copy_elsewhere_is_divided_equally(tmp_path: Path) -> None:
    for place in ("one", "other"):
        root = write_folder(tmp_path / place / "mine")
        prepare([], tmp_path / place / "data", "mine", pictures=root)
    one, other = (splits_of("mine", tmp_path / place / "data") for place in ("one", "other"))
    assert one == other
    again = prepare([], tmp_path / "one" / "data", "mine", pictures=tmp_path / "other" / "mine")
    assert not again.is_new


def test_equal_pictures_stay_in_one_split(tmp_path: Path) -> None:
    for number in range(8):
        for copy in "abc":
            save(tmp_path / "mine" / "永" / f"{copy}{number}.png", picture(number))
    faults: list[str] = []
    members = labelled_images.list_pictures(tmp_path / "mine", faults, lambda reason, size: None)
    for number in range(8):
        assert len({m.split for m in members if m.name.endswith(f"{number}.png")}) == 1
    assert faults == []


def test_folders_may_give_the_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / "mine" / split, 4 if split == "train" else 3, "一丁")
        for number in range(3):  # others than in train
            save(tmp_path / "mine/test/丁" / f"{number}.png", picture(10**6 + number))
            save(tmp_path / "mine/test/U+4E00" / f"{number}.png", picture(10**7 + number))
    manifest = prepare([], tmp_path / "data", "mine", pictures=tmp_path / "mine").manifest
    assert manifest["characters_per_split"]["test"] == 6
    assert manifest["characters_per_split"]["train"] in (4, 5, 6)
    found = splits_of("mine", tmp_path / "data")
    assert all("/test/" in source for source in found["test"])
    assert all("/train/" in source for source in found["train"] | found["validation"])
    save(tmp_path / "mine" / "一" / "x.png", picture(5))
    with pytest.raises(InputError, match=r"x.png: has no split, others have"):
        prepare([], tmp_path / "data", "mine", pictures=tmp_path / "mine")


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def test_a_csv_file_divides_by_writer(tmp_path: Path) -> None:
    rows = [["path", "character", "writer"]]
    for writer in range(6):
        for number, character in enumerate("一丁"):
            name = f"pictures/{writer}-{number}.jpg"
            save(tmp_path / name, picture(10 * writer + number))
            rows.append([name, character, f"w{writer}"])
    table = write_csv(tmp_path / "table.csv", rows)
    manifest = prepare([], tmp_path / "data", "mine", pictures=table).manifest
    writers = {split: set(names) for split, names in manifest["characters_per_writer"].items()}
    assert writers.keys() == {"train", "validation", "test"}
    assert sum(map(len, writers.values())) == 6 == len(set().union(*writers.values()))
    assert manifest["doubts"] == []


def test_a_csv_file_may_give_the_split(tmp_path: Path) -> None:
    given = ["train"] * 4 + ["val", "test"]
    rows = [["character", "split", "path"]]
    for number, split in enumerate(given):
        save(tmp_path / f"{number}.png", picture(number))
        rows.append([("U+4E01", "一")[number % 2], split, f"{number}.png"])
    table = write_csv(tmp_path / "table.csv", rows)
    manifest = prepare([], tmp_path / "data", "mine", pictures=table).manifest
    assert manifest["characters_per_split"] == {"train": 4, "validation": 1, "test": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["path", "charcter"]], "its first line names the columns path, charcter: path and"),
        ([], r"names the columns \(none\)"),
        ([["path", "character"], ["a.png"]], "line 2: not as many values as columns"),
        ([["path", "character"], ["none.png", "永"]], "none.png: cannot be read: No such file"),
        ([["path", "character"], ["a.png", "永远"]], "line 2: '永远' is no character"),
        (
            [["path", "character", "split"], ["a.png", "永", "dev"]],
            "line 2: split 'dev': use train",
        ),
    ],
)
def test_a_wrong_csv_file_is_reported(rows: list[list[str]], message: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(0))
    with pytest.raises(InputError, match=message):
        prepare([], tmp_path / "data", pictures=write_csv(tmp_path / "table.csv", rows))


def test_unusable_pictures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "mine", 5, "一丁永")
    whole = (root / "永" / "0.png").read_bytes()
    (root / "永" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "永" / "text.jpg").write_bytes(b"text")
    save(root / "丁" / "blank.png", np.full((40, 40), 255, np.uint8))
    save(root / "other" / "x.png", picture(99))
    save(root / "丁" / "twin.png", picture(1000 * ord("永")))
    (root / "notes.txt").write_text("notes")
    bad = ("cut.png", "text.jpg", "blank.png", "x.png", "永/0.png")
    flags = ["prepare", f"--pictures={root}", f"--data_dir={tmp_path / 'data'}", "--name=mine"]
    assert main(flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "unusable pictures: 5" in last
    assert all(name in last for name in bad)
    assert not (tmp_path / "data" / "mine").exists()
    assert main([*flags, "--on_error=skip"]) == 0
    printed = capsys.readouterr()
    assert "passed over 1 (5 bytes): not a picture file: .txt" in printed.out
    assert "without 5 unusable pictures" in printed.out
    warnings = [line for line in printed.err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 5
    manifest = store.read_manifest("mine", tmp_path / "data")
    assert sum(manifest["characters_per_split"].values()) == 15
    assert main(flags) == 2, "already made, but still without the unusable ones"


@pytest.mark.parametrize("change", ["dark", "colour", "transparent"])
def test_dark_coloured_and_transparent_pictures_give_the_same_bitmap(
    change: str, tmp_path: Path
) -> None:
    page = picture(3)
    changed = {
        "dark": 255 - page,
        "colour": np.dstack([page] * 3),
        "transparent": np.dstack([np.zeros_like(page)] * 3 + [255 - page]),
    }[change]
    (entry,) = labelled_images.list_pictures(
        save(tmp_path / "永" / "a.png", changed).parents[1], [], lambda reason, size: None
    )
    difference = labelled_images.read_bitmap(entry).astype(int) - ink.to_bitmap(page)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("text", ["一丁\n永", "\ufeff一\r\n丁\r\n永\r\n", "一 丁 永"])
def test_a_charset_is_read_in_its_order(text: str, tmp_path: Path) -> None:
    path = tmp_path / "charset.txt"
    path.write_bytes(text.encode())
    assert labelled_images.read_charset(str(path)) == ("一", "丁", "永")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("永水永".encode(), "more than once: 永$"),
        ("永水\ue000\x07".encode(), r"no characters: U\+E000, U\+0007$"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "at least two characters"),
    ],
)
def test_a_wrong_charset_is_reported(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "charset.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        labelled_images.read_charset(str(path))
    with pytest.raises(InputError, match=r"none\.txt: No such file or directory: give level1, "):
        labelled_images.read_charset(str(tmp_path / "none.txt"))


def test_a_charset_chooses_and_orders_the_classes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine", 5)
    made = prepare([], tmp_path / "data", "mine", pictures=root, characters="永氷一")
    assert made.manifest["classes"] == ["永", "一"]
    assert made.manifest["not_trained"] == ["氷"]
    assert made.manifest["skipped"]["not in the charset"]["count"] == 15
    loaded = splits.load_split("mine", tmp_path / "data", "train", 32, 2)
    assert set(loaded.labels) == {0, 1}
    with pytest.raises(InputError, match="made from other archives or pictures"):
        prepare([], tmp_path / "data", "mine", pictures=root, characters="永一")


def write_archive(path: Path, writers: list[str], characters: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for place, writer in enumerate(writers):
            data = pack_record(b"A\0", bitmap(0, 0)) + member(place + len(path.name), characters)
            archive.writestr(f"{writer}-f.gnt", data)
    return path


def test_the_protocol_of_icdar_2013(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Source: 2,678,424 characters of all 720 writers of HWDB1.0 and 1.1 to train on (Zhang, Bengio
    and Liu, 2017), the 60 writers of the competition to test."""
    folder = tmp_path / "casia"
    # 丐 is of level 2: HWDB1.0 has 126 such classes.
    write_archive(folder / "Gnt1.0TrainPart1.zip", ["001", "002"], "一丁丐")
    write_archive(folder / "Gnt1.0Test.zip", ["337", "338"], "一丁丐")
    write_archive(folder / "HWDB1.1trn_gnt_P1.zip", ["1001", "1002"], "一丁永")
    write_archive(folder / "HWDB1.1tst_gnt.zip", ["1241"], "一丁永")
    test = write_archive(folder / "competition-gnt.zip", ["C001", "C002"], "一丁永")
    flags = [f"--archives={folder}", f"--test_archives={test}", f"--data_dir={tmp_path / 'data'}"]
    assert main(["prepare", *flags, "--name=icdar2013"]) == 0
    manifest = store.read_manifest("icdar2013", tmp_path / "data")
    writers = manifest["characters_per_writer"]
    assert set(writers["test"]) == {"C001", "C002"}
    assert {*writers["train"], *writers["validation"]} == {
        *("001", "002", "337", "338", "1001", "1002", "1241")
    }
    assert manifest["skipped"]["not a level-1 character"]["count"] == 9 + 4
    assert set(manifest["classes"]) == set("一丁永")
    # Without --test_archives the split of each archive follows from its name.
    manifest = prepare([folder], tmp_path / "data", "all").manifest
    assert set(manifest["characters_per_writer"]["test"]) == {"337", "338", "1241", "C001", "C002"}


def test_hwdb12_has_characters_beyond_level1(tmp_path: Path) -> None:
    # 丐 is in level 2, 囧 in GBK alone.
    archives = [
        write_archive(tmp_path / "Gnt1.2TrainPart1.zip", ["501", "502"], "丐囧"),
        write_archive(tmp_path / "Gnt1.2Test.zip", ["741"], "丐囧"),
    ]
    with pytest.raises(InputError, match="no level-1 character"):
        prepare(archives, tmp_path / "data", "hwdb12")
    characters = labelled_images.read_charset("chinese")
    manifest = prepare(archives, tmp_path / "data", "hwdb12", characters=characters).manifest
    assert manifest["classes"] == ["丐", "囧"]
    assert manifest["characters_per_split"] == {"train": 2, "validation": 2, "test": 2}
    assert manifest["skipped"]["not in the charset"]["count"] == 3


def test_all_characters_of_gbk_have_a_place() -> None:
    characters = charset.chinese()
    assert len(set(characters)) == 20_902  # GBK/2, GBK/3 and GBK/4 without compatibility forms
    gb2312 = [c for c in characters if len(c.encode("gb2312", "ignore")) == 2]
    assert len(gb2312) == 6763  # GB 2312-80: 3,755 of level 1 and 3,008 of level 2
    assert characters[:6763] == tuple(gb2312)
    assert all(len(charset.character_to_tag(c)) == 2 for c in characters)


def test_fine_tuning_keeps_the_weights_of_known_characters(
    tiny_job: list[str],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From 8 characters onto 4 in another order, one of them new."""
    root = write_folder(tmp_path / "mine", 12, "永七一丁")
    chosen = "丁永一七"
    prepare([], tmp_path / "data", "mine", pictures=root, characters=chosen)
    flags = [
        *tiny_job,
        "--config.data.name=mine",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.batch_size=8",
        "--config.num_steps=1",
    ]
    fresh = create_training_setup(main_lib.parse(["main", *flags]).config, Timeline())
    capsys.readouterr()
    flags += [f"--config.init_from={finished}"]
    job = create_training_setup(main_lib.parse(["main", *flags]).config, Timeline())
    assert "3 characters are kept, 1 are new, 5 are left out" in capsys.readouterr().out
    assert job.train.classes == tuple(chosen)
    old = saved(finished, load_pretrained(finished).step)
    known = ("丁", "七", "三", "上", "万", "下", "一", "丈")
    for name, leaf in job.initial.params.unpack()["classifier"].items():
        before = old[f"params['classifier']['{name}']"]
        unknown = fresh.initial.params.unpack()["classifier"][name]
        for place, character in enumerate(chosen):
            expected = (
                before[..., known.index(character)] if character in known else unknown[..., place]
            )
            assert np.asarray(leaf[..., place]).tobytes() == np.asarray(expected).tobytes()
