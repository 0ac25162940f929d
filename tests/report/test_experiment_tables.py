"""Tables of experiments: docs/ holds what the committed results give."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from hccr_jax.errors import InputError
from hccr_jax.report import experiment_tables

DOCS = Path(__file__).parents[2] / "docs"


def row(name: str, group: str, top1: float, seed: int = 0, **more: object) -> experiment_tables.Row:
    scores = {"top1": top1, "validation_top1": top1 + 0.01, "training_seconds": 90.0, **more}
    curve = {
        "step": [10, 20, 30, 40],
        "validation_top1": [0.1, 0.9, 0.35, top1],
        "train_accuracy": [0.2, 0.6, 0.8, 0.9],
    }
    metadata = {"name": name, "group": group, "seed": seed, "description": f"the {name}"}
    return metadata | {"changes": {}, "eval": scores, "curve": curve}


ROWS = [
    row("base", "", 0.7),
    row("base", "", 0.72, seed=1),
    row("base", "", 0.74, seed=2),
    row("low", "Rate", 0.5, parameters=1234),
    row("high", "Rate", 0.8, robustness={"all": {"top1": 0.5}, "rotation": {"top1": 0.25}}),
    row("wide", "Size", 0.9),
]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Returns a page next to a folder `measured`, whose rows were written in any order."""
    for number in (4, 0, 5, 2, 3, 1):
        experiment_tables.write_row(
            tmp_path / "measured" / "x.jsonl", ROWS[number], ["base", "low", "high", "wide"]
        )
    return tmp_path / "page.md"


def render_rows(folder: Path, rows: list[experiment_tables.Row]) -> list[str]:
    for written in rows:
        experiment_tables.write_row(folder / "y.jsonl", written, [r["name"] for r in rows])
    return render(folder / "page.md", "table: y.jsonl")


def render(page: Path, comment: str) -> list[str]:
    page.write_text(f"before\n<!-- {comment} -->\nold\n<!-- end -->\nafter\n")
    experiment_tables.render(page)
    lines = page.read_text().split("\n")
    assert lines[:3] == ["before", f"<!-- {comment} -->", ""]
    assert lines[-4:] == ["", "<!-- end -->", "after", ""]
    return lines[3:-4]


def test_rows_are_kept_in_the_order_of_the_list(page: Path) -> None:
    path = page.parent / "measured" / "x.jsonl"
    assert experiment_tables.read_runs(path) == ROWS
    again = copy.deepcopy(ROWS[3])
    again["eval"]["top1"] = 0.6
    experiment_tables.write_row(path, again, ["base", "low", "high", "wide"])
    assert experiment_tables.read_runs(path) == [*ROWS[:3], again, *ROWS[4:]]
    assert [p.name for p in path.parent.iterdir()] == ["x.jsonl"]


def test_table_of_all(page: Path) -> None:
    # The standard deviation of 0.70, 0.72, 0.74 is 0.02.
    assert render(page, "table: measured/x.jsonl") == [
        "|  | seeds | validation top-1, % | test top-1, % | distorted, all, % | rotation, % "
        "| parameters | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| the base | 3 | 73.00 ± 2.00 | 72.00 ± 2.00 |  |  |  | 1.5 |",
        "| the low | 1 | 51.00 | 50.00 |  |  | 1,234 | 1.5 |",
        "| the high | 1 | 81.00 | 80.00 | 50.00 | 25.00 |  | 1.5 |",
        "| the wide | 1 | 91.00 | 90.00 |  |  |  | 1.5 |",
    ]


def test_table_of_a_group_with_its_gains(page: Path) -> None:
    lines = render(page, "table: measured/x.jsonl; group=Size; gain=top1")
    assert lines == [
        "|  | gain, points | seeds | validation top-1, % | test top-1, % | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| the base |  | 3 | 73.00 ± 2.00 | 72.00 ± 2.00 | 1.5 |",
        "| the wide | +18.00 | 1 | 91.00 | 90.00 | 1.5 |",
    ]


