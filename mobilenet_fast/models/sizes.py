"""The least pictures that a network takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_size(network: nn.Module, x: Tensor, least: int | None = None, advice: str = "") -> None:
    """Refuses pictures that some convolution or pooling of the network could not take.

    Sizes that are symbols are left alone: a capture for any size must not be bounded by what it was captured with.

    Args:
        network: with ``least_size``, and the ``name`` that `create_model` knows it by.
        x: (N, C, H, W).
        least: in the place of ``least_size``.
        advice: how smaller ones would do.

    Raises:
        ValueError: H or W is less.
    """
    if torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
        return  # where symbols pass for integers
    least = network.least_size if least is None else least
    sizes = x.shape[-2:]
    if isinstance(sizes, tuple) and any(type(size) is int and size < least for size in sizes):  # no proxy of fx
        name = getattr(network, "name", type(network).__name__)
        got = " x ".join(map(str, sizes))
        raise ValueError(f"{name}: pictures must be at least {least} x {least}{advice}, got {got}")
