"""The synthetic data set: stored medians, drawn bitmaps, and reproducible archives."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from hccr_jax.data.casia import charset, gnt
from hccr_jax.data.synthetic import archives, medians, writer
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.errors import InputError

CHARACTERS = "一丁七万上下永乾"


def test_medians_have_the_published_counts() -> None:
    points, stroke_offsets, character_offsets = medians.load_medians()
    assert points.shape == (212_886, 2)
    assert len(stroke_offsets) - 1 == 36_670
    assert len(character_offsets) - 1 == 3_755
    assert np.diff(stroke_offsets).min() >= 2
    assert np.diff(character_offsets).min() >= 1


@pytest.mark.parametrize(("character", "count"), [("一", 1), ("人", 2), ("永", 5), ("鼻", 14)])
def test_stroke_count_is_that_of_the_dictionary(character: str, count: int) -> None:
    assert len(medians.class_strokes(charset.class_index()[character])) == count


def reference_ink(character: str) -> np.ndarray:
    glyph = archives.reference_glyph(character, 64)
    assert glyph is not None
    return 255.0 - glyph


def test_reference_glyphs_stand_upright() -> None:
    # The long bar of 上 is at the bottom and that of 下 at the top.
    assert reference_ink("上").sum(axis=1).argmax() > 40
    assert reference_ink("下").sum(axis=1).argmax() < 24
    bar = reference_ink("一") > 127
    assert bar.any(axis=0).sum() > 6 * bar.sum(axis=0).max()


def test_reference_glyph_is_not_mirrored() -> None:
    # The single dot of 卜 is to the right of its vertical stroke.
    ink = reference_ink("卜").sum(axis=0)
    assert ink[ink.argmax() + 4 :].sum() > 4 * ink[: ink.argmax() - 4].sum()


def test_reference_glyph_covers_level_1_only() -> None:
    assert all(reference_ink(character).max() > 127 for character in charset.level1()[::97])
    assert archives.reference_glyph("A", 16) is None
    assert archives.reference_glyph("龘", 16) is None


def test_same_state_gives_the_same_bitmap_and_the_next_instance_differs() -> None:
    hand = writer.create_writer(3)
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    first = draw("永", hand, rng)
    np.testing.assert_array_equal(first, draw("永", hand, again))
    second = draw("永", hand, rng)
    assert first.shape != second.shape or (first != second).any()


def test_bitmaps_are_tight_and_within_the_limits_of_casia() -> None:
    rng = np.random.default_rng(0)
    characters = [*charset.level1()[::29], *"一二三丁卜", *"一二三丁卜"]
    for seed, character in enumerate(characters):
        bitmap = draw(character, writer.create_writer(seed % 40), rng)
        height, width = bitmap.shape
        assert bitmap.dtype == np.uint8
        assert 18 <= width <= 119, character
        assert 6 <= height <= 152, character
        for border in (bitmap[0], bitmap[-1], bitmap[:, 0], bitmap[:, -1]):
            assert border.min() < 250, character
        assert bitmap.min() < 200, character


def test_level_1_characters_can_be_drawn() -> None:
    hand, rng = writer.create_writer(0), np.random.default_rng(0)
    assert all(draw(c, hand, rng).size for c in charset.level1()[::9])


def test_draw_refuses_other_characters() -> None:
    with pytest.raises(InputError, match="'A'"):
        draw("A", writer.create_writer(0), np.random.default_rng(0))


def test_archives_parse_back_and_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    one = archives.write_gnt_archives(
        tmp_path / "one", CHARACTERS, 3, 2, seed=7, processes=1, progress=False
    )
    two = archives.write_gnt_archives(
        tmp_path / "two", CHARACTERS, 3, 2, seed=7, processes=2, progress=False
    )
    assert [path.name for path in one] == ["synthetic_trn_gnt.zip", "synthetic_tst_gnt.zip"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [p.name for p in one]

    contents: dict[str, bytes] = {}
    for path, writers in zip(one, ([1001, 1002, 1003], [1004, 1005]), strict=True):
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == [f"{writer}-c.gnt" for writer in writers]
            contents |= {name: archive.read(name) for name in archive.namelist()}
    assert len(set(contents.values())) == 5
    for name, content in contents.items():
        records = list(gnt.read_records(content, name))
        assert [r.tag for r in records] == [c.encode("gb2312") for c in CHARACTERS]


@pytest.mark.parametrize(
    ("characters", "train", "test", "named"),
    [
        ("一", 0, 1, "num_train_writers"),
        ("一", 1, 0, "num_test_writers"),
        ("", 1, 1, "number of characters"),
        ("一A", 1, 1, "'A'"),
    ],
)
def test_impossible_requests_are_refused(
    tmp_path: Path, characters: str, train: int, test: int, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        archives.write_gnt_archives(tmp_path, characters, train, test, progress=False)
    assert not list(tmp_path.iterdir())
