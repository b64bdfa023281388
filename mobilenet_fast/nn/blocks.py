"""What networks of the family are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from .conv2d_same import Conv2dSame
from .depthwise import DepthwiseConv2d
from .dispatch import activation_layer, known
from .fusion import Chained, FusedSequential, Links
from .pointwise import PointwiseConv2d
from .squeeze_excite import SqueezeExcitation


@known
class ConvNormAct(FusedSequential):
    """``activation(norm(conv(input)))``, an `nn.Sequential` with `torchvision.ops.Conv2dNormActivation`'s constructor
    and keys.

    One kernel call in eval mode, where `FusedSequential` fuses; a convolution that is neither depthwise nor 1x1 runs in
    PyTorch.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation: as `nn.Conv2d` takes them.
        padding: None pads so that stride 1 keeps the image's size, for odd kernels; "same" pads as TensorFlow does,
            also with a stride (`Conv2dSame`).
        norm_layer: None, or what makes the norm from the number of channels.
        activation_layer: None, a module class, or a name: "relu", "relu6", "hardswish", "hardsigmoid", "silu",
            "sigmoid".
        inplace: given to the activation if not None and if it takes it.
        bias: of the convolution; None gives it one if no norm follows.

    Shape:
        (N, C, H, W) → (N, K, H', W'), in the layout that `nn.Conv2d` gives.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        activation_layer: str | Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        is_symmetric = _pair(stride) == (1, 1) and all(k % 2 for k in _pair(kernel_size))
        if padding is None or (padding == "same" and is_symmetric):
            padding = tuple((k - 1) // 2 * d for k, d in zip(_pair(kernel_size), _pair(dilation), strict=True))
        if bias is None:
            bias = norm_layer is None
        layers = [_conv(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(_activation(activation_layer, inplace))
        super().__init__(*layers)
        self.out_channels = out_channels


class SeparableConv2d(nn.Module):
    """``pointwise(depthwise(input))``, or ``depthwise(pointwise(input))``: a filter for each channel, and a 1x1
    convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: as `nn.Conv2d` takes them.
        bias: of the last convolution, and of the first if an activation follows that.
        depth_multiplier: filters for each channel, with "depthwise_first".
        activation: behind both: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".
        order: "depthwise_first", as in Xception and the MobileNets, or "pointwise_first", as in the Inception module
            that Xception's figure 4 takes to its extreme.
        activation_between: the two convolutions; None, which the paper finds best (section 4.7), "elu", the other that
            it tries, or a name as above.

    Shape:
        (N, C, H, W) → (N, K, H', W'), in the layout that `nn.Conv2d` gives.

    Raises:
        ValueError: an activation or the order has another name, or ``depth_multiplier`` is not 1 with
            "pointwise_first".

    Xception (Chollet, 2017, arXiv:1610.02357), sections 2 and 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        depth_multiplier: int = 1,
        *,
        activation: str = "none",
        order: str = "depthwise_first",
        activation_between: str | None = None,
    ) -> None:
        super().__init__()
        if order not in ("depthwise_first", "pointwise_first"):
            raise ValueError(f'SeparableConv2d: order must be "depthwise_first" or "pointwise_first", got {order!r}')
        self.order = order
        geometry = kernel_size, stride, padding, dilation
        self.between = nn.ELU() if activation_between == "elu" else None
        fused = "none" if activation_between in (None, "elu") else activation_between
        between = {"bias": bias and activation_between is not None, "activation": fused}
        last = {"bias": bias, "activation": activation}
        if order == "depthwise_first":
            channels = in_channels * depth_multiplier
            self.depthwise = DepthwiseConv2d(in_channels, channels, *geometry, **between)
            self.pointwise = PointwiseConv2d(channels, out_channels, **last)
        else:
            if depth_multiplier != 1:
                raise ValueError(
                    f'SeparableConv2d: depth_multiplier must be 1 with order="pointwise_first", got {depth_multiplier}'
                )
            self.pointwise = PointwiseConv2d(in_channels, out_channels, **between)
            self.depthwise = DepthwiseConv2d(out_channels, out_channels, *geometry, **last)

    def forward(self, input: Tensor) -> Tensor:
        first, last = self.depthwise, self.pointwise
        if self.order == "pointwise_first":
            first, last = last, first
        output = first(input)
        return last(output if self.between is None else self.between(output))

    def extra_repr(self) -> str:
        return "" if self.order == "depthwise_first" else f"order={self.order}"


class StochasticDepth(nn.Module):
    """In training, zero for a picture with probability ``p``, else the input divided by 1 - ``p``:
    `torchvision.ops.StochasticDepth` with mode "row".

    Args:
        p: from 0 up to but not 1.

    Shape:
        (N, …) → the same.

    Raises:
        ValueError: p is out of range.

    Deep Networks with Stochastic Depth (Huang et al., 2016, arXiv:1603.09382), section 3.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"StochasticDepth: p must be at least 0 and less than 1, got {p}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        keeps = input.new_empty(input.size(0), *[1] * (input.dim() - 1)).bernoulli_(1 - self.p)
        return input * keeps.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


@known
class InvertedResidual(Chained):
    """Expansion, depthwise convolution, squeeze-and-excitation and projection, plus the input where shapes allow:
    `torchvision.models.mobilenetv3.InvertedResidual` with its keys, and arguments spelled out.

    Args:
        in_channels, out_channels: of the block.
        expanded_channels: of the depthwise convolution; there is no expansion if it equals ``in_channels``.
        kernel_size, stride, dilation: of the depthwise convolution; a dilation takes the place of the stride, which
            is 1 then.
        squeeze_channels: of the squeeze-and-excitation; None for none.
        activation_layer: behind expansion and depthwise convolution; a module class or a name.
        norm_layer: what makes the norm from the number of channels.
        padding: of the depthwise convolution; None or "same", as `ConvNormAct` takes them.

    Shape:
        (N, C, H, W) → (N, K, ⌈H / stride⌉, ⌈W / stride⌉), in the layout that `nn.Conv2d` gives.

    MobileNetV3 (Howard et al., 2019, arXiv:1905.02244), section 5 and figure 4; MobileNetV2 (Sandler et al., 2018,
    arXiv:1801.04381), section 3.4.
    """

    def __init__(
        self,
        in_channels: int,
        expanded_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        squeeze_channels: int | None = None,
        activation_layer: str | Callable[..., nn.Module] = nn.Hardswish,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        padding: str | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if expanded_channels != in_channels:
            layers.append(
                ConvNormAct(in_channels, expanded_channels, 1, norm_layer=norm_layer, activation_layer=activation_layer)
            )
        layers.append(
            ConvNormAct(
                expanded_channels,
                expanded_channels,
                kernel_size,
                1 if dilation > 1 else stride,
                padding,
                groups=expanded_channels,
                norm_layer=norm_layer,
                activation_layer=activation_layer,
                dilation=dilation,
            )
        )
        if squeeze_channels is not None:
            layers.append(SqueezeExcitation(expanded_channels, squeeze_channels, nn.ReLU, nn.Hardsigmoid))
        layers.append(ConvNormAct(expanded_channels, out_channels, 1, norm_layer=norm_layer, activation_layer=None))
        self.block = FusedSequential(*layers)
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.out_channels = out_channels

    def links(self) -> Links:
        return Links([self.block], self.use_res_connect)


def _conv(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias) -> nn.Conv2d:
    if padding == "same" and _pair(stride) != (1, 1):
        return Conv2dSame(in_channels, out_channels, kernel_size, stride, dilation, groups, bias)
    if groups == in_channels > 1 and out_channels % in_channels == 0:
        return DepthwiseConv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias)
    if _pair(kernel_size) == _pair(stride) == (1, 1) and padding in (0, (0, 0)) and groups == 1:
        return PointwiseConv2d(in_channels, out_channels, bias)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)


def _activation(activation: str | Callable[..., nn.Module], inplace: bool | None) -> nn.Module:
    layer = activation_layer("ConvNormAct", "activation_layer", activation)
    takes_inplace = inplace is not None and "inplace" in inspect.signature(layer).parameters
    return layer(inplace=inplace) if takes_inplace else layer()


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
