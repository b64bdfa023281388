"""MobileNetV1 (Howard et al., 2017, arXiv:1704.04861), table 1, with timm's state_dict keys."""

from __future__ import annotations

import functools

from ..nn.dispatch import activation_layer
from .registry import Weights, load_weights, register_model
from .rounding import make_divisible
from .timm_blocks import Stage, Style, Trunk

_STAGES = (
    Stage(1, 3, 1, 1, 64),
    Stage(2, 3, 2, 1, 128),
    Stage(2, 3, 2, 1, 256),
    Stage(6, 3, 2, 1, 512),
    Stage(2, 3, 2, 1, 1024),
)


@register_model
def mobilenet_v1(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width_mult: float = 1.0,
    activation: str = "relu6",
    dropout: float = 0.2,
) -> MobileNetV1:
    """timm's ``mobilenetv1_100``: the same network with the same state_dict keys.

    The paper's resolution multiplier ρ is the size of the pictures: 224 · ρ.

    Args:
        weights: None, a state_dict, or the path of one; timm's checkpoints fit.
        num_classes: logits a picture.
        in_chans: channels of the input.
        width_mult: the paper's α, a factor on the number of channels.
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid"; the paper's is "relu".
        dropout: before the classifier, in training.

    Raises:
        ValueError: ``weights`` is no file, or there is no such activation.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(MobileNetV1(num_classes, in_chans, width_mult, activation, dropout), weights)


class MobileNetV1(Trunk):
    """See `mobilenet_v1`. (N, in_chans, H, W) → (N, num_classes)."""

    def __init__(self, num_classes: int, in_chans: int, width_mult: float, activation: str, dropout: float) -> None:
        layer = activation_layer("mobilenet_v1", "activation", activation)
        super().__init__(
            [stage._replace(channels=make_divisible(stage.channels * width_mult)) for stage in _STAGES],
            Style(layer if activation == "sigmoid" else functools.partial(layer, inplace=True)),
            stem_channels=make_divisible(32 * width_mult),
            head_channels=None,
            num_classes=num_classes,
            in_chans=in_chans,
            dropout=dropout,
            skips=False,
            closes=True,
        )
