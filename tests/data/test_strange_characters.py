"""Characters as people write them: several code points for one, tags in another byte order."""

import re
import unicodedata
from pathlib import Path

import pytest
from test_archives import write_zip
from test_labelled_images import picture, save
from test_prepare import bitmap

from hccr_jax.cli.command import main
from hccr_jax.data import labelled_images
from hccr_jax.data.casia import archives, charset
from hccr_jax.data.casia.gnt import pack_record
from hccr_jax.data.prepare import prepare
from hccr_jax.errors import InputError

# Code points of characters that look the same, and the one that is meant.
SAME = {"\u2f00": "一", "\uf967": "不", "\u2ed3": "长", "\u2e9f": "母", "か\u3099": "が"}


@pytest.mark.parametrize("other", SAME)
def test_one_character_of_two_code_points_is_one_class(other: str, tmp_path: Path) -> None:
    usual = SAME[other]
    for number, name in enumerate((usual, other)):
        save(tmp_path / "mine" / name / "a.png", picture(number))
    (tmp_path / "mine" / "list.csv").write_text(
        f"path,character\n{usual}/a.png,{usual}\n{other}/a.png,{other}\n"
    )
    for source in (tmp_path / "mine", tmp_path / "mine" / "list.csv"):
        members = labelled_images.list_pictures(source, [], lambda reason, size: None)
        assert [member.character for member in members] == [usual, usual]
    (tmp_path / "charset.txt").write_text(f"永{other}")
    assert labelled_images.read_charset(str(tmp_path / "charset.txt")) == ("永", usual)
    (tmp_path / "charset.txt").write_text(f"{usual}永{other}")
    with pytest.raises(InputError, match=f"more than once: {usual}$"):
        labelled_images.read_charset(str(tmp_path / "charset.txt"))


def test_radicals_and_only_they_become_ideographs() -> None:
    radicals = [*map(chr, [*range(0x2E81, 0x2E9A), *range(0x2E9B, 0x2EF4), *range(0x2F00, 0x2FD6)])]
    assert len(radicals) == 114 + 214  # of Unicode's EquivalentUnifiedIdeograph.txt, and KangXi's
    for radical in radicals:
        name = unicodedata.name(charset.canonical(radical))
        assert name.startswith("CJK UNIFIED IDEOGRAPH-"), radical
    # The same as Unicode's own decomposition, where there is one.
    for radical in ("\u2e9f", "\u2ef3"):
        assert charset.canonical(radical) == unicodedata.normalize("NFKC", radical)
    # By the radicals' names in Unicode: simplified long, gate, page, horse, fish; water one.
    expected = dict(zip("\u2ed3\u2ed4\u2eda\u2ee2\u2ee5\u2ea1", "长门页马鱼氵", strict=True))
    assert {radical: charset.canonical(radical) for radical in expected} == expected
    assert charset.canonical("\u2e9a") == "\u2e9a"  # unassigned
    kept = "".join(charset.chinese()) + "ＡA①½㐀〇々"
    assert charset.canonical(kept) == kept


def swapped(writer: int, characters: str) -> bytes:
    """Returns a GNT file whose tags have the low byte first."""
    return b"".join(
        pack_record(charset.character_to_tag(character)[::-1], bitmap(writer, number))
        for number, character in enumerate(characters)
    )


def test_swapped_tags_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    characters = "".join(sorted(charset.level1())[:100])  # those of the real subset
    folder = tmp_path / "casia"
    folder.mkdir()
    for writer in (1001, 1002, 1241):
        (folder / f"{writer}-c.gnt").write_bytes(swapped(writer, characters))
    flags = [f"--archives={folder}", f"--data_dir={tmp_path / 'data'}"]
    assert main(["prepare", *flags]) == 0
    error = capsys.readouterr().err
    assert "are the tags right? 171 of 300 are of no level-1 character" in error  # 57 of each 100
    assert "129 are of the charset, but 300 if their two bytes were swapped" in error


def test_swapped_tags_of_no_character_are_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "casia"
    folder.mkdir()
    for writer in (1001, 1002, 1241):
        (folder / f"{writer}-c.gnt").write_bytes(swapped(writer, "一丁七"))
    with pytest.raises(InputError, match="are the two bytes of each tag swapped"):
        prepare([folder], tmp_path / "data", characters="一丁七")


def test_an_empty_gnt_file_is_a_fault(tmp_path: Path) -> None:
    faults: list[tuple[str, int]] = []
    (tmp_path / "1001-c.gnt").touch()
    packed = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", "1002-c.gnt", data=b"")
    for path in (tmp_path / "1001-c.gnt", packed):
        (found,) = archives.list_members([path])
        with pytest.raises(InputError, match=f"{re.escape(found.source)}: empty; --on_error=skip"):
            list(archives.read_member(found))
        faults.clear()
        assert list(archives.read_member(found, lambda *fault: faults.append(fault))) == []
        assert faults == [("empty file", 0)]
