"""MobileNetV3 (Howard et al., 2019, arXiv:1905.02244), tables 1 and 2, with torchvision's state_dict keys."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..nn import ConvNormAct, FusedSequential, InvertedResidual
from ..nn.dispatch import ACTIVATION_LAYERS
from .features import Outline
from .initialisation import mobilenet_init
from .pretrained import named_weights, timm, torchvision
from .registry import Weights, load_weights, register_model
from .rounding import make_divisible
from .sizes import check_size
from .timm_keys import mobilenet_v3_keys


class _Block(NamedTuple):
    kernel_size: int
    expanded_channels: int
    out_channels: int
    squeezes: bool
    activation: str
    stride: int


_LARGE = (
    _Block(3, 16, 16, False, "relu", 1),
    _Block(3, 64, 24, False, "relu", 2),
    _Block(3, 72, 24, False, "relu", 1),
    _Block(5, 72, 40, True, "relu", 2),
    _Block(5, 120, 40, True, "relu", 1),
    _Block(5, 120, 40, True, "relu", 1),
    _Block(3, 240, 80, False, "hardswish", 2),
    _Block(3, 200, 80, False, "hardswish", 1),
    _Block(3, 184, 80, False, "hardswish", 1),
    _Block(3, 184, 80, False, "hardswish", 1),
    _Block(3, 480, 112, True, "hardswish", 1),
    _Block(3, 672, 112, True, "hardswish", 1),
    _Block(5, 672, 160, True, "hardswish", 2),
    _Block(5, 960, 160, True, "hardswish", 1),
    _Block(5, 960, 160, True, "hardswish", 1),
)

_SMALL = (
    _Block(3, 16, 16, True, "relu", 2),
    _Block(3, 72, 24, False, "relu", 2),
    _Block(3, 88, 24, False, "relu", 1),
    _Block(5, 96, 40, True, "hardswish", 2),
    _Block(5, 240, 40, True, "hardswish", 1),
    _Block(5, 240, 40, True, "hardswish", 1),
    _Block(5, 120, 48, True, "hardswish", 1),
    _Block(5, 144, 48, True, "hardswish", 1),
    _Block(5, 288, 96, True, "hardswish", 2),
    _Block(5, 576, 96, True, "hardswish", 1),
    _Block(5, 576, 96, True, "hardswish", 1),
)

# The blocks at the lowest resolution, which reduced_tail makes narrower and dilated keeps at twice the resolution.
_TAIL = 3


@register_model
@named_weights(
    torchvision(mobilenet_v3_large=("IMAGENET1K_V1", "IMAGENET1K_V2")),
    timm(tf_mobilenetv3_large_100=("in1k",), tf_mobilenetv3_large_minimal_100=("in1k",)),
)
def mobilenet_v3_large(weights: Weights | None = None, **kwargs) -> MobileNetV3:
    """`torchvision.models.mobilenet_v3_large`: the same network with the same state_dict keys.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; torchvision's checkpoints fit, and
            timm's ``tf_mobilenetv3_large_100`` with ``same_padding``, and its ``tf_mobilenetv3_large_minimal_100`` with
            ``minimalistic`` too.
        **kwargs: see `MobileNetV3`.

    Raises:
        ValueError: ``weights`` is neither a file nor a name.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(MobileNetV3(_LARGE, 1280, **kwargs), weights, mobilenet_v3_keys)


