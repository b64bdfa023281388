"""What a search maximises."""

from __future__ import annotations

import math


def reward(accuracy: float, latency: float, target: float, w: float = -0.07) -> float:
    """``accuracy * (latency / target) ** w``: MnasNet (Tan et al., 2019, arXiv:1807.11626), section 3, equation 2.

    The target is a soft one: networks on either side of it are weighed by how far they are from it. -0.07 comes from
    the observation that twice the latency gives about 5 % more accuracy, relatively: both networks then have about the
    same reward, as 1.05 · 2^-0.07 ≈ 1. For small networks accuracy changes much more with latency, and MobileNetV3
    (Howard et al., 2019, arXiv:1905.02244, section 4.1) takes -0.15, so that this is made up for there too; with -0.07
    the search would leave the target for larger networks.

    Args:
        accuracy: of the network, from 0 on.
        latency, target: in the same unit, more than 0.
        w: the exponent, 0 or less; 0 leaves latency out.

    Raises:
        ValueError: an argument is out of its range, or the reward is too large for a float.
    """
    for name, value in (("latency", latency), ("target", target)):
        if not 0 < value < math.inf:
            raise ValueError(f"reward: {name} must be more than 0, got {value}")
    if not 0 <= accuracy < math.inf:
        raise ValueError(f"reward: accuracy must be 0 or more, got {accuracy}")
    if not -math.inf < w <= 0:
        raise ValueError(f"reward: w must be 0 or less, got {w}")
    exponent = w * (math.log(latency) - math.log(target))  # the ratio itself may be 0 or infinite
    try:
        value = accuracy * math.exp(exponent)
    except OverflowError:
        value = math.inf
    if value == math.inf:
        raise ValueError(f"reward: {accuracy} * ({latency} / {target}) ** {w} is too large")
    return value
