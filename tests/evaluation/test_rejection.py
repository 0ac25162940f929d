"""What should be rejected: the score, the drawn negatives, and what a run makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from hccr_jax.cli import command
from hccr_jax.data.casia.charset import level1
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer
from hccr_jax.evaluation import negatives
from hccr_jax.evaluation.distortions import Source
from hccr_jax.evaluation.rejection import evaluate_rejection
from hccr_jax.inference.pretrained import load_pretrained
from hccr_jax.inference.recognizer import Recognizer
from hccr_jax.inference.rejector import RIDGE, Rejector, to_traits
from hccr_jax.inference.steps import Variables, make_logits_step
from hccr_jax.inference.tta import create_tta_views
from hccr_jax.models.functional import expose_features, split_model
from hccr_jax.models.registry import create_model
from hccr_jax.runtime import sharding


def two_clouds(num: int, other: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mix = rng.normal(size=(5, 5))
    return rng.normal(size=(num, 5)) @ mix, (rng.normal(size=(other, 5)) + 0.7) @ mix


def ridge(sound: np.ndarray, others: np.ndarray, left_out: int | None = None) -> np.ndarray:
    """The same regression by least squares on rows that stand for the penalty, weights kept."""
    rows = np.concatenate([sound, others])
    rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-6)
    design = np.column_stack([rows, np.ones(len(rows))])
    target = np.array([1.0] * len(sound) + [-1.0] * len(others))
    root = np.sqrt([0.5 / len(sound)] * len(sound) + [0.5 / len(others)] * len(others))
    if left_out is not None:
        root[left_out] = 0.0
    penalty = np.sqrt(RIDGE) * np.eye(rows.shape[1], design.shape[1])
    stacked = np.concatenate([design * root[:, None], penalty])
    wanted = np.append(target * root, np.zeros(len(penalty)))
    return design @ np.linalg.lstsq(stacked, wanted)[0]


def test_the_score_is_a_ridge_regression_and_its_quantiles_those_of_rows_left_out() -> None:
    sound, others = two_clouds(40, 60, np.random.default_rng(0))
    rejector = Rejector.fit(sound, others)
    scores = rejector.scores(np.concatenate([sound, others]))
    np.testing.assert_allclose(scores, ridge(sound, others), rtol=1e-9)
    left_out = [ridge(sound, others, row)[row] for row in range(len(sound))]
    levels = (np.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(rejector.sound, np.quantile(left_out, levels), rtol=1e-6)


def test_a_share_of_alpha_of_sound_rows_has_a_p_value_of_alpha() -> None:
    rng = np.random.default_rng(1)
    sound, others = two_clouds(2400, 2000, rng)
    rejector = Rejector.fit(sound[:400], others)
    p_values = rejector.p_values(rejector.scores(sound[400:]))
    for alpha in (0.05, 0.2, 0.5):
        assert (p_values <= alpha).mean() == pytest.approx(alpha, abs=0.05)
    assert p_values.min() > 0
    assert p_values.max() <= 1
    assert (rejector.p_values(np.array([-1e9, 1e9])) == [1 / 1001, 1.0]).all()


def test_a_rejector_survives_json() -> None:
    rejector = Rejector.fit(*two_clouds(30, 30, np.random.default_rng(2)))
    again = Rejector.from_json(json.loads(json.dumps(rejector.to_json())))
    rows = np.random.default_rng(3).normal(size=(9, 5))
    assert (again.scores(rows) == rejector.scores(rows)).all()
    with pytest.raises(ValueError, match="lists"):
        Rejector.from_json(rejector.to_json() | {"sound": []})


@pytest.mark.parametrize("name", ["mobilenet_v1", "lenet5"])
@pytest.mark.parametrize("num_tta_views", [0, 3])
def test_features_are_what_the_last_layer_sees(name: str, num_tta_views: int) -> None:
    options = {"width": 0.1} if name == "mobilenet_v1" else {}
    model = create_model(name, num_classes=7, image_px=32, rngs=nnx.Rngs(0), **options)
    apply, params, batch_stats = split_model(model)
    mesh = sharding.create_mesh()
    views = create_tta_views(num_tta_views, False, 0.25) if num_tta_views else None
    images = np.random.default_rng(6).integers(0, 256, (mesh.size, 32, 32)).astype(np.uint8)
    plain = make_logits_step(apply, mesh, views)
    (expected,) = plain(Variables(params, batch_stats), images)
    both = make_logits_step(apply, mesh, views, with_features=True)
    logits, features = both(Variables(expose_features(params), batch_stats), images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    if views is None:
        layer = jax.device_get(params["classifier"])
        np.testing.assert_allclose(
            np.asarray(features) @ layer["weight"] + layer["bias"], expected, rtol=1e-4, atol=1e-5
        )


def test_traits_hold_the_evidence() -> None:
    logits, features = np.log([[1.0, 2.0, 5.0]]), np.array([[3.0]])
    np.testing.assert_allclose(to_traits(logits, features), [[3.0, np.log(8.0), np.log(5.0)]])


@pytest.mark.parametrize("kind", list(negatives.CROSSINGS))
def test_crossing_out_adds_lines_and_takes_nothing_away(kind: str) -> None:
    bitmap = draw("国", create_writer(3), np.random.default_rng(3))
    for seed in range(20):
        spoilt = negatives.cross_out(bitmap, kind, np.random.default_rng(seed))
        room = np.subtract(spoilt.shape, bitmap.shape) // 2
        window = tuple(slice(r, r + n) for r, n in zip(room, bitmap.shape, strict=True))
        assert (spoilt[window] <= bitmap).all()
        darkness = 255.0 - np.median(bitmap[bitmap < 250])
        added = (255.0 - spoilt).sum() - (255.0 - bitmap).sum()
        # A line is about as long as the box, and no more than what would fill it twice.
        assert 0.5 * darkness * max(bitmap.shape) < added < 2 * darkness * bitmap.size
        again = negatives.cross_out(bitmap, kind, np.random.default_rng(seed))
        assert (again == spoilt).all()


@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_line_is_about_as_wide_as_the_strokes(width: int) -> None:
    """A cross of bars of a known width, struck through far from them."""
    bitmap = np.full((100, 100), 255, np.uint8)
    bitmap[:, 50 - width // 2 : 50 + width // 2] = 60
    bitmap[50 - width // 2 : 50 + width // 2, :] = 60
    covered = np.clip((255.0 - bitmap) / 195, 0, 1)
    assert negatives._stroke_width(bitmap, 195.0) == pytest.approx(width, rel=0.35)
    assert covered.sum() == pytest.approx(2 * 100 * width - width**2)


def test_a_blank_bitmap_cannot_be_crossed_out() -> None:
    blank = np.full((9, 9), 255, np.uint8)
    assert negatives.cross_out(blank, "line", np.random.default_rng(0)) is blank


def test_negatives_are_the_same_for_the_same_seed() -> None:
    symbols = list(negatives.SYMBOLS)
    one, other = (negatives.unknown(12, [1, 2], symbols, "丁七") for _ in range(2))
    assert all((a == b).all() for a, b in zip(one[0], other[0], strict=True))
    assert one[1].tolist() == ["symbol", "other_class"] * 6
    assert set(negatives.unknown(6, [1], symbols)[1]) == {"symbol"}
    assert not set(symbols) & set(level1())
    scrawls, kinds = negatives.scrawls(9, [3])
    assert kinds.tolist() == ["strokes", "dots", "empty"] * 3
    is_empty = [bitmap.min() == 255 for bitmap in scrawls]
    assert is_empty == [kind == "empty" for kind in kinds]


@pytest.mark.parametrize("symbol", list(negatives.SYMBOLS))
def test_a_symbol_is_drawn(symbol: str) -> None:
    bitmap = negatives.draw_symbol(symbol, np.random.default_rng(0))
    assert 60 < max(bitmap.shape) < 100
    assert (bitmap < 128).mean() > 0.02


def test_a_run_reports_the_scores_of_its_rejector(finished: Path) -> None:
    results = json.loads((finished / "eval.json").read_text())["rejection"]
    assert results["images"]["fit"] > 0
    assert 0 <= results["sound_rejected"] <= 1
    for name in ("crossed_out", "unknown", "scrawl"):
        found = results[name]
        assert 0 <= found["rejected"] <= 1
        assert 0 <= found["auroc_of_probability"] <= 1
        low, high = min(found["kinds"].values()), max(found["kinds"].values())
        assert low - 1e-9 <= found["auroc"] <= high + 1e-9
    assert results["crossed_out"]["new_kinds"].keys() == negatives.CROSSINGS.keys()
    assert "Rejection" in (finished / "report.html").read_text()
    assert (finished / "plots" / "rejection.png").is_file()


def test_a_handful_of_images_is_enough(finished: Path, tmp_path: Path) -> None:
    """Three images are crossed out in three of the five manners."""
    config = load_pretrained(finished).config
    (name,) = (path.name for path in Path(config.data.data_dir).glob("synthetic_8c*"))
    source = Source(name, config.data.data_dir, "train+validation", 32, 2, "keep")

    def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return images.reshape(len(images), -1)[:, ::8] / 255.0, images.mean(axis=(1, 2))

    results, _ = evaluate_rejection(
        read, source, source, "丁七", np.ones(3, bool), num_images=3, workdir=tmp_path
    )
    assert results["images"] == {"fit": 3, "test": 3}
    crossed_out = results["crossed_out"]
    assert len(crossed_out["kinds"]) == 3
    assert crossed_out["new_kinds"].keys() == crossed_out["kinds"].keys()
    assert (tmp_path / "plots" / "rejection.png").is_file()


def test_a_picture_is_judged_by_the_rejector_of_the_run(finished: Path) -> None:
    recognizer = Recognizer.load(finished)
    rejector = Rejector.from_json(json.loads((finished / "rejector.json").read_text()))
    bitmap = draw("七", create_writer(5), np.random.default_rng(5))
    form = recognizer.to_normal_form(bitmap)
    (recognition,) = recognizer.judge(form[None])
    assert recognition.candidates == recognizer.classify(form[None])[0]
    outputs = recognizer._outputs(form[None])
    expected = rejector.p_values(rejector.scores(to_traits(*outputs)))
    assert recognition.p_value == expected[0]


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Callable[[dict], Path]:
    def copy(change: dict) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(finished, folder)
        path = folder / "rejector.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        return folder

    return copy


@pytest.mark.parametrize("change", [{"step": 7}, {"views": 5}, {"weights": "none"}, {"sound": []}])
def test_the_rejector_of_other_weights_is_not_used(
    copied: Callable[[dict], Path], change: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(change)
    assert not Recognizer.load(folder).can_reject
    flags = [f"--checkpoint={folder}", "--reject_at=0.1", str(folder / "plots")]
    assert command.main(["predict", *flags]) == 2
    assert "holds no rejector" in capsys.readouterr().err
