"""Archives and CSV files as people have them: joined, packed on Windows, exported from Excel."""

import zipfile
from pathlib import Path

import pytest
from test_archives import MEMBER, origins, write_zip
from test_labelled_images import picture, save
from test_prepare import member

from hccr_jax.cli.command import main
from hccr_jax.data import labelled_images, splits, store
from hccr_jax.data.casia import archives
from hccr_jax.data.prepare import prepare
from hccr_jax.errors import InputError


def joined(writers: range, characters: str) -> bytes:
    return b"".join(member(writer, characters) for writer in writers)


def test_joined_files_of_an_older_distribution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "casia"
    folder.mkdir()
    (folder / "1.1train-gb1.gnt").write_bytes(joined(range(22), "啊一丁") + member(99, "A"))
    (folder / "1.1test-gb1.gnt").write_bytes(joined(range(30, 34), "啊一丁"))
    flags = [f"--archives={folder}", f"--data_dir={tmp_path / 'data'}"]
    assert main(["prepare", *flags]) == 0
    out, err = capsys.readouterr()
    assert "train             57 characters, unknown writers, 3 classes" in out
    assert "validation         9 characters, unknown writers, 3 classes" in out
    assert "validation is a tenth of each class: there are no two training writers" in out
    assert "passed over 1 (" in out, "the symbol, counted once"
    assert "warning" not in err
    manifest = store.read_manifest("casia_hwdb", tmp_path / "data")
    assert manifest["characters_per_class"] == {
        "train": dict.fromkeys("啊丁一", 19),
        "validation": dict.fromkeys("啊丁一", 3),
        "test": dict.fromkeys("啊丁一", 4),
    }
    # Together they are all records, each once: of each class the second and every tenth after it.
    loaded = {
        s: splits.load_split("casia_hwdb", tmp_path / "data", s, 32, 2)
        for s in ("train", "validation")
    }
    numbers = {s: sorted(map(int, split.record_numbers)) for s, split in loaded.items()}
    assert numbers["validation"] == [3 * w + c for w in (1, 11, 21) for c in range(3)]
    everything = sorted(numbers["train"] + numbers["validation"])
    assert everything == [3 * w + c for w in range(22) for c in range(3)]


def test_one_writer_alone_is_divided_by_class(tmp_path: Path) -> None:
    folder = tmp_path / "casia"
    folder.mkdir()
    (folder / "1001-c.gnt").write_bytes(joined(range(2), "啊一"))
    made = prepare([folder], tmp_path / "data").manifest
    assert made["characters_per_writer"] == {"train": {"1001": 2}, "validation": {"1001": 2}}


def test_members_of_a_zip_packed_on_windows(tmp_path: Path) -> None:
    names = ["Train\\7.gnt", "Test\\8.gnt", "sub\\1001-c.gnt", "__MACOSX\\Train\\._7.gnt"]
    path = write_zip(tmp_path / "casia" / "mine.zip", *names)
    assert origins(path) == [
        ("test", "8", "mine.zip/Test\\8.gnt"),
        ("train", "1001", "mine.zip/sub\\1001-c.gnt"),
        ("train", "7", "mine.zip/Train\\7.gnt"),
    ]
    for found in archives.list_members([path]):
        assert len(list(archives.read_member(found))) == 1


