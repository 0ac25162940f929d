"""The benchmark's JSON files as Markdown tables and as a plot."""

from collections.abc import Sequence
from pathlib import Path

from hccr_jax.report import plots
from hccr_jax.report.markdown import Row, read_rows, to_table

# (heading, key, format) of the columns; those that are empty in all rows are left out.
COLUMNS = (
    ("images/s, median (min–max)", "images_per_second", "{:,.0f}"),
    ("ms a step", "ms_per_step", "{:,.2f}"),
    ("PyTorch's best", "baseline", "{}"),
    ("ratio", "ratio", "{:.2f}"),
    ("of the step alone", "of_step", "{:.2f}"),
    ("roofline, images/s", "roofline_images_per_second", "{:,.0f}"),
    ("of roofline", "roofline_fraction", "{:.1%}"),
    ("memory, MiB", "peak_memory_mib", "{:,.0f}"),
    ("launches", "launches", "{:,}"),
    ("GB", "gigabytes", "{:.2f}"),
    ("longest chain", "chain", "{:,}"),
    ("exchanges", "exchanges", "{:,}"),
    ("graphs", "graphs", "{}"),
    ("host turns a step", "host_turns", "{}"),
    ("predicted images/s", "predicted_images_per_second", "{:,.0f}"),
    ("compiled in, s", "compile_seconds", "{:.1f}"),
)
VARIED = {
    "batch_size": "batch size",
    "image_px": "image size, px",
    "width": "width",
    "num_classes": "classes",
}


def read_results(path: Path) -> list[Row]:
    """Returns the rows of a file that `hccr benchmark --output` wrote; see `read_rows`."""
    rows = read_rows(path, {"row", "about"}, "hccr benchmark --output")
    return [{"baseline": row.get("peer"), **row} for row in rows]  # its name in version 0.1


def to_markdown(rows: Sequence[Row]) -> str:
    """Returns Markdown: a heading and a table for each setting that the rows were measured in."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_heading(row), []).append(row)
    parts = []
    for heading, group in groups.items():
        table = _kernels_table(group) if "layer" in group[0]["about"] else _table(group)
        parts.append(f"{heading}\n\n{table}")
    return "\n\n".join(parts)


def plot_scaling(rows: Sequence[Row], folder: Path) -> Path | None:
    """Draws speed against what `--suite=scaling` varied, in `folder`; None without such rows."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in rows:
        if "varied" in row and row["row"] == "train_step" and "error" not in row:
            about, varied = row["about"], row["varied"]
            points = panels.setdefault(VARIED[varied], {}).setdefault(about["model"], [])
            speeds = row["images_per_second"], row["roofline_images_per_second"]
            points.append((about[varied], *speeds))
    return plots.write_scaling(panels, folder) if panels else None


def _heading(row: Row) -> str:
    about = row["about"]
    varied = row.get("varied")
    if "layer" in about:
        parts = [f"**{about['model']}**, depthwise layers", f"batch {about['batch_size']:,}"]
    else:
        parts = [
            f"**{about['model']}**, {about['parameters']:,} parameters",
            f"batch {about['batch_size']:,}",
            f"{about['image_px']} px",
            f"{about['num_classes']:,} classes",
            f"width {about['width']:g}",
        ]
    if varied:
        parts = [f"**{about['model']}**, training step by {VARIED[varied]}"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['device']}, {about['cores']} CPU cores, {about['dtype']}; {versions}"
    return ", ".join(parts) + f"; {where}" + f"; commit {about['commit']}" * bool(about["commit"])


def _table(rows: Sequence[Row]) -> str:
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    lines = [["", *(heading for heading, _, _ in columns)]]
    for row in rows:
        varied = row.get("varied")
        name = f"{row['about'][varied]:,}" if varied else row["row"]
        if "error" in row:
            cells = [row["error"], *[""] * (len(columns) - 1)]
        else:
            cells = [_cell(row, key, form) for _, key, form in columns]
        lines.append([name, *cells])
    return to_table(lines)


def _kernels_table(rows: Sequence[Row]) -> str:
    """Returns images/s by layer (lines) and implementation (columns), the best in bold."""
    implementations = list(dict.fromkeys(row["row"].rpartition("/")[2] for row in rows))
    layers: dict[str, dict[str, float]] = {}
    for row in rows:
        layer = "{}×{}×{}, stride {}".format(*row["about"]["layer"])
        name = row["row"].rpartition("/")[2]
        layers.setdefault(layer, {})[name] = row.get("images_per_second", 0.0)
    lines = [["input", *implementations]]
    for layer, speeds in layers.items():
        best = max(speeds.values())
        cells = [f"{speeds[name]:,.0f}" if name in speeds else "" for name in implementations]
        cells = [f"**{cell}**" if cell == f"{best:,.0f}" else cell for cell in cells]
        lines.append([layer, *cells])
    return to_table(lines)


def _cell(row: Row, key: str, form: str) -> str:
    if row.get(key) is None:
        return ""
    text = form.format(row[key])
    if key == "images_per_second":
        text += f" ({row['min']:,.0f}–{row['max']:,.0f})"
    return text
