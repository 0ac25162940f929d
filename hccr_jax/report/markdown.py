"""Tables in Markdown."""

from collections.abc import Sequence
from typing import Any


def to_table(lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table: the headings, then a line for each of the others."""
    headings, *others = lines
    ruled = [headings, ["---"] * len(headings), *others]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    if row.get(key) is None:
        return ""
    text = form.format(row[key])
    if key == "images_per_second":
        text += f" ({row['min']:,.0f}–{row['max']:,.0f})"
    return text