@register_model
@named_weights(
    torchvision(mobilenet_v3_small=("IMAGENET1K_V1",)),
    timm(tf_mobilenetv3_small_100=("in1k",), tf_mobilenetv3_small_minimal_100=("in1k",)),
)
def mobilenet_v3_small(weights: Weights | None = None, **kwargs) -> MobileNetV3:
    """`torchvision.models.mobilenet_v3_small`: the same network with the same state_dict keys.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; torchvision's checkpoints fit, and
            timm's ``tf_mobilenetv3_small_100`` with ``same_padding``, and its ``tf_mobilenetv3_small_minimal_100`` with
            ``minimalistic`` too.
        **kwargs: see `MobileNetV3`.

    Raises:
        ValueError: ``weights`` is neither a file nor a name.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(MobileNetV3(_SMALL, 1024, **kwargs), weights, mobilenet_v3_keys)


class MobileNetV3(nn.Module):
    """(N, in_chans, H, W) → (N, num_classes).

    The arguments from ``stem_channels`` to ``squeeze_excite`` make the networks that the paper compares its own with,
    and leave keys and numbers as they are by default.

    Args:
        blocks: the rows of the paper's table.
        last_channels: of the classifier's hidden layer.
        num_classes: logits a picture.
        in_chans: channels of the input.
        width_mult: factor on the number of channels.
        reduced_tail: halve the channels from the last stride on.
        dilated: dilate the convolutions behind the last stride instead of striding, for dense prediction.
        dropout: before the classifier, in training.
        minimalistic: without squeeze-and-excitation and hardswish, and with kernels of 3x3 alone, as the authors'
            "minimalistic" checkpoints.
        stem_channels: 16 with hardswish, or 32 with ReLU, both filters and nonlinearity of section 5.1. The first
            block does not expand, and is as wide as the stem.
        efficient_last_stage: pool before the layer of ``last_channels``. If False, the original last stage of section
            5.1 and figure 5: one more block, to twice the channels, and that layer as a 1x1 convolution behind it.
        hardswish_from: N of table 5's "h-swish @N": a layer, stem and classifier among them, has hardswish if the
            paper's table gives it at least N output channels, and ReLU if fewer; 16 has hardswish everywhere,
            ``math.inf`` nowhere. None is as the paper's table: in the stem, and from 80 channels on (Large) or 40
            (Small).
        squeeze_excite: where the paper's table has it (section 5.3); False leaves it out everywhere.
        same_padding: pad as TensorFlow does, for weights from there.

    Raises:
        ValueError: ``stem_channels`` is another number, or ``hardswish_from`` is given for a minimalistic network.
    """

    least_size = 1

    def __init__(
        self,
        blocks: Sequence[_Block],
        last_channels: int,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width_mult: float = 1.0,
        reduced_tail: bool = False,
        dilated: bool = False,
        dropout: float = 0.2,
        minimalistic: bool = False,
        stem_channels: int = 16,
        efficient_last_stage: bool = True,
        hardswish_from: float | None = None,
        squeeze_excite: bool = True,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        if stem_channels not in (16, 32):
            raise ValueError(f"mobilenet_v3: stem_channels must be 16 or 32, got {stem_channels}")
        if minimalistic:
            if hardswish_from is not None:
                raise ValueError(f"mobilenet_v3: minimalistic has no hardswish, got hardswish_from={hardswish_from}")
            blocks = [block._replace(kernel_size=3, squeezes=False) for block in blocks]
            hardswish_from = math.inf
        elif not isinstance(hardswish_from, (numbers.Real, type(None))):
            raise TypeError(f"mobilenet_v3: hardswish_from must be a number, got {type(hardswish_from).__name__}")

        if not squeeze_excite:
            blocks = [block._replace(squeezes=False) for block in blocks]

        def activation(out_channels: int, default: str = "hardswish") -> str:
            """Of a layer with so many channels in the paper's table, and this activation there."""
            if hardswish_from is None:
                return default
            return "hardswish" if out_channels >= hardswish_from else "relu"

        self.efficient_last_stage = efficient_last_stage
        stem_activation = activation(stem_channels, "hardswish" if stem_channels == 16 else "relu")
        head_activation = activation(last_channels)
        norm_layer = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        padding = "same" if same_padding else None
        last_channels //= 2 if reduced_tail else 1

        channels = make_divisible(stem_channels * width_mult)
        features: list[nn.Module] = [
            ConvNormAct(
                in_chans, channels, stride=2, padding=padding, norm_layer=norm_layer, activation_layer=stem_activation
            )
        ]
        for i, block in enumerate(blocks):
            from_end = len(blocks) - i
            # The tail's first block takes what the block before it gives, at its full width.
            expanded = block.expanded_channels // (2 if reduced_tail and from_end < _TAIL else 1)
            out_channels = block.out_channels // (2 if reduced_tail and from_end <= _TAIL else 1)
            expanded = make_divisible(expanded * width_mult) if i > 0 else channels
            out_channels = make_divisible(out_channels * width_mult)
            features.append(
                InvertedResidual(
                    channels,
                    expanded,
                    out_channels,
                    block.kernel_size,
                    block.stride,
                    2 if dilated and from_end <= _TAIL else 1,
                    make_divisible(expanded // 4) if block.squeezes else None,
                    activation(block.out_channels, block.activation),
                    norm_layer,
                    padding,
                )
            )
            channels = out_channels
        expanded, hidden = 6 * channels, make_divisible(last_channels * width_mult)
        last_layers: list[nn.Module] = []
        if efficient_last_stage:
            layer = activation(6 * blocks[-1].out_channels)
            features.append(ConvNormAct(channels, expanded, 1, norm_layer=norm_layer, activation_layer=layer))
            last_layers = [nn.Linear(expanded, hidden), ACTIVATION_LAYERS[head_activation](inplace=True)]
        else:
            layer, dilation = activation(2 * blocks[-1].out_channels), 2 if dilated else 1
            features += [
                InvertedResidual(channels, expanded, 2 * channels, 3, 1, dilation, None, layer, norm_layer),
                ConvNormAct(2 * channels, hidden, 1, norm_layer=norm_layer, activation_layer=head_activation),
            ]
        self.features = FusedSequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(*last_layers, nn.Dropout(dropout), nn.Linear(hidden, num_classes))
        mobilenet_init(self)

    def outline(self) -> Outline:
        # The efficient last stage leaves no layer of the head before the pooling.
        count = len(self.features) - (0 if self.efficient_last_stage else 1)
        return Outline([f"features.{i}" for i in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
