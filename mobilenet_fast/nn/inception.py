"""The Inception module, and the steps from it to its extreme, which is a separable convolution.

From 28 × 28 × 192, as GoogLeNet's module 3a has it, without biases:

| module | output channels | parameters | multiply-accumulates |
|---|---:|---:|---:|
| dense 3x3 convolution | 256 | 442,368 | 346,816,512 |
| `NaiveInception(192, 64, 128, 32)` | 416 | 387,072 | 303,464,448 |
| `ReducedInception(192, 64, 96, 128, 16, 32, 32)` | 256 | 163,328 | 128,049,152 |
| `CanonicalInception(192, 64, 96, 128, 16, 32, 32)` | 256 | 164,352 | 128,851,968 |
| `InceptionTowers(192, 256, 256, 4)` | 256 | 196,608 | 154,140,672 |
| `InceptionSegments(192, 256, 256, 4)` | 256 | 196,608 | 154,140,672 |
| `InceptionSegments(192, 256, 256, 32)` | 256 | 67,584 | 52,985,856 |
| `InceptionSegments(192, 256, 256, 256)` | 256 | 51,456 | 40,341,504 |
| `SeparableConv2d(192, 256, 3, padding=1, order="pointwise_first")` | 256 | 51,456 | 40,341,504 |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import reference
from .blocks import ConvNormAct, SeparableConv2d
from .depthwise import DepthwiseConv2d
from .fusion import FusedSequential
from .pointwise import PointwiseConv2d


class _Branches(nn.Module):
    """Its children side by side on the same input, their outputs concatenated."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        reference.check_activation(type(self).__name__, activation)

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([branch(input) for branch in self.children()], 1)


class NaiveInception(_Branches):
    """1x1, 3x3 and 5x5 convolutions and a 3x3 maximum side by side, concatenated.

    Args:
        in_channels: of the input.
        ch1x1, ch3x3, ch5x5: output channels of the convolutions; the maximum has those of the input.
        bias: of the convolutions.
        activation: behind each convolution: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".

    Shape:
        (N, C, H, W) → (N, ch1x1 + ch3x3 + ch5x5 + C, H, W)

    Raises:
        ValueError: ``activation`` is another.

    GoogLeNet (Szegedy et al., 2015, arXiv:1409.4842), figure 2a.
    """

    def __init__(
        self, in_channels: int, ch1x1: int, ch3x3: int, ch5x5: int, *, bias: bool = True, activation: str = "relu"
    ) -> None:
        super().__init__(activation)
        self.branch1 = _conv(in_channels, ch1x1, 1, bias, activation)
        self.branch2 = _conv(in_channels, ch3x3, 3, bias, activation)
        self.branch3 = _conv(in_channels, ch5x5, 5, bias, activation)
        self.branch4 = nn.MaxPool2d(3, 1, 1)
        self.out_channels = ch1x1 + ch3x3 + ch5x5 + in_channels


class ReducedInception(_Branches):
    """`NaiveInception` with 1x1 convolutions that reduce the channels before the larger ones and behind the maximum.

    Args:
        in_channels: of the input.
        ch1x1, ch3x3, ch5x5, pool_proj: output channels of the branches.
        ch3x3red, ch5x5red: of the reductions.
        bias, activation: as `NaiveInception` takes them; reductions have them too.

    Shape:
        (N, C, H, W) → (N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W)

    Raises:
        ValueError: ``activation`` is another.

    GoogLeNet (Szegedy et al., 2015, arXiv:1409.4842), figure 2b.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        *,
        bias: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__(activation)
        behind = bias, activation
        self.branch1 = _conv(in_channels, ch1x1, 1, *behind)
        self.branch2 = FusedSequential(_conv(in_channels, ch3x3red, 1, *behind), _conv(ch3x3red, ch3x3, 3, *behind))
        self.branch3 = FusedSequential(_conv(in_channels, ch5x5red, 1, *behind), _conv(ch5x5red, ch5x5, 5, *behind))
        self.branch4 = FusedSequential(nn.MaxPool2d(3, 1, 1), _conv(in_channels, pool_proj, 1, *behind))
        self.out_channels = ch1x1 + ch3x3 + ch5x5 + pool_proj


class CanonicalInception(_Branches):
    """`ReducedInception` with two 3x3 convolutions in the place of the 5x5 one, and a mean in that of the maximum.

    Args:
        in_channels: of the input.
        ch1x1, ch3x3, ch3x3dbl, pool_proj: output channels of the branches.
        ch3x3red, ch3x3dblred: of the reductions.
        bias, activation: as `NaiveInception` takes them; reductions have them too.

    Shape:
        (N, C, H, W) → (N, ch1x1 + ch3x3 + ch3x3dbl + pool_proj, H, W)

    Raises:
        ValueError: ``activation`` is another.

    Xception (Chollet, 2017, arXiv:1610.02357), figure 1; Inception v3 (Szegedy et al., 2016, arXiv:1512.00567),
    figure 5.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch3x3dblred: int,
        ch3x3dbl: int,
        pool_proj: int,
        *,
        bias: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__(activation)
        behind = bias, activation
        self.branch1 = _conv(in_channels, ch1x1, 1, *behind)
        self.branch2 = FusedSequential(_conv(in_channels, ch3x3red, 1, *behind), _conv(ch3x3red, ch3x3, 3, *behind))
        self.branch3 = FusedSequential(
            _conv(in_channels, ch3x3dblred, 1, *behind),
            _conv(ch3x3dblred, ch3x3dbl, 3, *behind),
            _conv(ch3x3dbl, ch3x3dbl, 3, *behind),
        )
        self.branch4 = FusedSequential(nn.AvgPool2d(3, 1, 1), _conv(in_channels, pool_proj, 1, *behind))
        self.out_channels = ch1x1 + ch3x3 + ch3x3dbl + pool_proj


