"""Rules of the whole suite: warnings are errors, JAX is strict, on four CPU devices."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # main sets it too, but after JAX has read it
import jax

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

LONGER = ("compiles", "slow", "faults", "figures")
# Files of tests that compile too much for `-m unit`, below this folder.
COMPILING = (
    "bench/test_benchmark.py", "bench/test_scaling.py", "export/test_export.py",
    "models/test_models.py", "models/test_mqdf.py", "ops/test_dispatch.py", "ops/test_ops.py",
    "ops/test_pallas.py", "ops/test_blocks.py", "train/test_augment.py", "train/test_step.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error")
    # Compiling is most of the suite's time: processes and the next run of the suite share programs.
    # They lie in .pytest_cache, and `--cache-clear` deletes them.
    if cache := getattr(config, "cache", None):
        compiled = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("compiled")))
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `unit` what needs no whole run, no real data and little to compile."""
    compiling = {Path(__file__).parent / name for name in COMPILING}
    for item in items:
        if item.path in compiling:
            item.add_marker("compiles")
        fixtures = {"tiny_job", "casia_dir"} & set(getattr(item, "fixturenames", ()))
        if not fixtures and not any(map(item.get_closest_marker, LONGER)):
            item.add_marker("unit")


@pytest.fixture(scope="session")
def casia_dir() -> Path:
    """Returns the folder of the real subset HWDB1.1-100, or skips the test where it is absent."""
    named = os.environ.get("HCCR_CASIA_DIR")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "HWDB1.1-100tst_gnt.zip").is_file():
        if named:
            pytest.fail(f"HCCR_CASIA_DIR={named}: no HWDB1.1-100tst_gnt.zip in this folder")
        pytest.skip("the real CASIA subset is absent; HCCR_CASIA_DIR names its folder")
    return folder


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the flags of a training of seconds, without --workdir; the first prepares its data.

    Everything random is on.
    """
    root = tmp_path_factory.mktemp("tiny_job")
    config = {
        "num_steps": 8,
        "batch_size": 8,
        "log_every_steps": 1,
        "model.name": "mobilenet_v1",
        "model.width": 0.1,
        "model.dropout_rate": 0.2,
        "data.name": "synthetic",
        "data.data_dir": root / "data",
        "data.image_px": 32,
        "data.margin_px": 2,
        "data.synthetic.num_characters": 8,
        "data.synthetic.num_train_writers": 12,
        "data.synthetic.num_test_writers": 3,
        "augment.flip_left_right_prob": 0.5,
        "augment.rotate_deg": 20.0,
        "augment.zoom": 0.1,
        "augment.shift_px": 1.0,
        "augment.erase_prob": 0.5,
        "augment.noise_std": 0.05,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-4,  # so that rounding stays small in so unsteady a network
        "optimizer.weight_decay": 0.05,
        "optimizer.clip_norm": 1.0,
        "optimizer.decay_epochs": 0.2,
        "eval.every_steps": 4,
        "eval.batch_size": 20,
        "eval.batch_norm_batches": 2,
    }
    path = Path(__file__).parents[1] / "configs" / "default.py"
    return [f"--config={path}", *(f"--config.{key}={value}" for key, value in config.items())]


@pytest.fixture(scope="session")
def train(tiny_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that runs the tiny training to some step in this process."""
    from hccr_jax import main
    from hccr_jax.train.loop import train_and_evaluate

    def run(num_steps: int, *flags: str, workdir: Path | None = None) -> Path:
        workdir = workdir or tmp_path_factory.mktemp("run")
        flags = (f"--config.num_steps={num_steps}", *flags)
        train_and_evaluate(main.parse(["main", *tiny_job, *flags]).config, workdir)
        return workdir

    return run


@pytest.fixture(scope="session")
def finished(train: Callable[..., Path]) -> Path:
    """Returns the workdir of an unbroken run of 8 steps."""
    return train(8)
