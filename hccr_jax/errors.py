"""The exception for wrong requests and wrong input, and the wording of its messages."""

from collections.abc import Sequence


class InputError(ValueError):
    """A wrong config, flag, path or damaged file; its message is one line fit for a user.

    Command lines print it on stderr and exit with code 2, without a traceback.
    """


def shorten(items: Sequence[str], separator: str = "; ", limit: int = 10) -> str:
    """Returns the first items and the number of the others, on one line.

    >>> shorten(["a", "b", "c"], ", ", limit=2)
    'a, b, 1 more'
    """
    more = len(items) - limit
    return separator.join([*items[:limit], *([f"{more:,} more"] if more > 0 else [])])
