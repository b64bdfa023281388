"""Convolution with filters of its own for each channel."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional, reference
from .dispatch import kernels_serve, known


@known
class DepthwiseConv2d(nn.Conv2d):
    """``activation(nn.Conv2d(in_channels, out_channels, kernel_size, ..., groups=in_channels)(input))``

    An `nn.Conv2d` in constructor, attributes and state_dict, with one filter, or ``out_channels / in_channels`` of
    them, for each channel. Tensors that `mobilenet_fast.functional` has kernels for run in one, bias and activation
    included, and so do their gradients; everything else (``padding_mode`` other than "zeros", other dtypes and devices,
    export) runs as `nn.Conv2d` does.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as
            `nn.Conv2d` takes them; ``out_channels`` must be a multiple of ``in_channels``.
        groups: None or ``in_channels``.
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".

    Shape:
        (N, C, H, W) → (N, C·M, H', W'), in the layout that `nn.Conv2d` gives. The error is that of
        `mobilenet_fast.functional.depthwise_conv2d`.

    Raises:
        ValueError: ``groups`` or ``activation`` is another, or ``out_channels`` no multiple.

    MobileNets (Howard et al., 2017, arXiv:1704.04861), section 3.1.
    """

    # On the class as well, for a layer that replace_layers turned into this one has none of its own.
    activation = "none"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        activation: str = "none",
    ) -> None:
        if groups not in (None, in_channels):
            raise ValueError(f"DepthwiseConv2d: groups must be in_channels={in_channels}, got {groups}")
        reference.check_activation("DepthwiseConv2d", activation)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if (
            self.padding_mode == "zeros"
            and kernels_serve(input, self.weight, self.bias, learns=True)
            and input.size(1) == self.groups  # fewer would pass for a channel multiplier
        ):
            return functional.depthwise_conv2d(
                input,
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
                activation=self.activation,
            )
        return reference.activation(super().forward(input), self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation}")


def is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels and conv.groups > 1
