"""Rules of the whole suite: warnings are errors, JAX is strict, four CPU devices stand for many."""

import os
from pathlib import Path

import jax
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


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
