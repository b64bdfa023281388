"""MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381), table 2, with torchvision's state_dict keys."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import ConvNormAct, FusedSequential, PointwiseConv2d
from ..nn.dispatch import known
from ..nn.fusion import Chained, Links
from .features import Outline
from .initialisation import mobilenet_init
from .registry import Weights, load_weights, register_model
from .rounding import make_divisible
from .sizes import check_size

# Expansion factor, channels, blocks, stride of the first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@register_model
def mobilenet_v2(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.2,
) -> MobileNetV2:
    """`torchvision.models.mobilenet_v2`: the same network with the same state_dict keys.

    Args:
        weights: None, a state_dict, or the path of one; torchvision's checkpoints fit.
        num_classes: logits a picture.
        in_chans: channels of the input.
        width_mult: factor on the number of channels.
        dropout: before the classifier, in training.

    Raises:
        ValueError: ``weights`` is no file.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(MobileNetV2(num_classes, in_chans, width_mult, dropout), weights)


class MobileNetV2(nn.Module):
    """See `mobilenet_v2`. (N, in_chans, H, W) → (N, num_classes)."""

    least_size = 1

    def __init__(self, num_classes: int, in_chans: int, width_mult: float, dropout: float) -> None:
        super().__init__()
        channels = make_divisible(32 * width_mult)
        self.last_channel = make_divisible(1280 * max(1.0, width_mult))
        features: list[nn.Module] = [ConvNormAct(in_chans, channels, stride=2, activation_layer="relu6")]
        for expansion, width, blocks, stride in _STAGES:
            out_channels = make_divisible(width * width_mult)
            for i in range(blocks):
                features.append(InvertedResidual(channels, out_channels, expansion, stride if i == 0 else 1))
                channels = out_channels
        features.append(ConvNormAct(channels, self.last_channel, 1, activation_layer="relu6"))
        self.features = FusedSequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.last_channel, num_classes))
        mobilenet_init(self)

    def outline(self) -> Outline:
        return Outline([f"features.{i}" for i in range(len(self.features) - 1)])

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return self.classifier(nn.functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


@known
class InvertedResidual(Chained):
    """`mobilenet_fast.nn.InvertedResidual` without squeeze-and-excitation, under the keys of this network."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        expanded = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormAct(in_channels, expanded, 1, activation_layer="relu6"))
        layers += [
            ConvNormAct(expanded, expanded, stride=stride, groups=expanded, activation_layer="relu6"),
            PointwiseConv2d(expanded, out_channels, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = FusedSequential(*layers)
        self.use_res_connect = stride == 1 and in_channels == out_channels

    def links(self) -> Links:
        return Links([self.conv], self.use_res_connect)
