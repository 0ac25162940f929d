"""Folders as people have them: links, hidden files, other encodings, splits by any name."""

import os
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
from hccr_jax.data.prepare import prepare
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


def test_what_macos_adds_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("Train/1001-c", "Train/1002-c", "Test/1241-c"):
        number = int(place[-6:-2])
        write_gnt(tmp_path / "casia" / f"{place}.gnt", member(number, "一丁"))
        folder, _, name = place.partition("/")
        write_gnt(tmp_path / "casia" / folder / f"._{name}.gnt", b"\0\5\x16\7\0\2\0\0Mac OS X")
    write_gnt(tmp_path / "casia" / "__MACOSX" / "Train" / "._1001-c.gnt", b"\0\5\x16\7")
    for on_error in ("stop", "skip"):
        flags = [f"--archives={tmp_path / 'casia'}", f"--data_dir={tmp_path / on_error}"]
        assert main(["prepare", *flags, f"--on_error={on_error}"]) == 0
        manifest = store.read_manifest("casia_hwdb", tmp_path / on_error)
        writers = manifest["characters_per_writer"]
        assert sorted([*writers["train"], *writers["validation"]]) == ["1001", "1002"]
        assert manifest["skipped"] == {}
        capsys.readouterr()


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
