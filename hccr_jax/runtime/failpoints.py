"""Fail points: named moments of a run, at which the fault tests kill it."""

from collections.abc import Callable

on_reach: Callable[[str], None] | None = None  # set by a test's program alone


def failpoint(name: str) -> None:
    """Marks a moment of a run."""
    if on_reach is not None:
        on_reach(name)
