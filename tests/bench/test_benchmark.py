"""The benchmark's command line: columns of every row, wrong requests, and a fair baseline."""

import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hccr_jax.bench import rows as bench_rows
from hccr_jax.bench import tables
from hccr_jax.bench.suites import BASELINE_ROWS
from hccr_jax.bench.timing import Workload, measure, repeated
from hccr_jax.bench.workloads import ROWS
from hccr_jax.cli import command
from hccr_jax.configs import default
from hccr_jax.models.functional import count_parameters, split_model
from hccr_jax.models.registry import create_model
from hccr_jax.ops import dispatch
from hccr_jax.train.augment import AugmentOptions

ROOT = Path(__file__).parents[2]
V1 = f"--config={ROOT / 'configs' / 'v1.py'}"
TINY = [
    V1, "--config.model.width=0.1", "--config.data.image_px=16", "--config.data.margin_px=1",
    "--config.eval.batch_size=8", "--batch_size=8", "--num_classes=4", "--num_images=64",
    "--seconds=0.01", "--repeats=2",
]  # fmt: skip
BASELINE = ["--baseline=torch", "--modes=eager,graph"] if importlib.util.find_spec("torch") else []
COLUMNS = {
    "row", "images_per_second", "min", "max", "repeats", "ms_per_step", "compile_seconds",
    "peak_memory_mib", "roofline_images_per_second", "roofline_fraction", "baseline", "ratio",
    "about",
}  # fmt: skip
ABOUT = {
    "model", "parameters", "batch_size", "image_px", "width", "num_classes", "dtype", "device",
    "cores", "copy_gigabytes_per_second", "product_teraflops", "commit", "versions",
}  # fmt: skip


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Restores the settings that a command changes for its process."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    variables = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(variables)
    for name, value in before.items():
        jax.config.update(name, value)


