"""Convolution under TensorFlow's padding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .depthwise import is_depthwise
from .dispatch import kernels_serve, known


@known
class Conv2dSame(nn.Conv2d):
    """An `nn.Conv2d` with TensorFlow's "SAME" padding: as little as gives ``ceil(size / stride)`` outputs, the odd
    one below and to the right. It depends on the image's size, so that ``padding`` stays 0 and `forward` pads.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype: as `nn.Conv2d` takes
            them.

    Shape:
        (N, C, H, W) → (N, K, ⌈H / stride⌉, ⌈W / stride⌉), in the layout that `nn.Conv2d` gives. A depthwise one runs
        in a kernel where `DepthwiseConv2d` would.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias, device=device, dtype=dtype
        )

    def same_padding(self, input: Tensor) -> tuple[int, int, int, int]:
        """Rows above and below, columns left and right."""
        sizes = zip(input.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        # By remainders, which stay simple where sizes are symbols.
        rows, columns = (max((k - 1) * d + 1 - (n % s or s), 0) for n, k, s, d in sizes)
        return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2

    def pad(self, input: Tensor) -> Tensor:
        top, bottom, left, right = self.same_padding(input)
        return F.pad(input, (left, right, top, bottom)) if bottom or right else input

    def forward(self, input: Tensor) -> Tensor:
        padded = self.pad(input)
        if (
            is_depthwise(self)
            and kernels_serve(input, self.weight, self.bias, learns=True)
            and input.size(1) == self.groups  # fewer would pass for a channel multiplier
        ):
            return functional.depthwise_conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
