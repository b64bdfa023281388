"""How far work has come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence


def with_progress(work: Callable, items: Sequence, label: str = "", done: int = 0) -> Iterator:
    """``map(work, items)``, with a bar on a terminal's stderr if there are many items.

    The bar is there only while ``work`` runs, as results are likely to be printed on the same terminal. It has the
    label in front, and starts behind those that are ``done`` already.
    """
    total = done + len(items)
    shown = total >= 10 and sys.stderr.isatty()
    for place, item in enumerate(items, done):
        if shown:
            bar = "#" * (20 * place // total)
            print(f"{label}[{bar:<20}] {place}/{total}", end="", file=sys.stderr, flush=True)
        try:
            result = work(item)
        finally:
            if shown:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        yield result