class InceptionSegments(nn.Module):
    """A 1x1 convolution, and 3x3 convolutions on segments of its output channels that do not overlap, concatenated:
    ``nn.Conv2d(mid_channels, out_channels, 3, padding=1, groups=segments)(pointwise(input))``

    With one segment it is a 1x1 convolution and a dense 3x3 one, with as many as channels a separable convolution.

    Args:
        in_channels: of the input.
        mid_channels: of the 1x1 convolution's output; a multiple of ``segments``.
        out_channels: of the output; a multiple of ``segments``.
        segments: how many.
        bias: of the 3x3 convolutions, and of the 1x1 one if an activation follows that.
        activation: behind all convolutions: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".

    Shape:
        (N, C, H, W) → (N, K, H, W)

    Raises:
        ValueError: a number of channels is no multiple of ``segments``, or ``activation`` is another.

    Xception (Chollet, 2017, arXiv:1610.02357), section 1.1 and figures 3 and 4.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        segments: int,
        *,
        bias: bool = False,
        activation: str = "none",
    ) -> None:
        super().__init__()
        reference.check_activation("InceptionSegments", activation)
        _check_split("InceptionSegments", "segments", segments, mid_channels, out_channels)
        self.segments, self.bias, self.activation = segments, bias, activation
        first_bias = bias and activation != "none"
        self.pointwise = PointwiseConv2d(in_channels, mid_channels, first_bias, activation=activation)
        layer = DepthwiseConv2d if segments == mid_channels else nn.Conv2d
        self.spatial = layer(mid_channels, out_channels, 3, padding=1, groups=segments, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return reference.activation(self.spatial(self.pointwise(input)), self.activation)

    @classmethod
    def from_towers(cls, towers: InceptionTowers) -> InceptionSegments:
        """The module of figure 3 that computes what a module of figure 2 does: its weights, concatenated."""
        parts = list(towers.children())
        widths = [sum(channels) for channels in zip(*map(_widths, parts), strict=True)]
        options = {"bias": parts[0].bias, "activation": parts[0].activation}
        shared = cls(parts[0].pointwise.in_channels, *widths, len(parts), **options)
        return _load(
            shared, {key: torch.cat([part.state_dict()[key] for part in parts]) for key in shared.state_dict()}
        )

    def to_separable(self) -> SeparableConv2d:
        """The separable convolution of figure 4 that computes the same, with the same weights.

        Raises:
            ValueError: there are fewer segments than channels.
        """
        if _widths(self) != (self.segments, self.segments):
            widths = "{} and {}".format(*_widths(self))
            raise ValueError(f"to_separable: segments must be as many as channels, {widths}, got {self.segments}")
        between = None if self.activation == "none" else self.activation
        separable = SeparableConv2d(
            self.pointwise.in_channels,
            self.segments,
            padding=1,
            bias=self.bias,
            activation=self.activation,
            order="pointwise_first",
            activation_between=between,
        )
        return _load(separable, {key.replace("spatial", "depthwise"): w for key, w in self.state_dict().items()})

    def extra_repr(self) -> str:
        return f"segments={self.segments}, activation={self.activation}"


class InceptionTowers(_Branches):
    """Towers of a 1x1 and a 3x3 convolution side by side, concatenated: the Inception module with one size of
    convolution and without pooling.

    Args:
        in_channels: of the input.
        mid_channels: of all 1x1 convolutions' outputs together; a multiple of ``towers``.
        out_channels: of the output; a multiple of ``towers``.
        towers: how many.
        bias, activation: as `InceptionSegments` takes them.

    Shape:
        (N, C, H, W) → (N, K, H, W)

    Raises:
        ValueError: a number of channels is no multiple of ``towers``, or ``activation`` is another.

    Xception (Chollet, 2017, arXiv:1610.02357), section 1.1 and figure 2.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        towers: int,
        *,
        bias: bool = False,
        activation: str = "none",
    ) -> None:
        super().__init__(activation)
        _check_split("InceptionTowers", "towers", towers, mid_channels, out_channels)
        for i in range(towers):
            tower = InceptionSegments(
                in_channels, mid_channels // towers, out_channels // towers, 1, bias=bias, activation=activation
            )
            self.add_module(f"tower{i + 1}", tower)

    def to_shared(self) -> InceptionSegments:
        """`InceptionSegments.from_towers` of this module."""
        return InceptionSegments.from_towers(self)


def _conv(in_channels: int, out_channels: int, kernel_size: int, bias: bool, activation: str) -> ConvNormAct:
    layer = None if activation == "none" else activation
    return ConvNormAct(in_channels, out_channels, kernel_size, norm_layer=None, activation_layer=layer, bias=bias)


def _check_split(module: str, argument: str, parts: int, mid_channels: int, out_channels: int) -> None:
    if parts < 1 or mid_channels % parts or out_channels % parts:
        raise ValueError(
            f"{module}: mid_channels and out_channels must be multiples of {argument}={parts}, "
            f"got {mid_channels} and {out_channels}"
        )


def _widths(module: InceptionSegments) -> tuple[int, int]:
    return module.spatial.in_channels, module.spatial.out_channels


def _load(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The module with these weights, copies of them, on their device and in their dtype."""
    weight = next(iter(state.values()))
    module.to(weight.device, weight.dtype).load_state_dict(state)
    return module
