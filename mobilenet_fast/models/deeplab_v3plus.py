"""DeepLabv3+ on the modified aligned Xception (Chen et al., 2018, arXiv:1802.02611), figures 2 and 4.

Where the paper leaves a choice: the output stride is 16, so that the exit flow's stride is 1 and what follows is
dilated by 2. Modules start with a ReLU, as Xception's, and end without one, before the sum. The decoder's low-level
features are those of the entry flow's first module, the last at stride 4, behind a ReLU.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ConvNormAct, FusedSequential, PointwiseConv2d
from .features import Outline, Run
from .initialisation import mobilenet_init
from .registry import Weights, load_weights, register_model
from .sizes import check_size

# The channels of each module's convolutions, and the stride of its last one.
_MODULES = (
    ((128, 128, 128), 2),
    ((256, 256, 256), 2),
    ((728, 728, 728), 2),
    *[((728, 728, 728), 1)] * 16,
    ((728, 1024, 1024), 1),
)
_EXIT = (1536, 1536, 2048)
_RATES = (6, 12, 18)
_LOW = 3  # modules of the encoder before the low-level features: two convolutions and a module


@functools.partial(register_model, task="segmentation")
def deeplab_v3plus_xception(
    weights: Weights | None = None, *, num_classes: int = 21, in_chans: int = 3, dropout: float = 0.1
) -> DeepLabV3Plus:
    """DeepLabv3+ on Xception-65, with output stride 16.

    Args:
        weights: None, a state_dict, or the path of one. The keys are this package's own.
        num_classes: logits a pixel.
        in_chans: channels of the input.
        dropout: behind the pyramid, in training.

    Raises:
        ValueError: ``weights`` is no file.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(DeepLabV3Plus(num_classes, in_chans, dropout), weights)


class DeepLabV3Plus(nn.Module):
    """See `deeplab_v3plus_xception`. (N, in_chans, H, W) → {"out": (N, num_classes, H, W)}."""

    least_size = 1

    def __init__(self, num_classes: int, in_chans: int, dropout: float) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {"conv1": ConvNormAct(in_chans, 32, 3, 2), "conv2": ConvNormAct(32, 64, 3)}
        channels = 64
        for i, (widths, stride) in enumerate(_MODULES):
            parts[f"block{i + 1}"] = Block(channels, widths, stride)
            channels = widths[-1]
        for i, width in enumerate(_EXIT):
            parts[f"conv{i + 3}"] = FusedSequential(*_separable(channels, width, dilation=2))
            channels = width
        self.encoder = FusedSequential(OrderedDict(parts))
        self.pyramid = Pyramid(channels, 256, _RATES)
        self.dropout = nn.Dropout(dropout)
        self.decoder = Decoder(_MODULES[0][0][-1], 256, num_classes)
        mobilenet_init(self)
        names = self.outline().names
        self.runs = Run(self, names[:_LOW]), Run(self, names[_LOW:])

    def outline(self) -> Outline:
        return Outline([f"encoder.{name}" for name, _ in self.encoder.named_children()], behind=F.relu)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        check_size(self, x)
        to_low, to_high = self.runs
        low = to_low(x)
        out = self.decoder(F.relu(low), self.dropout(self.pyramid(to_high(low))))
        return {"out": F.interpolate(out, x.shape[-2:], mode="bilinear", align_corners=False)}


class Block(nn.Module):
    """A module of the paper's figure 4: three separable convolutions, each behind a ReLU, plus the input, through a
    1x1 convolution where it changes. (N, C, H, W) → (N, K, ⌈H / stride⌉, ⌈W / stride⌉)."""

    def __init__(self, in_channels: int, widths: Sequence[int], stride: int) -> None:
        super().__init__()
        layers, channels = [], in_channels
        for i, width in enumerate(widths):
            last_stride = stride if i == len(widths) - 1 else 1
            layers += [
                nn.ReLU(inplace=i > 0),  # the first one's input is the shortcut's too
                ConvNormAct(channels, channels, 3, last_stride, groups=channels),
                ConvNormAct(channels, width, 1, activation_layer=None),
            ]
            channels = width
        self.layers = FusedSequential(*layers)
        if stride > 1 or channels != in_channels:
            self.shortcut = ConvNormAct(in_channels, channels, 1, stride, activation_layer=None)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shortcut(x)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling, section 3.1, with separable convolutions. (N, C, H, W) → (N, K, H, W)."""

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.pointwise = ConvNormAct(in_channels, channels, 1)
        self.atrous = nn.ModuleList(
            FusedSequential(*_separable(in_channels, channels, dilation=rate)) for rate in rates
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvNormAct(in_channels, channels, 1))
        self.project = ConvNormAct((2 + len(rates)) * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.interpolate(self.pooled(x), x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([self.pointwise(x), *(branch(x) for branch in self.atrous), pooled], 1))


class Decoder(nn.Module):
    """Section 3.1: 48 channels of low-level features beside the encoder's, and two separable convolutions.
    (N, low_channels, h, w) and (N, channels, h', w') → (N, num_classes, h, w)."""

    def __init__(self, low_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(low_channels, 48, 1)
        self.refine = FusedSequential(*_separable(48 + channels, channels), *_separable(channels, channels))
        self.classifier = PointwiseConv2d(channels, num_classes)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        high = F.interpolate(high, low.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.refine(torch.cat([self.reduce(low), high], 1)))


def _separable(in_channels: int, out_channels: int, dilation: int = 1) -> list[nn.Module]:
    """Depthwise 3x3 and 1x1 convolution, each with batch norm and ReLU."""
    return [
        ConvNormAct(in_channels, in_channels, 3, groups=in_channels, dilation=dilation),
        ConvNormAct(in_channels, out_channels, 1),
    ]
