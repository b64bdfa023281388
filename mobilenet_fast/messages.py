"""What errors say, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: Exception) -> str:
    """Of what an error says, or its name if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def no_such(what: str, name: object, names: Iterable[str]) -> str:
    """That there is none of that name, and which come close, or which there are."""
    if close := difflib.get_close_matches(str(name), names):
        return f"there is no {what} {name!r}; did you mean {' or '.join(close)}?"
    return f"there is no {what} {name!r}; there are {', '.join(names)}"