def test_network_alone_is_a_column_where_runs_have_more(tmp_path: Path) -> None:
    extended = {"network": {"top1": 0.6}, "tta_views": 5, "ensemble": {"members": ["mqdf"]}}
    older = row("older", "", 0.8, views=4) | {"changes": {"model.mqdf_weight": 0.25}}
    rows = [row("plain", "", 0.5), row("new", "", 0.7, **extended), older]
    lines = render_rows(tmp_path, rows)
    assert lines[0] == (
        "|  | validation top-1, % | test top-1, network alone on one view, % "
        "| test top-1 as configured, % | with | minutes |"
    )
    assert lines[2:] == [
        "| the plain | 51.00 | 50.00 | 50.00 |  | 1.5 |",
        "| the new | 71.00 | 60.00 | 70.00 | 5 views, MQDF | 1.5 |",
        "| the older | 81.00 | – | 80.00 | 4 views, MQDF | 1.5 |",
    ]


def test_rows_of_version_0_1_are_read(tmp_path: Path) -> None:
    old = {("course" if key == "curve" else key): value for key, value in ROWS[0].items()}
    (tmp_path / "old.jsonl").write_text(json.dumps(old) + "\n", "utf-8")
    assert experiment_tables.read_runs(tmp_path / "old.jsonl") == [ROWS[0]]


def test_stability_and_curves(page: Path) -> None:
    lines = render(page, "stability: measured/x.jsonl; group=Size")
    assert lines[0] == (
        "| validation top-1, % | best | last | lowest of the second half | largest drop |"
    )
    assert lines[2] == "| the base | 90.00 | 70.00 | 35.00 | 55.00 |"
    assert lines[3].startswith("| the base, seed 1 | 90.00 | 72.00")
    lines = render(page, "curves: measured/x.jsonl; picture=pictures/curves.png")
    assert lines == ["![Validation top-1 over the training steps](pictures/curves.png)"]
    with Image.open(page.parent / "pictures" / "curves.png") as picture:
        picture.verify()


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("table: measured/y.jsonl", "y.jsonl: No such file or directory"),
        ("table: page.md", "page.md: not a file that hccr sweep wrote"),
        ("table: measured/x.jsonl; group=Rates", "no group 'Rates'; there are Rate, Size"),
        ("table: measured/x.jsonl; gain=top5", "gain=top5: choose from validation_top1, top1,"),
        ("table: measured/x.jsonl; sort=top1", "unexpected keyword argument 'sort'"),
        ("tables: measured/x.jsonl", "no `<!-- table: FILE -->` with an `<!-- end -->`"),
    ],
)
def test_wrong_comment_is_named_and_the_page_kept(page: Path, comment: str, message: str) -> None:
    page.write_text(f"<!-- {comment} -->\nold\n<!-- end -->\n")
    with pytest.raises(InputError, match=r"page\.md") as caught:
        experiment_tables.render(page)
    assert message in str(caught.value)
    assert page.read_text() == f"<!-- {comment} -->\nold\n<!-- end -->\n"


def test_docs_are_what_the_committed_results_give(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    for path in (tmp_path / "docs").rglob("*.md"):
        before = path.read_text("utf-8")
        if "<!-- end -->" in before:
            experiment_tables.render(path)
            assert path.read_text("utf-8") == before, f"hccr sweep --render=docs/{path.name}"


def test_row_of_a_run(tmp_path: Path) -> None:
    logged = [
        {"step": 5, "train/accuracy": 0.5},
        {"step": 10, "train/accuracy": 0.123456789},
        {"step": 10, "eval/top1": 0.25},
    ]
    lines = [json.dumps(entry) for entry in logged]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "eval.json").write_text('{"top1": 0.2}')
    assert experiment_tables.create_row(tmp_path, {"name": "x", "seed": 0}) == {
        "name": "x",
        "seed": 0,
        "eval": {"top1": 0.2},
        "curve": {"step": [10], "validation_top1": [0.25], "train_accuracy": [0.12346]},
    }
