"""1x1 convolution."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional, reference
from .dispatch import is_known, kernels_serve, known


@known
class PointwiseConv2d(nn.Conv2d):
    """``activation(nn.Conv2d(in_channels, out_channels, 1)(input))``

    An `nn.Conv2d` in attributes and state_dict. Tensors that `mobilenet_fast.functional` has kernels for run in one,
    and on the CPU so do their gradients; everything else runs as `nn.Conv2d` does.

    Args:
        in_channels, out_channels, bias, device, dtype: as `nn.Conv2d` takes them.
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".

    Shape:
        (N, C, H, W) → (N, K, H, W), in the layout that `nn.Conv2d` gives. The error is that of
        `mobilenet_fast.functional.pointwise_conv2d`.

    Raises:
        ValueError: ``activation`` is another.

    MobileNets (Howard et al., 2017, arXiv:1704.04861), section 3.1.
    """

    activation = "none"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "none",
    ) -> None:
        reference.check_activation("PointwiseConv2d", activation)
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if is_pointwise(self) and kernels_serve(input, self.weight, self.bias, learns=input.is_cpu):
            return functional.pointwise_conv2d(input, self.weight, self.bias, activation=self.activation)
        return reference.activation(super().forward(input), self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation}")


def is_pointwise(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and (isinstance(conv.padding, str) or conv.padding == (0, 0))
    )


def is_plain_pointwise(module: nn.Module) -> bool:
    """Whether calling the module is `functional.pointwise_conv2d` of its weight and bias, and nothing else."""
    return is_known(module, nn.Conv2d) and is_pointwise(module) and getattr(module, "activation", "none") == "none"
