"""Rows of results in JSON files, and tables in Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hccr_jax.errors import InputError

Row = dict[str, Any]


def read_rows(path: Path, keys: set[str], command: str) -> list[Row]:
    """Returns the rows of a file of JSON lines, or of an indented JSON file with a list `rows`.

    Args:
      path: the file.
      keys: that each row has.
      command: that writes such files, for the error.

    Raises:
      InputError: the file is missing, damaged or something else.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
        is_one = lines[:1] == ["{"]
        rows = json.loads("\n".join(lines))["rows"] if is_one else list(map(json.loads, lines))
        if rows and all(keys <= set(row) for row in rows):
            return rows
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not a file that {command} wrote")


def to_table(lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table: the headings, then a line for each of the others."""
    headings, *others = lines
    ruled = [headings, ["---"] * len(headings), *others]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
