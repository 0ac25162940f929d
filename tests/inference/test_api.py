"""What `import hccr_jax` offers, and what it costs."""

import subprocess
import sys

import pytest

import hccr_jax
from hccr_jax.inference.recognizer import Recognizer
from hccr_jax.models.registry import create_model


def test_names_load_on_first_use() -> None:
    assert hccr_jax.Recognizer is Recognizer
    assert hccr_jax.create_model is create_model
    assert {"Recognizer", "create_model", "__version__"} <= set(dir(hccr_jax))
    with pytest.raises(AttributeError, match="has no attribute 'recognise'"):
        _ = hccr_jax.recognise


def test_the_import_itself_loads_neither_jax_nor_numpy() -> None:
    code = (
        "import sys, hccr_jax; print({'jax', 'flax', 'numpy', 'scipy', 'PIL'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "set()\n"
