"""What a run that is kept in a file says of itself, so that none goes on from another's."""

from __future__ import annotations

import json
from typing import Any

from ..messages import first_line


def note_facts(operation: str, note: dict[str, Any] | None) -> dict[str, Any]:
    """A caller's note as JSON keeps it, by names that no option has.

    Raises:
        TypeError: it is no dictionary, or has what JSON has not.
    """
    if not isinstance(note, (dict, type(None))):
        raise TypeError(f"{operation}: note must be a dictionary, got {type(note).__name__}")
    try:
        kept = json.loads(json.dumps(note or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{operation}: note must be of numbers and strings: {first_line(error)}") from None
    return {f"{name} (note)": value for name, value in kept.items()}


def other_facts(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The names of those that differ, or that one of the two lacks."""
    return [name for name in here | there if (name in there, there.get(name)) != (name in here, here.get(name))]
