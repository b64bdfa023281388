"""Numbers of channels."""

from __future__ import annotations

import math
import numbers


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor``, or the next one if that is less than nine tenths of ``channels``."""
    if not isinstance(channels, numbers.Real):
        raise TypeError("make_divisible: the number of channels must be a number; check the width")
    if not 0 < channels < math.inf:
        raise ValueError(f"make_divisible: the number of channels must be positive, got {channels}; check the width")
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest
