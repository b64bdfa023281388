"""Squeeze-and-excitation: channels weighed by what their means say."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .. import functional
from .dispatch import activation_layer, activation_name, kernels_serve, known, runs_triton, unhooked
from .pointwise import is_plain_pointwise


@known
class SqueezeExcitation(nn.Module):
    """``input * scale_activation(fc2(activation(fc1(avgpool(input)))))``, with `torchvision.ops.SqueezeExcitation`'s
    constructor, attributes and state_dict.

    Tensors that `mobilenet_fast.functional` has kernels for run in those, on the CPU if they need no gradient, if both
    activations have a name there; everything else runs layer by layer.

    Args:
        input_channels: C.
        squeeze_channels: the channels between the two 1x1 convolutions ``fc1`` and ``fc2``.
        activation, scale_activation: module classes, functions that make a module, or names: "none", "relu", "relu6",
            "hardswish", "hardsigmoid", "silu", "sigmoid".

    Shape:
        (N, C, H, W) → the same, in the layout that ``input * scale`` gives. The error is that of
        `mobilenet_fast.functional.squeeze_excite`.

    Raises:
        ValueError: an activation's name is another.

    Squeeze-and-Excitation Networks (Hu et al., 2018, arXiv:1709.01507), section 3.
    """

    # What its convolutions and activations are called, in the order of use.
    part_names = ("fc1", "activation", "fc2", "scale_activation")

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: str | Callable[..., nn.Module] = nn.ReLU,
        scale_activation: str | Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation_layer("SqueezeExcitation", "activation", activation)()
        self.scale_activation = activation_layer("SqueezeExcitation", "scale_activation", scale_activation)()

    def forward(self, input: Tensor) -> Tensor:
        parts = self.kernel_parts()
        if parts is not None:
            fc1, squeeze, fc2, gate = parts
            operands = fc1.weight, fc1.bias, fc2.weight, fc2.bias
            if kernels_serve(input, *operands, learns=runs_triton(input)):
                return functional.squeeze_excite(input, *operands, squeeze_activation=squeeze, gate_activation=gate)
        return self.plain_forward(input)

    def kernel_parts(self) -> tuple[nn.Conv2d, str, nn.Conv2d, str] | None:
        """Both convolutions, each with its activation's name, if a kernel may do their work."""
        fc1, activation, fc2, scale_activation = (getattr(self, name) for name in self.part_names)
        squeeze, gate = activation_name(activation), activation_name(scale_activation)
        serves = squeeze is not None and gate is not None and self.pools_plainly()
        return (fc1, squeeze, fc2, gate) if serves and is_plain_pointwise(fc1) and is_plain_pointwise(fc2) else None

    def pools_plainly(self) -> bool:
        return type(self.avgpool) is nn.AdaptiveAvgPool2d and unhooked(self.avgpool)

    def plain_forward(self, input: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(input))))
        return self.scale_activation(scale) * input
