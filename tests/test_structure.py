"""BUILD.md's picture of the floors is true: each module is on it and imports downward only."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hccr_jax"


def imported_modules(path: Path) -> set[str]:
    """Returns what a file imports of the package, anywhere in it, as paths below hccr_jax."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hccr_jax"):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {name.removeprefix("hccr_jax.").replace(".", "/") + ".py" for name in names}
    return {file for file in files if (PACKAGE / file).is_file()}


def floors() -> dict[str, int]:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "BUILD.md").read_text("utf-8"), re.M)
    return {name: int(floor) for floor, cell in rows for name in re.findall("`([^`]+)`", cell)}


def test_every_module_stands_on_a_floor():
    modules = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "stroke_medians"
    }
    assert modules == set(floors())


def test_imports_go_down():
    floor = floors()
    upward = [
        f"{module} ({floor[module]}) imports {other} ({floor[other]})"
        for module in floor
        for other in imported_modules(PACKAGE / module)
        if floor[other] >= floor[module]
    ]
    assert upward == []


def test_workers_of_the_data_modules_never_load_jax():
    for path in (PACKAGE / "data").glob("*.py"):
        if path.name != "input_pipeline.py":
            assert not re.search(
                r"^\s*(import|from) (jax|flax)\b", path.read_text("utf-8"), re.M
            ), path
