"""MobileNetV1 (Howard et al., 2017, arXiv:1704.04861), table 1, with timm's state_dict keys."""

from __future__ import annotations

import functools
import math
import numbers

from torch import nn

from ..nn.dispatch import activation_layer
from .pretrained import named_weights, timm
from .registry import Weights, load_weights, register_model
from .rounding import make_divisible
from .tensorflow import TENSORFLOW_NORM
from .timm_blocks import Stage, Style, Trunk

_STAGES = (
    Stage(1, 3, 1, 1, 64),
    Stage(2, 3, 2, 1, 128),
    Stage(2, 3, 2, 1, 256),
    Stage(6, 3, 2, 1, 512),
    Stage(2, 3, 2, 1, 1024),
)


@register_model
@named_weights(timm(mobilenetv1_100=("ra4_e3600_r224_in1k",), mobilenetv1_125=("ra4_e3600_r224_in1k",)))
def mobilenet_v1(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width_mult: float = 1.0,
    activation: str = "relu6",
    resolution_mult: float = 1.0,
    dropout: float = 0.0,
    same_padding: bool | str = False,
) -> MobileNetV1:
    """timm's ``mobilenetv1_100``: the same network with the same state_dict keys.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; timm's checkpoints fit.
        num_classes: logits a picture.
        in_chans: channels of the input.
        width_mult: the paper's α, a factor on the number of channels.
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid"; the paper's is "relu".
        resolution_mult: the paper's ρ: the model is for pictures of 224 · ρ pixels across, its attribute
            ``resolution``; it takes others as well.
        dropout: before the classifier, in training.
        same_padding: pad as TensorFlow does, and batch norm with eps 1e-3, for weights from there; "keras" to pad as
            Keras's MobileNet does, which is the same for sizes that 32 divides (see `from_keras`).

    Raises:
        ValueError: ``weights`` is neither a file nor a name, there is no such activation or ``same_padding``, or
            ``resolution_mult`` is not positive.
        RuntimeError: ``weights`` are another model's.
    """
    if not isinstance(resolution_mult, numbers.Real):
        raise TypeError(f"mobilenet_v1: resolution_mult must be a number, got {type(resolution_mult).__name__}")
    if not 0 < resolution_mult < math.inf:
        raise ValueError(f"mobilenet_v1: resolution_mult must be positive, got {resolution_mult}")
    model = MobileNetV1(num_classes, in_chans, width_mult, activation, dropout, same_padding)
    model.resolution = max(1, round(224 * resolution_mult))
    return load_weights(model, weights)


class MobileNetV1(Trunk):
    """See `mobilenet_v1`. (N, in_chans, H, W) → (N, num_classes); H and W at least 31 with ``same_padding="keras"``."""

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        width_mult: float,
        activation: str,
        dropout: float,
        same_padding: bool | str = False,
    ) -> None:
        if same_padding not in (False, True, "keras"):
            raise ValueError(f'mobilenet_v1: same_padding must be False, True or "keras", got {same_padding!r}')
        layer = activation_layer("mobilenet_v1", "activation", activation)
        super().__init__(
            [stage._replace(channels=make_divisible(stage.channels * width_mult)) for stage in _STAGES],
            Style(
                layer if activation == "sigmoid" else functools.partial(layer, inplace=True),
                TENSORFLOW_NORM if same_padding else nn.BatchNorm2d,
                same_padding,
            ),
            stem_channels=make_divisible(32 * width_mult),
            head_channels=None,
            num_classes=num_classes,
            in_chans=in_chans,
            dropout=dropout,
            skips=False,
            closes=True,
        )
        if same_padding == "keras":
            self.least_size = 31  # others leave nothing for the last stride
