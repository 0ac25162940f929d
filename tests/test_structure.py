"""The folder is the rule: what each may import of the package."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hccr_jax"
# From the bottom up: a folder imports itself and what stands before it. Folders on one line do not
# see one another. Modules at the top of the package stand here by their names.
LEVELS = (
    ("errors", "ops", "metrics"),
    ("paths",),
    ("runtime", "models", "data.casia"),
    ("config", "data.images", "data.synthetic"),
    ("data",),
    ("inference", "report"),
    ("evaluation", "export"),
    ("train",),
    ("bench", "demo"),
    ("cli",),
    ("main", "__main__"),
)
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}
NO_JAX = ("data", "data.casia", "data.images", "data.synthetic", "metrics")


def modules() -> dict[str, Path]:
    """Returns every module's file by its name below hccr_jax."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def folder_of(module: str) -> str:
    return module.rpartition(".")[0] or module


def imports(path: Path) -> set[str]:
    """Returns the modules of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hccr_jax"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("hccr_jax.") for name in names} & set(modules())


def test_every_folder_has_a_level():
    assert {folder_of(module) for module in modules()} == set(LEVEL)


def test_no_import_goes_up():
    wrong = [
        f"{module} imports {other}"
        for module, path in modules().items()
        for other in imports(path)
        if folder_of(other) != folder_of(module)
        and LEVEL[folder_of(other)] >= LEVEL[folder_of(module)]
    ]
    assert wrong == []


def test_no_circle():
    left = {module: imports(path) - {module} for module, path in modules().items()}
    while free := {module for module, others in left.items() if not others & set(left)}:
        left = {module: others for module, others in left.items() if module not in free}
    assert left == {}


def test_worker_processes_never_load_jax():
    for module, path in modules().items():
        if folder_of(module) in NO_JAX:
            assert not re.search(r"^\s*(import|from) (jax|flax)\b", path.read_text("utf-8"), re.M)
