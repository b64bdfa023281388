"""What networks that were trained in TensorFlow do in their own way."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Conv2dSame
from ..nn.dispatch import known

TENSORFLOW_NORM = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


@known
class Conv2dBelowRight(Conv2dSame):
    """Pads one row below and one column to the right, whatever the image's size, as Keras's MobileNet does. For 3x3
    with stride 2 that is "SAME" where the size is even."""

    def same_padding(self, input: Tensor) -> tuple[int, int, int, int]:
        return 0, 1, 0, 1


class MaxPool2dSame(nn.MaxPool2d):
    """3x3 with stride 2 and TensorFlow's "SAME" padding: around images of odd size, below and right of others.

    (N, C, H, W) → (N, C, ⌈H / 2⌉, ⌈W / 2⌉).
    """

    def __init__(self) -> None:
        super().__init__(3, 2, ceil_mode=True)  # which lets the last window reach over the edge

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        return F.max_pool2d(input, 3, 2, (height % 2, width % 2), ceil_mode=True)