class NamedInGbk(zipfile.ZipInfo):
    """An entry as Chinese Windows packs it: its name in GBK, without the flag of UTF-8."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("gbk"), self.flag_bits & ~0x800


def test_folders_in_a_zip_named_in_gbk(tmp_path: Path) -> None:
    path = tmp_path / "casia" / "mine.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("测试集/1001-c.gnt", "训练集/甲.gnt", "训练集/1241-c.gnt"):
            archive.writestr(NamedInGbk(name), MEMBER)
    found = archives.list_members([path])
    assert [(m.split, m.writer) for m in found] == [
        *(("test", "1001"), ("train", "1241"), ("train", "甲"))
    ]
    assert all(len(list(archives.read_member(m))) == 1 for m in found)


def test_shadows_of_macos_in_a_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", "a/1001-c.gnt", "a/._1001-c.gnt")
    assert [row[1] for row in origins(path)] == ["1001"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HWDB1.1trn_gnt.rar", "unpack it with `unrar x`"),
        ("HWDB1.1trn_gnt.7z", "unpack it with `7z x`"),
        ("HWDB1.1trn_gnt.tar.gz", "unpack it with `tar -xf`"),
        ("HWDB1.1trn_gnt.alz", "unpack it with `unalz`"),
        ("1001.pot", "pen strokes .* not images: take HWDB's archives"),
        ("001-P16.dgrl", "pages of text, not characters"),
        ("Gnt1.1Test.zip.part", "an unfinished download: wait for it"),
        ("1001.mpf", r"features \(.mpf\), not images"),
    ],
)
def test_files_of_other_kinds_are_named_with_a_remedy(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_bytes(b"other bytes")
    packed = write_zip(tmp_path / "other" / "Train.zip", name)
    for path in (tmp_path / "train" / name, tmp_path / "train", packed):
        with pytest.raises(InputError, match=message) as caught:
            archives.list_members([path])
        assert "download it again" not in str(caught.value)


def pictures_of(table: Path, text: str, encoding: str = "utf-8") -> list[tuple[str, str, str]]:
    """Returns (name, character, split) of the pictures in a CSV file, which may have no faults."""
    table.write_bytes(text.encode(encoding))
    faults: list[str] = []
    found = labelled_images.list_pictures(table, faults, lambda reason, size: None)
    assert faults == []
    return sorted((member.name, member.character, member.split) for member in found)


@pytest.mark.parametrize(
    "text",
    [
        " Path , CHARACTER ,Split\n img/a.png , 一 , Train \n img/b.png , 丁 , TEST \n",
        "path,character,split,,\nimg/a.png,一,train,,\nimg/b.png,丁,test,,\n,,,,\n",
        "path,character,split\r\nimg\\a.png,一,train\r\nimg\\b.png,丁,test\r\n",
        "\ufeffpath;character;split\nimg/a.png;一;训练\nimg/b.png;丁;测试集\n",
        "path\tcharacter\tsplit\nimg/a.png\tU+4E00\ttrn\n.\\img\\b.png\t丁\ttst\n\n",
        '"path","character","split"\n"img/a.png","一","train"\n"img//b.png","丁","test"',
    ],
)
def test_csv_files_of_spreadsheets(text: str, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        save(tmp_path / "img" / f"{name}.png", picture(number))
    rows = pictures_of(tmp_path / "list.csv", text)
    assert rows == [("img/a.png", "一", "train"), ("img/b.png", "丁", "test")]


def test_a_csv_file_in_another_encoding_is_refused_with_a_remedy(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(0))
    for encoding in ("gbk", "utf-16"):
        with pytest.raises(
            InputError, match=r"not a CSV file in UTF-8 .*: save it as CSV in UTF-8"
        ):
            pictures_of(tmp_path / "list.csv", "path,character\na.png,永\n", encoding)


@pytest.mark.parametrize("name", ["mine.zip", "0.png"])
def test_pictures_from_a_file_that_is_no_list(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\xde\xad\xbe\xef")
    with pytest.raises(InputError, match="give a folder of pictures, unpacked, or a CSV file"):
        prepare([], tmp_path / "data", "mine", pictures=tmp_path / name)


def test_pictures_and_archives_mistaken_for_each_other(tmp_path: Path) -> None:
    save(tmp_path / "casia" / "一" / "0.png", picture(0))
    with pytest.raises(InputError, match=r"no \.gnt member found; pictures are for --pictures"):
        prepare([tmp_path / "casia"], tmp_path / "data")
    (tmp_path / "casia" / "一" / "0.png").rename(tmp_path / "casia" / "1001-c.gnt")
    with pytest.raises(InputError, match=r"no usable picture.* \.gnt files are for --archives"):
        prepare([], tmp_path / "data", "mine", pictures=tmp_path / "casia")


def test_missing_splits_and_shared_writers_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["path,character,writer,split"]
    for number, split in enumerate(("train", "train", "val", "val")):
        save(tmp_path / f"{number}.png", picture(number))
        rows.append(f"{number}.png,{'一丁'[number % 2]},anna,{split}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    flags = [f"--pictures={tmp_path / 'list.csv'}", f"--data_dir={tmp_path / 'data'}"]
    assert main(["prepare", *flags]) == 0
    out, err = capsys.readouterr()
    assert "test       none: training needs it: give more images of each character" in out
    assert "validation none" not in out
    assert "warning: writers in more than one split: anna" in err


def test_a_data_set_of_one_class_is_refused(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / "mine" / "永" / f"{number}.png", picture(number))
    with pytest.raises(InputError, match="mine: 永 is the only character with training images"):
        prepare([], tmp_path / "data", "mine", pictures=tmp_path / "mine")


def test_the_rule_of_a_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="digits and underscores, a letter first"):
        prepare([], tmp_path, "100chars")


def test_the_name_of_the_simulated_writers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is the data set of simulated writers"):
        prepare([], tmp_path, "synthetic")