def rows_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, dict]:
    """Runs the command and returns its rows by name, each checked for its columns."""
    assert command.main(["benchmark", *TINY, *flags]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        assert set(row["about"]) == ABOUT
        if "error" not in row:
            assert set(row) - {"roofline_levels", "of_step"} == COLUMNS
            assert 0 < row["min"] <= row["images_per_second"] <= row["max"]
            assert row["repeats"] == 2
    return {row["row"]: row for row in rows}


def test_rows_of_the_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    names = ["train_step_augmented", "forward", "augment"]
    rows = rows_of(capsys, f"--rows={','.join(names)}", f"--output={output}", *BASELINE)
    assert [name for name in rows if "/" not in name] == names
    step = rows["train_step_augmented"]
    assert step["ms_per_step"] == pytest.approx(8e3 / step["images_per_second"], rel=1e-2)
    assert step["roofline_images_per_second"] == step["roofline_levels"]["fused"]
    assert step["compile_seconds"] > 0
    assert step["peak_memory_mib"] > 4 * 4 * step["about"]["parameters"] / 2**20  # Adam's, gradient
    assert step["about"]["batch_size"] == 8
    assert step["about"]["dtype"] == "float32"
    for name in names if BASELINE else ():
        check_baseline(rows[name], rows[f"{name}/torch_eager"], rows[f"{name}/torch_graph"])
    assert json.loads(output.read_text("utf-8"))["rows"] == list(rows.values())
    assert command.main(["benchmark", f"--render={output}"]) == 0
    table = capsys.readouterr().out
    assert "**mobilenet_v1**" in table
    for name in names:
        assert f"| {name} | {rows[name]['images_per_second']:,.0f} (" in table


def check_baseline(ours: dict, eager: dict, graph: dict) -> None:
    assert ours["baseline"] == "eager"
    # The median of pairs lies between their extremes.
    low, high = ours["min"] / eager["max"], ours["max"] / eager["min"]
    assert 0.99 * low <= ours["ratio"] <= 1.01 * high
    assert eager["roofline_images_per_second"] == ours["roofline_images_per_second"]
    assert graph["error"] == "skipped: CUDA graphs need a GPU"
    assert "torch" in ours["about"]["versions"]


def test_rows_that_read_data(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "--rows=evaluation,data_reading")
    assert list(rows) == ["evaluation", "data_reading"]


@pytest.mark.slow
def test_measured_kernels_are_what_the_library_chooses_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"--output={tmp_path / 'kernels.json'}"
    assert command.main(["benchmark", *TINY, "--suite=kernels", output]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    monkeypatch.setattr(dispatch, "MEASURED", tmp_path)
    dispatch._rankings.cache_clear()
    height, width, channels, stride = layer = rows[0]["about"]["layer"]
    x = jnp.zeros((8, height, width, channels))
    speeds = {
        row["row"].removeprefix("depthwise/"): row["images_per_second"]
        for row in rows
        if row["about"]["layer"] == layer
    }
    assert set(speeds) == set(dispatch.available(x))
    assert dispatch.choose(x, stride) == max(speeds, key=lambda name: speeds[name])
    dispatch._rankings.cache_clear()


@pytest.mark.slow
def test_all_rows_and_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    rows = rows_of(capsys, "--suite=cpu", "--modes=eager,graph")
    ours = [name for name in rows if "/" not in name]
    assert ours == list(ROWS)
    assert rows["prepare"]["ms_per_step"] is None
    for name in ours:
        assert (rows[name]["baseline"] == "eager") == (name in BASELINE_ROWS)
        assert (rows[name]["ratio"] is not None) == (name in BASELINE_ROWS)


def test_a_batch_that_does_not_fit_gets_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "--rows=augment", "--batch_size=400000000")
    assert rows["augment"]["error"] == "out of memory"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing: for example --config=configs/quickstart.py"),
        ([V1, "--rows=speed"], "--rows=speed: choose from train_loop, evaluation, "),
        ([V1, "--suite=scaling", "--rows=prepare"], "--rows=prepare: choose from train_step, "),
        ([V1, "--batch_size=many"], "--batch_size=many: must be a multiple of 4, the number of "),
        (
            [V1, "--batch_size=8,6"],
            "--batch_size=6: must be a multiple of 4, the number of devices",
        ),
        (
            [V1, "--output=nowhere/rows.json"],
            "--output=nowhere/rows.json: there is no folder nowhe",
        ),
        ([V1, "--suite=tpu"], "--suite=tpu: value should be one of <gpu|cpu|scaling|kernels|comp"),
        ([V1, "--config.batch_size=0"], "config.batch_size=0: must be a whole number from 1"),
        (["--render=nowhere.json"], "nowhere.json: No such file or directory"),
        (
            [f"--render={ROOT / 'pyproject.toml'}"],
            "pyproject.toml: not a file that hccr benchmark --output wrote",
        ),
        (
            [*TINY, "--num_classes=4000", "--rows=prepare"],
            "--num_classes=4000: the rows that read data have at most 3755",
        ),
    ],
)
def test_wrong_request_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert command.main(["benchmark", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_flags_of_version_0_1_work_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["benchmark", "--peer=torch", "--suite=forms"]) == 2
    peer, forms, _ = capsys.readouterr().err.splitlines()
    assert peer.startswith("warning: --peer is now --baseline")
    assert forms.startswith("warning: --suite=forms is now --suite=kernels")


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["benchmark", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "hccr benchmark --config=configs/v2.py --suite=gpu --output=" in printed
    for flag in ("--batch_size", "--rows", "--baseline", "--suite", "--output", "--render"):
        assert f"\n  {flag}" in printed


def test_runs_are_timed_in_turn() -> None:
    order: list[str] = []
    runs = {name: repeated(lambda name=name: order.append(name)) for name in "ab"}
    rates = measure(runs, 0.0, 3)
    assert "".join(order) == "ab" + "ababab"
    assert all(len(figures) == 3 and min(figures) > 0 for figures in rates.values())


def test_a_failing_baseline_leaves_the_others() -> None:
    def broken() -> Workload:
        raise RuntimeError("no compiler\nand a long trace")

    makers = {
        "step": lambda: Workload(repeated(lambda: None), 10, roofline=1e12),
        "step/torch_eager": lambda: Workload(repeated(lambda: sum(range(10_000))), 10),
        "step/torch_compile": broken,
    }
    options = {"batch_size": 10, "seconds": 0.001, "repeats": 3}
    rows = bench_rows.time_in_turn(makers, **options, deadline=math.inf)
    assert [row["row"] for row in rows] == list(makers)
    assert rows[0]["baseline"] == "eager"
    assert rows[0]["ratio"] > 1
    assert rows[2] == {"row": "step/torch_compile", "error": "no compiler"}
    with pytest.raises(RuntimeError, match="no compiler"):
        bench_rows.time_in_turn({"step": broken}, **options, deadline=math.inf)
    late = bench_rows.time_in_turn(makers, **options, deadline=0.0)
    assert [row["error"] for row in late] == ["skipped: out of time"] * 3


def test_scaling_is_drawn(tmp_path: Path) -> None:
    about = {
        "model": "mobilenet_v2", "parameters": 1, "batch_size": 16, "image_px": 64, "width": 1.0,
        "num_classes": 100, "dtype": "float32", "device": "1 × cpu", "cores": 2, "commit": "abc",
        "versions": {"jax": "1"},
    }  # fmt: skip
    numbers = {"images_per_second": 200.0, "min": 100.0, "max": 300.0}
    rows = [
        {"row": "train_step", "varied": "batch_size", "about": about | {"batch_size": size}}
        | numbers
        | {"roofline_images_per_second": 500.0}
        for size in (16, 1024)
    ]
    rows.append({**rows[0], "varied": "width", "error": "out of memory"})
    picture = tables.plot_scaling(rows, tmp_path)
    assert picture is not None
    assert picture.read_bytes()[1:4] == b"PNG"
    table = tables.to_markdown(rows)
    assert "| 1,024 | 200 (100–300) | 500 |" in table
    assert "| 1.0 | out of memory |" in table


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
@pytest.mark.parametrize("width", [0.1, 1.0, 1.4])
def test_the_baselines_network_has_as_many_parameters(name: str, width: float) -> None:
    torch_baseline = pytest.importorskip("hccr_jax.bench.torch_baseline", exc_type=ImportError)
    theirs = torch_baseline.create_network(name, 100, width, 0.0)
    model = create_model(name, num_classes=100, width=width, rngs=nnx.Rngs(0))
    ours = count_parameters(split_model(model)[1])
    assert sum(parameter.numel() for parameter in theirs.parameters()) == ours


def augmented_by_baseline(images: np.ndarray, **changes: float) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from hccr_jax.bench.torch_baseline import make_augment as make_baselines

    options = dict(default.get_config().augment) | changes
    del options["once"]
    torch.manual_seed(0)
    augment = make_baselines(AugmentOptions(**options))
    return augment(torch.from_numpy(images))[:, 0].numpy()


def random_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 12, 12), np.uint8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda x: x),
        ({"flip_left_right_prob": 1.0}, lambda x: x[:, :, ::-1]),
        ({"flip_up_down_prob": 1.0}, lambda x: x[:, ::-1]),
        ({"resize_min": 2.0, "resize_max": 2.0}, lambda x: x),  # both axes alike: no change
    ],
)
def test_the_baselines_augmentation_moves_pixels_like_ours(changes, expected) -> None:
    images = random_images()
    result = augmented_by_baseline(images, **changes)
    np.testing.assert_allclose(result, expected(images / np.float32(255)), atol=2e-5)


def test_the_baselines_augmentation_keeps_its_ranges() -> None:
    dot = np.zeros((500, 33, 33), np.uint8)
    dot[:, 16, 26] = 255  # ten pixels right of the centre
    turned = augmented_by_baseline(dot, rotate_deg=30.0)
    place = np.arange(33) - 16.0
    x, y = (turned.sum(axis) @ place / turned.sum((1, 2)) for axis in (1, 2))
    angles = np.rad2deg(np.arctan2(y, x))
    assert 27 < angles.max() < 31
    assert -31 < angles.min() < -27
    np.testing.assert_allclose(np.hypot(x, y), 10.0, atol=0.3)
    shifted = augmented_by_baseline(dot, shift_px=3.0)
    x = shifted.sum(1) @ place / shifted.sum((1, 2))
    assert 12.8 < x.max() < 13.05
    assert 6.95 < x.min() < 7.2
    ink = np.full((500, 40, 40), 255, np.uint8)
    erased = (augmented_by_baseline(ink, erase_prob=0.5, erase_max_side=0.5) == 0).sum((1, 2))
    assert 200 < np.count_nonzero(erased) < 300
    assert erased.max() <= 20 * 20
