"""Blocks and trunk of the networks that have timm's state_dict keys: MobileNetV1, MnasNet-A1 and EfficientNet-Lite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn

from ..nn import Conv2dSame, DepthwiseConv2d, FusedSequential, PointwiseConv2d, SqueezeExcitation
from ..nn.dispatch import known
from ..nn.fusion import Chained, Links
from .features import Outline
from .initialisation import efficientnet_init
from .sizes import check_size
from .tensorflow import Conv2dBelowRight


class Stage(NamedTuple):
    """A row of a paper's table. The stride is that of the first block; without expansion its blocks are
    `DepthwiseSeparable`. ``squeeze_ratio`` is the share of a block's input channels between the two layers of its
    squeeze-and-excitation, 0 for none."""

    blocks: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int
    squeeze_ratio: float = 0.0


class Style(NamedTuple):
    """What all layers of a network have in common."""

    activation: Callable[[], nn.Module]
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    same_padding: bool | str = False  # as TensorFlow pads, or "keras"

    def conv(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int = 1) -> nn.Conv2d:
        # With stride 1 and an odd kernel, TensorFlow's padding is the same on both sides whatever the image's size.
        if self.same_padding and stride > 1:
            same = Conv2dBelowRight if self.same_padding == "keras" and groups > 1 else Conv2dSame
            return same(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)
        layer = DepthwiseConv2d if groups == in_channels > 1 else nn.Conv2d
        padding = kernel_size // 2
        return layer(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)


class Trunk(Chained):
    """A 3x3 stem of stride 2, stages of blocks, a 1x1 convolution, and a classifier on the means of its channels.

    (N, in_chans, H, W) → (N, num_classes).

    Args:
        stages: of blocks, each with its channels already scaled.
        style: of all layers.
        stem_channels: of the stem.
        head_channels: of the 1x1 convolution behind the blocks; None for none.
        num_classes: logits a picture.
        in_chans: channels of the input.
        dropout: before the classifier, in training.
        skips: blocks add their input where shapes allow.
        closes: blocks without expansion have an activation behind their 1x1 convolution.
    """

    least_size = 1

    def __init__(
        self,
        stages: Iterable[Stage],
        style: Style,
        *,
        stem_channels: int,
        head_channels: int | None,
        num_classes: int,
        in_chans: int,
        dropout: float,
        skips: bool = True,
        closes: bool = False,
    ) -> None:
        super().__init__()
        channels = stem_channels
        self.conv_stem = style.conv(in_chans, channels, 3, 2)
        self.bn1 = style.norm(channels)
        self.act = style.activation()
        blocks = []
        for stage in stages:
            row = []
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                has_skip = skips and stride == 1 and channels == stage.channels
                if stage.expansion == 1:
                    row.append(DepthwiseSeparable(channels, stage, stride, style, has_skip, closes))
                else:
                    row.append(InvertedResidual(channels, stage, stride, style, has_skip))
                channels = stage.channels
            blocks.append(FusedSequential(*row))
        self.blocks = FusedSequential(*blocks)
        if head_channels is not None:
            self.conv_head = PointwiseConv2d(channels, head_channels, bias=False)
            self.bn2 = style.norm(head_channels)
            channels = head_channels
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        efficientnet_init(self)

    def links(self) -> Links:
        head = [self.conv_head, self.bn2, self.act] if "conv_head" in self._modules else []
        return Links([self.conv_stem, self.bn1, self.act, self.blocks, *head])

    def outline(self) -> Outline:
        return Outline(["conv_stem", "bn1", "act", *(f"blocks.{i}" for i in range(len(self.blocks)))])

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return self.classifier(self.dropout(super().forward(x).mean((2, 3))))


@known
class DepthwiseSeparable(Chained):
    """A depthwise and a 1x1 convolution."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, style: Style, has_skip: bool, closes: bool) -> None:
        super().__init__()
        self.conv_dw = style.conv(in_channels, in_channels, stage.kernel_size, stride, in_channels)
        self.bn1 = style.norm(in_channels)
        self.act = style.activation()
        self.conv_pw = PointwiseConv2d(in_channels, stage.channels, bias=False)
        self.bn2 = style.norm(stage.channels)
        self.has_skip, self.closes = has_skip, closes

    def links(self) -> Links:
        closing = [self.act] if self.closes else []
        return Links([self.conv_dw, self.bn1, self.act, self.conv_pw, self.bn2, *closing], self.has_skip)


@known
class InvertedResidual(Chained):
    """`mobilenet_fast.nn.InvertedResidual` under the keys of these networks."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, style: Style, has_skip: bool) -> None:
        super().__init__()
        expanded = in_channels * stage.expansion
        self.conv_pw = PointwiseConv2d(in_channels, expanded, bias=False)
        self.bn1 = style.norm(expanded)
        self.conv_dw = style.conv(expanded, expanded, stage.kernel_size, stride, expanded)
        self.bn2 = style.norm(expanded)
        self.act = style.activation()
        if stage.squeeze_ratio > 0:
            self.se = SqueezeExcite(expanded, round(in_channels * stage.squeeze_ratio), style.activation)
        self.conv_pwl = PointwiseConv2d(expanded, stage.channels, bias=False)
        self.bn3 = style.norm(stage.channels)
        self.has_skip = has_skip

    def links(self) -> Links:
        gate = [self.se] if "se" in self._modules else []
        expansion = [self.conv_pw, self.bn1, self.act]
        return Links([*expansion, self.conv_dw, self.bn2, self.act, *gate, self.conv_pwl, self.bn3], self.has_skip)


@known
class SqueezeExcite(SqueezeExcitation):
    """`mobilenet_fast.nn.SqueezeExcitation` with timm's names."""

    part_names = ("conv_reduce", "act1", "conv_expand", "gate")

    def __init__(self, channels: int, squeeze_channels: int, activation: Callable[[], nn.Module]) -> None:
        nn.Module.__init__(self)
        self.conv_reduce = nn.Conv2d(channels, squeeze_channels, 1)
        self.act1 = activation()
        self.conv_expand = nn.Conv2d(squeeze_channels, channels, 1)
        self.gate = nn.Sigmoid()

    def pools_plainly(self) -> bool:
        return True

    def plain_forward(self, input: Tensor) -> Tensor:
        squeezed = self.act1(self.conv_reduce(input.mean((2, 3), keepdim=True)))
        return input * self.gate(self.conv_expand(squeezed))
