"""EfficientNet (Tan and Le, 2019, arXiv:1905.11946), table 1, scaled in width, depth and resolution by its section 3,
with torchvision's state_dict keys."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor, nn

from ..nn import ConvNormAct, FusedSequential, SqueezeExcitation, StochasticDepth
from ..nn.dispatch import known, unhooked
from ..nn.fusion import Chained, Links
from .features import Outline
from .initialisation import efficientnet_init
from .pretrained import named_weights, timm, torchvision
from .registry import Weights, load_weights, register_model
from .rounding import make_divisible
from .sizes import check_size
from .tensorflow import TENSORFLOW_NORM
from .timm_keys import efficientnet_keys

# Expansion factor, kernel size, stride of the first block, channels, blocks.
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
# Width, depth, resolution and dropout of B0, B1, …
_SCALES = (
    (1.0, 1.0, 224, 0.2),
    (1.0, 1.1, 240, 0.2),
    (1.1, 1.2, 288, 0.3),
    (1.2, 1.4, 300, 0.3),
    (1.4, 1.8, 380, 0.4),
    (1.6, 2.2, 456, 0.4),
    (1.8, 2.6, 528, 0.5),
    (2.0, 3.1, 600, 0.5),
)
# timm's tags for what came from TensorFlow, B0 first.
_TAGS = (
    *[("ns_jft_in1k", "ap_in1k", "aa_in1k", "in1k")] * 5,
    ("ns_jft_in1k", "ap_in1k", "ra_in1k", "aa_in1k", "in1k"),
    ("ns_jft_in1k", "ap_in1k", "aa_in1k"),
    ("ns_jft_in1k", "ap_in1k", "ra_in1k", "aa_in1k"),
)


@register_model
def efficientnet(
    width: float = 1.0,
    depth: float = 1.0,
    resolution: int = 224,
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    dropout: float = 0.2,
    stochastic_depth: float = 0.2,
    same_padding: bool = False,
) -> EfficientNet:
    """An EfficientNet of one's own width, depth and resolution.

    Args:
        width: factor on the number of channels.
        depth: factor on the number of blocks of each stage.
        resolution: height and width of the pictures it is meant for, in pixels. It takes any; this one is kept as the
            attribute ``resolution``.
        weights: None, a state_dict, or the path of one.
        num_classes: logits a picture.
        in_chans: channels of the input.
        dropout: before the classifier, in training.
        stochastic_depth: how often the last block is left out in training; those before it in proportion.
        same_padding: pad as TensorFlow does, and batch norm with eps 1e-3, for weights from there (`from_keras`).

    Raises:
        ValueError: ``weights`` is no file.
        RuntimeError: ``weights`` are another model's.
    """
    norm = TENSORFLOW_NORM if same_padding else nn.BatchNorm2d
    model = EfficientNet(width, depth, resolution, num_classes, in_chans, dropout, stochastic_depth, norm, same_padding)
    return load_weights(model, weights, efficientnet_keys)


def _register_scaled(number: int, width: float, depth: float, resolution: int, dropout: float) -> Callable:
    norms = ", and TensorFlow's batch norm: eps 1e-3, momentum 0.01" if number >= 5 else ""

    def build(weights: Weights | None = None, *, same_padding: bool = False, **kwargs) -> EfficientNet:
        arguments = {"num_classes": 1000, "in_chans": 3, "dropout": dropout, "stochastic_depth": 0.2} | kwargs
        norm = TENSORFLOW_NORM if same_padding or number >= 5 else nn.BatchNorm2d
        model = EfficientNet(width, depth, resolution, norm=norm, same_padding=same_padding, **arguments)
        return load_weights(model, weights, efficientnet_keys)

    build.__name__ = build.__qualname__ = f"efficientnet_b{number}"
    build.__doc__ = f"""`torchvision.models.efficientnet_b{number}`: the same network with the same state_dict keys.

    `efficientnet` with width {width}, depth {depth} and resolution {resolution}{norms}.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; torchvision's checkpoints fit, and
            timm's ``tf_efficientnet_b{number}`` with ``same_padding``.
        **kwargs: ``num_classes`` (1000), ``in_chans`` (3), ``dropout`` ({dropout}), ``stochastic_depth`` (0.2),
            ``same_padding`` (False), as `efficientnet` takes them.

    Raises:
        ValueError: ``weights`` is neither a file nor a name.
        RuntimeError: ``weights`` are another model's.
    """
    names = ("IMAGENET1K_V1", "IMAGENET1K_V2") if number == 1 else ("IMAGENET1K_V1",)
    plain = torchvision(**{f"efficientnet_b{number}": names})
    same_padded = timm(**{f"tf_efficientnet_b{number}": _TAGS[number]})
    return register_model(named_weights(plain, same_padded)(build))


class EfficientNet(nn.Module):
    """See `efficientnet`. (N, in_chans, H, W) → (N, num_classes)."""

    least_size = 1

    def __init__(
        self,
        width: float,
        depth: float,
        resolution: int,
        num_classes: int,
        in_chans: int,
        dropout: float,
        stochastic_depth: float,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        same_padding: bool = False,
    ) -> None:
        if not (0 < depth < math.inf and 0 < resolution < math.inf and 0 <= stochastic_depth < 1):
            raise ValueError(
                "efficientnet: depth and resolution must be positive, stochastic_depth at least 0 and less than 1, got "
                f"{depth}, {resolution}, {stochastic_depth}"
            )
        super().__init__()
        self.resolution = resolution
        layer = functools.partial(ConvNormAct, norm_layer=norm, padding="same" if same_padding else None)
        channels = make_divisible(32 * width)
        stages: list[nn.Module] = [layer(in_chans, channels, stride=2, activation_layer="silu")]
        repeats = [math.ceil(blocks * depth) for *_, blocks in _STAGES]
        number = 0
        for (expansion, kernel_size, stride, out_channels, _), blocks in zip(_STAGES, repeats, strict=True):
            out_channels = make_divisible(out_channels * width)
            stage = []
            for i in range(blocks):
                drop = stochastic_depth * number / sum(repeats)
                stage.append(
                    MBConv(channels, out_channels, expansion, kernel_size, stride if i == 0 else 1, drop, layer)
                )
                channels = out_channels
                number += 1
            stages.append(FusedSequential(*stage))
        stages.append(layer(channels, 4 * channels, 1, activation_layer="silu"))
        self.features = FusedSequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), nn.Linear(4 * channels, num_classes))
        efficientnet_init(self, per_group=False)

    def outline(self) -> Outline:
        return Outline([f"features.{i}" for i in range(len(self.features) - 1)])

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


@known
class MBConv(Chained):
    """`mobilenet_fast.nn.InvertedResidual` with SiLU, a gate from a quarter of the block's input channels, and
    stochastic depth."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        kernel_size: int,
        stride: int,
        drop: float,
        layer: Callable[..., ConvNormAct],
    ) -> None:
        super().__init__()
        expanded = make_divisible(in_channels * expansion)
        layers: list[nn.Module] = []
        if expanded != in_channels:
            layers.append(layer(in_channels, expanded, 1, activation_layer="silu"))
        squeeze_channels = max(1, in_channels // 4)
        layers += [
            layer(expanded, expanded, kernel_size, stride, groups=expanded, activation_layer="silu"),
            SqueezeExcitation(expanded, squeeze_channels, functools.partial(nn.SiLU, inplace=True), nn.Sigmoid),
            layer(expanded, out_channels, 1, activation_layer=None),
        ]
        self.block = FusedSequential(*layers)
        self.stochastic_depth = StochasticDepth(drop)
        self.use_res_connect = stride == 1 and in_channels == out_channels

    def links(self) -> Links | None:
        drop = self.stochastic_depth
        runs = not unhooked(drop) or (drop.training and drop.p > 0)
        return None if runs and self.use_res_connect else Links([self.block], self.use_res_connect)

    def plain_forward(self, input: Tensor) -> Tensor:
        y = self.block(input)
        return self.stochastic_depth(y) + input if self.use_res_connect else y


efficientnet_b0, efficientnet_b1, efficientnet_b2, efficientnet_b3 = (
    _register_scaled(i, *_SCALES[i]) for i in range(4)
)
efficientnet_b4, efficientnet_b5, efficientnet_b6, efficientnet_b7 = (
    _register_scaled(i, *_SCALES[i]) for i in range(4, 8)
)
