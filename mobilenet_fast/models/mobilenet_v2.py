"""MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381), table 2, with torchvision's state_dict keys."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from ..nn import ConvNormAct, FusedSequential
from ..nn.dispatch import known
from ..nn.fusion import Chained, Links
from .features import Outline
from .initialisation import mobilenet_init
from .pretrained import named_weights, torchvision
from .registry import Weights, load_weights, register_model
from .rounding import make_divisible
from .sizes import check_size
from .tensorflow import TENSORFLOW_NORM

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
@named_weights(torchvision(mobilenet_v2=("IMAGENET1K_V1", "IMAGENET1K_V2")))
def mobilenet_v2(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.2,
    same_padding: bool = False,
) -> MobileNetV2:
    """`torchvision.models.mobilenet_v2`: the same network with the same state_dict keys.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; torchvision's checkpoints fit.
        num_classes: logits a picture.
        in_chans: channels of the input.
        width_mult: factor on the number of channels.
        dropout: before the classifier, in training.
        same_padding: pad as TensorFlow does, and batch norm with eps 1e-3, for weights from there (`from_keras`).

    Raises:
        ValueError: ``weights`` is neither a file nor a name.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(MobileNetV2(num_classes, in_chans, width_mult, dropout, same_padding), weights)


class MobileNetV2(nn.Module):
    """See `mobilenet_v2`. (N, in_chans, H, W) → (N, num_classes)."""

    least_size = 1

    def __init__(
        self, num_classes: int, in_chans: int, width_mult: float, dropout: float, same_padding: bool = False
    ) -> None:
        super().__init__()
        layer = functools.partial(ConvNormAct, activation_layer="relu6")
        if same_padding:
            layer = functools.partial(layer, padding="same", norm_layer=TENSORFLOW_NORM)
        channels = make_divisible(32 * width_mult)
        self.last_channel = make_divisible(1280 * max(1.0, width_mult))
        features: list[nn.Module] = [layer(in_chans, channels, stride=2)]
        for expansion, width, blocks, stride in _STAGES:
            out_channels = make_divisible(width * width_mult)
            for i in range(blocks):
                features.append(InvertedResidual(channels, out_channels, expansion, stride if i == 0 else 1, layer))
                channels = out_channels
        features.append(layer(channels, self.last_channel, 1))
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

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, stride: int, layer: Callable[..., ConvNormAct]
    ) -> None:
        super().__init__()
        expanded = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(layer(in_channels, expanded, 1))
        layers += [
            layer(expanded, expanded, stride=stride, groups=expanded),
            *layer(expanded, out_channels, 1, activation_layer=None),
        ]
        self.conv = FusedSequential(*layers)
        self.use_res_connect = stride == 1 and in_channels == out_channels

    def links(self) -> Links:
        return Links([self.conv], self.use_res_connect)
