"""Folders as people have them: links, hidden files, other encodings, splits by any name."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from test_archives import MEMBER, origins
from test_labelled_images import picture, save
from test_prepare import member

from hccr_jax.cli.command import main
from hccr_jax.data import labelled_images, splits, store
from hccr_jax.data.casia import archives
from hccr_jax.data.casia.archives import Member
from hccr_jax.data.casia.divisions import split_of
from hccr_jax.data.prepare import drop_copies, prepare
from hccr_jax.errors import InputError
from hccr_jax.paths import walk


def pictures_in(root: Path) -> list[Member]:
    return labelled_images.list_pictures(root, [], lambda reason, size: None)


def write_gnt(path: Path, data: bytes = MEMBER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def named_in_gbk(folder: Path, name: str) -> Path:
    return Path(os.fsdecode(bytes(folder) + b"/" + name.encode("gbk")))


def test_links_to_character_folders_are_followed(tmp_path: Path) -> None:
    for number, character in enumerate("一丁七万"):
        save(tmp_path / "store" / character / "a.png", picture(number))
    (tmp_path / "mine").mkdir()
    for character in "一丁":
        shutil.copytree(tmp_path / "store" / character, tmp_path / "mine" / character)
    for character in "七万":
        (tmp_path / "mine" / character).symlink_to(tmp_path / "store" / character)
    assert {member.character for member in pictures_in(tmp_path / "mine")} == set("一丁七万")


def test_links_to_splits_archives_and_pictures_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "store" / "一" / "a.png", picture(0))
    save(tmp_path / "other.png", picture(1))
    (tmp_path / "mine" / "test" / "一").mkdir(parents=True)
    (tmp_path / "mine" / "train").symlink_to(tmp_path / "store")
    (tmp_path / "mine" / "test" / "一" / "b.png").symlink_to(tmp_path / "other.png")
    assert [m.split for m in pictures_in(tmp_path / "mine")] == ["test", "train"]
    write_gnt(tmp_path / "elsewhere" / "1001-c.gnt")
    write_gnt(tmp_path / "elsewhere" / "7.gnt")
    (tmp_path / "casia" / "HWDB1.1tst_gnt").mkdir(parents=True)
    (tmp_path / "casia" / "HWDB1.1trn_gnt").symlink_to(tmp_path / "store")
    write_gnt(tmp_path / "store" / "1001-c.gnt")
    link = tmp_path / "casia" / "HWDB1.1tst_gnt" / "7.gnt"
    link.symlink_to(tmp_path / "elsewhere" / "7.gnt")
    assert [row[:2] for row in origins(tmp_path / "casia")] == [("test", "7"), ("train", "1001")]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    save(tmp_path / "mine" / "一" / "a.png", picture(0))
    (tmp_path / "mine" / "一" / "up").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "丁").symlink_to(tmp_path / "mine" / "一", target_is_directory=True)
    found = [folder.relative_to(tmp_path / "mine") for folder, _ in walk(tmp_path / "mine")]
    assert found == [Path(), Path("一"), Path("丁")]


@pytest.mark.parametrize("name", ["丁", "一/b.png", "1001-c.gnt"])
def test_a_broken_link_is_named(name: str, tmp_path: Path) -> None:
    save(tmp_path / "mine" / "一" / "a.png", picture(0))
    (tmp_path / "mine" / name).symlink_to(tmp_path / "nowhere")
    for read in (pictures_in, lambda root: archives.list_members([root])):
        with pytest.raises(InputError, match=f"{name}: not a file, or a broken link: remove it"):
            read(tmp_path / "mine")


def test_what_macos_adds_is_left_out(tmp_path: Path) -> None:
    for place in ("Train/1001-c", "Train/1002-c", "Test/1241-c"):
        number = int(place[-6:-2])
        write_gnt(tmp_path / "casia" / f"{place}.gnt", member(number, "一丁"))
        folder, _, name = place.partition("/")
        write_gnt(tmp_path / "casia" / folder / f"._{name}.gnt", b"\0\5\x16\7\0\2\0\0Mac OS X")
    write_gnt(tmp_path / "casia" / "__MACOSX" / "Train" / "._1001-c.gnt", b"\0\5\x16\7")
    assert len(archives.list_members([tmp_path / "casia"])) == 3
    made = prepare([tmp_path / "casia"], tmp_path / "data", on_error="skip")
    writers = made.manifest["characters_per_writer"]
    assert sorted([*writers["train"], *writers["validation"]]) == ["1001", "1002"]
    assert made.manifest["skipped"] == {}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_files_named_in_gbk_bytes(tmp_path: Path) -> None:
    """As `unzip` leaves them that were packed on a Chinese Windows."""
    for number, character in enumerate("一永"):
        save(named_in_gbk(tmp_path / "mine" / "train" / character, "甲.png"), picture(number))
        save(named_in_gbk(tmp_path / "mine" / "test" / character, "乙.png"), picture(9 + number))
    named_in_gbk(tmp_path / "mine", "说明.txt").write_text("notes")
    Path(os.fsdecode(bytes(tmp_path) + b"/mine/\xff.txt")).write_text("notes")
    result = prepare([], tmp_path / "data", "mine", pictures=tmp_path / "mine")
    assert result.manifest["classes"] == ["一", "永"]
    assert list(splits.load_split("mine", tmp_path / "data", "test", 32, 2).sources) == [
        "mine/test/一/乙.png",
        "mine/test/永/乙.png",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_folders_named_in_gbk_bytes_are_refused_with_a_remedy(tmp_path: Path) -> None:
    """The bytes of 一, d2 bb, are valid in UTF-8 too: һ, U+04BB."""
    for number, character in enumerate("一永"):
        save(named_in_gbk(tmp_path / "mine", character) / "a.png", picture(number))
    with pytest.raises(InputError, match=r"永: a name that is not UTF-8, .* `convmv -f gbk -t utf"):
        pictures_in(tmp_path / "mine")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_an_unusable_picture_of_a_gbk_name_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate("甲乙丙丁"):
        save(tmp_path / "mine" / "永" / f"{name}.png", picture(number))
        save(tmp_path / "mine" / "一" / f"{name}.png", picture(10 + number))
    path = named_in_gbk(tmp_path / "mine" / "永", "戊.png")
    path.write_bytes(b"\x89PNG\r\n\x1a\n no more")
    flags = [f"--pictures={tmp_path / 'mine'}", f"--data_dir={tmp_path / 'data'}", "--name=mine"]
    assert main(["prepare", *flags]) == 2
    assert "永/戊.png: damaged" in capsys.readouterr().err
    assert main(["prepare", *flags, "--on_error=skip"]) == 0
    (fault,) = store.read_manifest("mine", tmp_path / "data")["faults"]
    assert "永/戊.png: damaged" in fault


SPLIT_NAMES = {
    "train": [
        *("train", "Train", "TRAIN", "training", "trn", "trainset", "TrainSet", "train_data"),
        *("traindata", "training_set", "HWDB1.1trn_gnt_P1", "Gnt1.1TrainPart1", "my_train"),
        *("1.1train-gb1", "train-images", "训练集", "手写训练数据", "訓練"),
    ],
    "test": [
        *("test", "Tests", "tst", "testset", "test_data", "testing", "HWDB1.1tst_gnt"),
        *("Gnt1.1Test", "testImages", "competition-gnt", "测试集", "測試"),
    ],
    "validation": ["val", "Valid", "validation", "val_data", "valset", "验证集", "驗證"],
    "": [
        *("latest", "contest", "attest", "protest", "testudo", "testimony", "tested", "trainer"),
        *("trained", "restrain", "strain", "constraint", "evaluation", "value", "interval"),
        *("invalid", "train_test_split", "dev", "验", "训", "HWDB1.1", ""),
    ],
}


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_names_of_splits(split: str) -> None:
    assert {name: split_of(name) for name in SPLIT_NAMES[split]} == dict.fromkeys(
        SPLIT_NAMES[split], split
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("trn", "tst"), ("HWDB1.1trn_gnt", "HWDB1.1tst_gnt"), ("train_data", "test_data")),
        *(("trainset", "testset"), ("训练集", "测试集"), ("Training", "Testing")),
        *(("wrapper/Train", "wrapper/Test"), ("train/writer1", "writer2/test")),
        ("testdata/train", "testdata/test"),
    ],
)
def test_split_folders_under_other_names(train: str, test: str, tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "mine" / train / "丘" / f"{number}.png", picture(number))
        save(tmp_path / "mine" / test / "丘" / f"{number}.png", picture(10 + number))
    found = pictures_in(tmp_path / "mine")
    assert {m.name for m in found if m.split == "test"} == {f"{test}/丘/{n}.png" for n in range(4)}
    assert {m.split for m in found} == {"train", "validation", "test"}
    rows = [f"{member.name},{member.character}\n" for member in found]
    (tmp_path / "mine" / "list.csv").write_text("path,character\n" + "".join(rows))
    of_table = pictures_in(tmp_path / "mine" / "list.csv")
    assert [(m.name, m.split) for m in of_table] == [(m.name, m.split) for m in found]


@pytest.mark.parametrize("names", [("partA", "partB"), ("w1", "w2", "w3"), ("", "extra")])
def test_several_unknown_folders_are_refused_by_name(names: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        save(tmp_path / "mine" / "all" / name / "丘" / "0.png", picture(number))
    known = ", ".join(filter(None, names))
    with pytest.raises(InputError, match=f"mine/all: characters in several folders .*: {known}: "):
        pictures_in(tmp_path / "mine")


def test_a_lone_wrapper_is_passed_through(tmp_path: Path) -> None:
    for number in range(9):
        save(tmp_path / "mine" / "all" / "of them" / "丘" / f"{number}.png", picture(number))
    assert {m.split for m in pictures_in(tmp_path / "mine")} == {"train", "validation", "test"}


def test_archives_may_give_the_validation_split(tmp_path: Path) -> None:
    for place in ("训练/7.gnt", "验证/8.gnt", "测试/9.gnt"):
        write_gnt(tmp_path / place)
    assert [row[:2] for row in origins(tmp_path)] == [
        *(("test", "9"), ("train", "7"), ("validation", "8"))
    ]
    members = archives.divide(archives.list_members([tmp_path]))
    assert [m.writer for m in members["validation"]] == ["8"]


def refused_copy(*places: str) -> str:
    """Returns the pattern of the message on a copy in another split."""
    named = "".join(f"(?=.*{re.escape(place)})" for place in places)
    return f"the same content in two splits{named}.*--on_error=skip leaves it out of train"


def test_a_copied_gnt_file_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1001, 1002):
        write_gnt(tmp_path / "casia" / "train" / f"{number}-c.gnt", member(number, "一丁"))
    write_gnt(tmp_path / "casia" / "train" / "1001-c (1).gnt", member(1001, "一丁"))
    flags = [f"--archives={tmp_path / 'casia'}", f"--data_dir={tmp_path / 'data'}"]
    assert main(["prepare", *flags]) == 0
    size = len(member(1001, "一丁"))
    assert f"passed over 1 ({size:,} bytes): copy of another file" in capsys.readouterr().out
    manifest = store.read_manifest("casia_hwdb", tmp_path / "data")
    writers = manifest["characters_per_writer"]
    assert writers["train"] | writers["validation"] == {"1001": 2, "1002": 2}


@pytest.mark.parametrize("copy", ["train/test_1001.gnt", "test/1241-c.gnt", "val/7.gnt"])
def test_a_gnt_file_in_two_splits_is_refused(copy: str, tmp_path: Path) -> None:
    write_gnt(tmp_path / "casia" / "train" / "1001-c.gnt")
    write_gnt(tmp_path / "casia" / copy)
    with pytest.raises(InputError, match=refused_copy("casia/train/1001-c.gnt", f"casia/{copy}")):
        prepare([tmp_path / "casia"], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_picture_in_two_splits_is_refused_or_left_out_of_train(tmp_path: Path) -> None:
    for number, name in enumerate("甲乙丙"):
        save(tmp_path / "mine" / "train" / "一" / f"{name}.png", picture(number))
        save(tmp_path / "mine" / "train" / "丁" / f"{name}.png", picture(10 + number))
    save(tmp_path / "mine" / "test" / "一" / "戊.png", picture(0))
    with pytest.raises(InputError, match=refused_copy("mine/train/一/甲.png", "mine/test/一/戊")):
        prepare([], tmp_path / "data", "mine", pictures=tmp_path / "mine")
    made = prepare([], tmp_path / "data", "mine", "skip", pictures=tmp_path / "mine")
    assert made.manifest["characters_per_split"]["test"] == 1
    assert sum(made.manifest["characters_per_split"].values()) == 6
    assert made.manifest["skipped"]["copy of a file of another split"]["count"] == 1


@pytest.mark.parametrize("again", ["img/0.png", "./img/0.png", "img//0.png", "copy.png"])
def test_a_csv_that_lists_a_picture_twice(again: str, tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / f"img/{number}.png", picture(number))
    save(tmp_path / "copy.png", picture(0))
    table = tmp_path / "list.csv"
    lines = ["path,character,split", *(f"img/{n}.png,{'一丁'[n % 2]},train" for n in range(4))]
    table.write_text("\n".join([*lines, f"{again},一,test"]))
    with pytest.raises(InputError, match=refused_copy("img/0.png", str(Path(again)))):
        prepare([], tmp_path / "data", "mine", pictures=table)
    table.write_text("\n".join([*lines, f"{again},一,train"]))
    listed = labelled_images.list_pictures(table, [], lambda reason, size: None)
    skipped: list[str] = []
    kept = drop_copies(listed, False, lambda reason, size: skipped.append(reason))
    assert sorted(m.digest for m in kept) == sorted({m.digest for m in listed})
    assert skipped == ["copy of another file"]


def test_equal_pictures_of_two_writers_are_not_divided(tmp_path: Path) -> None:
    rows = ["path,character,writer"]
    for writer in range(8):
        save(tmp_path / f"{writer}.png", picture(0))
        rows.append(f"{writer}.png,一,w{writer}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match="the same content in two splits"):
        prepare([], tmp_path / "data", "mine", pictures=tmp_path / "list.csv")


def test_images_of_two_splits_are_warned_of_in_any_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        for place, character in enumerate("一丁"):
            page = picture(10 * place + number)
            save(tmp_path / "mine" / "train" / character / f"{number}.png", page)
            again = page if number == 2 else picture(100 + 10 * place + number)
            save(tmp_path / "mine" / "test" / character / f"{number}.bmp", again)
            save(
                tmp_path / "mine" / "val" / character / f"{number}.png",
                picture(200 + 10 * place + number),
            )
    flags = [f"--pictures={tmp_path / 'mine'}", f"--data_dir={tmp_path / 'data'}"]
    assert main(["prepare", *flags, "--on_error=skip"]) == 0
    assert "warning: 2 of 6 different images of test are in train too" in capsys.readouterr().err
