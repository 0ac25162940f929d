"""From archives to arrays: the data set on disk, its splits, and a killed preparation."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hccr_jax.cli.command import main
from hccr_jax.data import splits, store
from hccr_jax.data.casia import charset
from hccr_jax.data.casia.gnt import pack_record
from hccr_jax.data.images.normalize import normalize
from hccr_jax.data.prepare import prepare
from hccr_jax.errors import InputError

# In GB2312 order, not in Unicode order; the last one is written by test writers only.
CHARACTERS = "啊一丁七万"
TRAIN_WRITERS = range(1001, 1013)
TEST_WRITERS = range(1241, 1244)


def bitmap(writer: int, number: int) -> np.ndarray:
    rng = np.random.default_rng([writer, number])
    return rng.integers(0, 256, rng.integers(1, 90, 2), np.uint8)


def member(writer: int, characters: str) -> bytes:
    return b"".join(
        pack_record(charset.character_to_tag(character), bitmap(writer, number))
        for number, character in enumerate(characters)
    )


def write_archives(folder: Path, damage: bytes = b"") -> Path:
    """Writes a training and a test archive; symbols stand among the records."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "HWDB1.1trn_gnt_P1.zip", "w") as archive:
        for writer in TRAIN_WRITERS:
            end = damage if writer == TRAIN_WRITERS[-1] else b""
            archive.writestr(f"{writer}-c.gnt", member(writer, "一" + CHARACTERS[:-1] + "A") + end)
    with zipfile.ZipFile(folder / "HWDB1.1tst_gnt.zip", "w") as archive:
        for writer in TEST_WRITERS:
            data = pack_record(b"B\0", bitmap(0, 0)) + member(writer, CHARACTERS)
            archive.writestr(f"{writer}-c.gnt", data)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the data folder of a small prepared set, with `archives` next to it."""
    root = tmp_path_factory.mktemp("prepared")
    result = prepare([write_archives(root / "archives")], root / "data")
    assert result.is_new
    return root / "data"


def test_the_manifest_counts_the_records(prepared: Path) -> None:
    manifest = store.read_manifest("casia_hwdb", prepared)
    assert manifest["classes"] == [
        "啊",
        "丁",
        "七",
        "一",
    ]  # 4 of: 啊 1601, 丁 2201, 七 3863, 一 5027
    per_split = manifest["characters_per_split"]
    assert per_split["train"] + per_split["validation"] == 12 * 5
    assert per_split["validation"] >= 5
    assert per_split["test"] == 3 * 4
    assert manifest["characters_per_class"]["test"] == dict.fromkeys("啊丁七一", 3)
    assert manifest["characters_per_archive"]["HWDB1.1tst_gnt.zip"] == 12
    skipped = {reason: entry["count"] for reason, entry in manifest["skipped"].items()}
    assert skipped == {
        "not a level-1 character": 15,
        "class without training characters": 3,
    }


def test_an_unknown_tag_stops_or_is_counted(tmp_path: Path) -> None:
    archives = write_archives(tmp_path / "archives", pack_record(b"\xff\xff", bitmap(0, 0)))
    place = "HWDB1.1trn_gnt_P1.zip/1012-c.gnt: byte [0-9]+: unknown tag ffff"
    with pytest.raises(InputError, match=place):
        prepare([archives], tmp_path / "data")
    assert not (tmp_path / "data" / "casia_hwdb").exists()
    manifest = prepare([archives], tmp_path / "data", on_error="skip").manifest
    assert manifest["skipped"]["unknown tag"]["count"] == 1


def test_wrong_tags_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    characters = charset.level1()[:40]
    folder = tmp_path / "Train"
    folder.mkdir()
    for writer in range(20):
        tags = list(characters)
        tags[1] = tags[0]  # all of one class under another's name
        if writer == 3:
            tags[7] = tags[8]
        (folder / f"{writer}.gnt").write_bytes(member(writer, "".join(tags)))
    flags = [f"--archives={folder}", f"--data_dir={tmp_path / 'data'}"]
    assert main(["prepare", *flags]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    manifest = store.read_manifest("casia_hwdb", tmp_path / "data")
    usual = len(manifest["characters_per_writer"]["train"])
    first = characters[0]
    assert warnings[0] == (
        f"warning: are the tags right? written more than once by one writer: {first} 2 times by "
        f"writer 0, {first} 2 times by writer 1, {first} 2 times by writer 10, 18 more"
    )
    assert warnings[1] == (
        f"warning: are the tags right? classes of unusual size in train, where the median has "
        f"{usual}: {first} has {2 * usual}"
    )
    assert len(warnings) <= 3
    assert main(["prepare", *flags]) == 0
    assert warnings == capsys.readouterr().err.splitlines(), "repeated at each call"


def test_right_tags_are_not_warned_of(tmp_path: Path) -> None:
    folder = tmp_path / "Train"
    folder.mkdir()
    for writer in range(12):  # each leaves out another one
        left_out = [c for number, c in enumerate(charset.level1()[:40]) if number != writer]
        (folder / f"{writer}.gnt").write_bytes(member(writer, "".join(left_out)))
    assert prepare([folder], tmp_path / "data").manifest["doubts"] == []


def test_doubts_about_the_real_subset(casia_dir: Path, tmp_path: Path) -> None:
    doubts = prepare(sorted(casia_dir.glob("HWDB1.1-100*.zip")), tmp_path).manifest["doubts"]
    # Its records at the border of two writers may belong to the neighbour.
    (repeats,) = doubts
    assert repeats.startswith("written more than once by one writer: ")
    assert repeats.endswith(", 17 more")


def test_writers_of_the_splits_are_disjoint(prepared: Path) -> None:
    writers = store.read_manifest("casia_hwdb", prepared)["characters_per_writer"]
    assert sorted(writers) == ["test", "train", "validation"]
    assert {*writers["train"], *writers["validation"]} == {str(w) for w in TRAIN_WRITERS}
    assert len(writers["train"]) + len(writers["validation"]) == len(TRAIN_WRITERS)
    assert set(writers["test"]) == {str(w) for w in TEST_WRITERS}


@pytest.mark.parametrize("split", ["train", "validation", "test", "train+validation"])
def test_bitmaps_are_restored_bit_exactly_and_in_order(prepared: Path, split: str) -> None:
    loaded = splits.load_split("casia_hwdb", prepared, split, image_px=32, margin_px=2)
    rows = np.arange(len(loaded.labels))[::-1]
    originals = splits.load_bitmaps("casia_hwdb", prepared, split, rows)
    assert loaded.classes == ("啊", "丁", "七", "一")
    assert loaded.images.dtype == np.uint8
    assert loaded.labels.dtype == np.int32
    for row, original in zip(rows, originals, strict=True):
        writer, record = int(loaded.writers[row]), int(loaded.record_numbers[row])
        test = writer in TEST_WRITERS
        character = (" " + CHARACTERS if test else "一" + CHARACTERS)[record]
        archive = "HWDB1.1tst_gnt.zip" if test else "HWDB1.1trn_gnt_P1.zip"
        assert loaded.sources[row] == f"{archive}/{writer}-c.gnt"
        assert loaded.classes[loaded.labels[row]] == character
        np.testing.assert_array_equal(original, bitmap(writer, record - test))
        np.testing.assert_array_equal(loaded.images[row], normalize(original, 32, 2))
    if "+" not in split:
        identity = list(zip(loaded.writers, loaded.record_numbers, strict=True))
        assert identity == sorted(identity)


def test_each_aspect_has_arrays_of_its_own(prepared: Path) -> None:
    def arrays() -> set[Path]:
        return set(store.dataset_folder("casia_hwdb", prepared).glob("normal_form/*24px*/images*"))

    loaded, files = {}, [arrays()]
    for aspect in ("keep", "adaptive"):
        loaded[aspect] = splits.load_split("casia_hwdb", prepared, "test", 24, 2, aspect).images
        files.append(arrays())
    assert [len(there) for there in files] == [0, 1, 2]
    originals = splits.load_bitmaps("casia_hwdb", prepared, "test", range(12))
    for aspect, images in loaded.items():
        exact = [normalize(original, 24, 2, aspect) for original in originals]
        np.testing.assert_array_equal(images, exact)
    assert (loaded["keep"] != loaded["adaptive"]).any()
    np.testing.assert_array_equal(
        splits.load_split("casia_hwdb", prepared, "test", 24, 2).images, loaded["keep"]
    )


def test_wrong_requests_for_a_split(prepared: Path) -> None:
    with pytest.raises(InputError, match="it has train, validation, test"):
        splits.load_split("casia_hwdb", prepared, "dev", 32, 2)
    with pytest.raises(InputError, match="each once"):
        splits.load_split("casia_hwdb", prepared, "test+test", 32, 2)
    with pytest.raises(InputError, match="margin_px=16"):
        splits.load_split("casia_hwdb", prepared, "test", 32, 16)
    with pytest.raises(InputError, match="rows 0 to 11"):
        splits.load_bitmaps("casia_hwdb", prepared, "test", [3, 12])


def test_the_error_for_a_missing_data_set_has_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        splits.load_split("casia_hwdb", tmp_path, "train", 32, 2)
    message = str(caught.value)
    for part in ("Gnt1.1Test.zip", "HWDB1.1tst_gnt.zip", "hccr prepare", "quickstart.sh"):
        assert part in message
    assert "\n" not in message


def test_the_same_archives_again_and_others(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = tmp_path / "data"
    flags = [f"--data_dir={data_dir}", "--name=small"]
    first = ["prepare", f"--archives={prepared.parent / 'archives'}", *flags]
    other = ["prepare", f"--archives={write_archives(tmp_path / 'x', b'?')}", *flags]
    assert main(first) == 0
    assert "test              12 characters, 3 writers, 4 classes" in capsys.readouterr().out
    assert main(first) == 0
    assert "already made from these archives" in capsys.readouterr().out
    assert main(other) == 2
    assert "other archives" in capsys.readouterr().err
    assert main([*other, "--overwrite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1012-c.gnt: byte" in error
    assert "truncated header" in error
    assert main(first) == 0
    assert "already made" in capsys.readouterr().out, "a failed replacement changes nothing"
    assert main([*other, "--overwrite", "--on_error=skip"]) == 0
    skipped = store.read_manifest("small", data_dir)["skipped"]
    assert skipped["truncated header, rest of the file lost"] == {"count": 1, "bytes": 1}
    assert [path.name for path in data_dir.iterdir() if path.is_dir()] == ["small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--archives is missing"),
        (["--archives=/nowhere"], "--data_dir is missing"),
        (["--archives=/nowhere", "--data_dir=/tmp"], "/nowhere: no such file or folder"),
        (["--archives=/nowhere", "--data_dir=/tmp", "--name=A B"], "lower-case letters"),
        (["--archive=/nowhere"], "archive"),
        (["--on_error=ignore"], "on_error"),
        (["/nowhere"], "unexpected argument"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "hccr_jax", "prepare", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--help"]) == 0
    assert "--archives=~/casia" in capsys.readouterr().out


def test_test_archives_alone_are_refused(prepared: Path, tmp_path: Path) -> None:
    archive = prepared.parent / "archives" / "HWDB1.1tst_gnt.zip"
    with pytest.raises(InputError, match="the archives of the training writers are needed"):
        prepare([archive], tmp_path / "data")
    assert not (tmp_path / "data" / "casia_hwdb").exists()


def test_a_kill_in_the_middle_leaves_nothing_loadable(tmp_path: Path) -> None:
    folder = tmp_path / "Train"
    folder.mkdir()
    record = struct.pack("<I2sHH", 10 + 4096, b"\xb0\xa1", 64, 64) + bytes(range(256)) * 16
    other = record[:4] + b"\xb0\xa2" + record[6:]
    for writer in range(8):
        data = record * (2000 + writer) + other * (500 - writer)
        (folder / f"{writer}.gnt").write_bytes(data)
    command = [
        *(sys.executable, "-m", "hccr_jax", "prepare", f"--archives={folder}"),
        f"--data_dir={tmp_path / 'data'}",
    ]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    staging = tmp_path / "data" / "incomplete.casia_hwdb"
    while not list(staging.glob("casia_hwdb/*/*.part")):
        assert running.poll() is None, "killed too late: nothing tested"
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert staging.exists()
    with pytest.raises(InputError, match="no data set casia_hwdb"):
        splits.load_split("casia_hwdb", tmp_path / "data", "train", 32, 2)
    assert not list((tmp_path / "data").glob("casia_hwdb/*"))
    again = prepare([folder], tmp_path / "data")
    assert again.manifest["characters_per_archive"] == {"Train": 8 * 2500}
    assert not staging.exists()


def test_two_processes_may_load_a_new_split_at_once(prepared: Path) -> None:
    code = (
        "import sys, zlib; from hccr_jax.data.splits import load_split\n"
        "if __name__ == '__main__':\n"
        "  split = load_split('casia_hwdb', sys.argv[1], 'train', 48, 0)\n"
        "  print(zlib.crc32(split.images), split.labels.sum())\n"
        "  assert not {'jax', 'tensorflow'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(prepared)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    printed = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(printed) == 1
    left = store.dataset_folder("casia_hwdb", prepared).glob("normal_form/*48px*.part")
    assert not list(left)


def test_neither_jax_nor_tensorflow_is_imported(prepared: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from hccr_jax.cli import command\n"
        "if __name__ == '__main__':\n"
        "  assert not {'jax', 'tensorflow_datasets'} & set(sys.modules)\n"
        "  assert command.main(['prepare', *sys.argv[1:]]) == 0\n"
        "  assert 'tensorflow_datasets' in sys.modules\n"
        "  assert not {'jax', 'tensorflow'} & set(sys.modules)\n"
    )
    flags = [f"--archives={prepared.parent / 'archives'}", f"--data_dir={tmp_path}"]
    subprocess.run([sys.executable, "-W", "error", "-c", code, *flags], check=True)
    features = store.dataset_folder("casia_hwdb", tmp_path) / "features.json"
    assert "image" in json.loads(features.read_text())["featuresDict"]["features"]


def test_the_data_set_opens_as_a_tfds_builder(prepared: Path) -> None:
    import tensorflow_datasets as tfds

    from hccr_jax.data.tfds_builder import CasiaHwdb

    builder = CasiaHwdb(data_dir=prepared)
    assert builder.info.features["label"].names == list(charset.level1())
    directory = store.dataset_folder("casia_hwdb", prepared)
    for source in (builder.as_data_source("test"), tfds.builder_from_directory(directory)):
        split = source if hasattr(source, "__len__") else source.as_data_source("test")
        assert len(split) == 12
        assert split[0]["character"].decode() == "啊"
        np.testing.assert_array_equal(split[0]["image"], bitmap(TEST_WRITERS[0], 0))
