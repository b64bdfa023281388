"""MnasNet (Tan et al., 2019, arXiv:1807.11626): A1, figure 7, with timm's state_dict keys, and B1, the same search
without squeeze-and-excitation, with torchvision's."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from ..nn import DepthwiseConv2d, FusedSequential, PointwiseConv2d
from ..nn.dispatch import known
from ..nn.fusion import Chained, Links
from .features import Outline
from .initialisation import mnasnet_init
from .pretrained import named_weights, timm, torchvision
from .registry import Weights, load_weights, register_model
from .rounding import make_divisible
from .sizes import check_size
from .timm_blocks import Stage, Style, Trunk

_A1 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(3, 5, 2, 3, 40, 0.25),
    Stage(4, 3, 2, 6, 80),
    Stage(2, 3, 1, 6, 112, 0.25),
    Stage(3, 5, 2, 6, 160, 0.25),
    Stage(1, 3, 1, 6, 320),
)
_B1 = (
    Stage(3, 3, 2, 3, 24),
    Stage(3, 5, 2, 3, 40),
    Stage(3, 5, 2, 6, 80),
    Stage(2, 3, 1, 6, 96),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
_HEAD = 1280


@register_model
@named_weights(timm(semnasnet_100=("rmsp_in1k",), semnasnet_075=("rmsp_in1k",)))
def mnasnet_a1(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.0,
) -> MnasNetA1:
    """timm's ``semnasnet_100``: the same network with the same state_dict keys.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; timm's checkpoints fit.
        num_classes: logits a picture.
        in_chans: channels of the input.
        width_mult: factor on the number of channels.
        dropout: before the classifier, in training; the paper's is 0.2.

    Raises:
        ValueError: ``weights`` is neither a file nor a name.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(MnasNetA1(num_classes, in_chans, width_mult, dropout), weights)


@register_model
@named_weights(torchvision(**{f"mnasnet{width}": ("IMAGENET1K_V1",) for width in ("1_0", "0_5", "0_75", "1_3")}))
def mnasnet_b1(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.2,
) -> MnasNetB1:
    """`torchvision.models.mnasnet1_0`, and with ``width_mult`` 0.5, 0.75 or 1.3 ``mnasnet0_5``, ``mnasnet0_75`` or
    ``mnasnet1_3``: the same networks with the same state_dict keys.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; torchvision's checkpoints fit.
        num_classes: logits a picture.
        in_chans: channels of the input.
        width_mult: factor on the number of channels.
        dropout: before the classifier, in training.

    Raises:
        ValueError: ``weights`` is neither a file nor a name.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(MnasNetB1(num_classes, in_chans, width_mult, dropout), weights)


class MnasNetA1(Trunk):
    """See `mnasnet_a1`. (N, in_chans, H, W) → (N, num_classes)."""

    def __init__(self, num_classes: int, in_chans: int, width_mult: float, dropout: float) -> None:
        super().__init__(
            [stage._replace(channels=make_divisible(stage.channels * width_mult)) for stage in _A1],
            Style(functools.partial(nn.ReLU, inplace=True)),
            stem_channels=make_divisible(32 * width_mult),
            head_channels=_HEAD,
            num_classes=num_classes,
            in_chans=in_chans,
            dropout=dropout,
        )


class MnasNetB1(nn.Module):
    """See `mnasnet_b1`. (N, in_chans, H, W) → (N, num_classes)."""

    least_size = 1
    _version = 2  # torchvision refuses a checkpoint without it; its version 1 had a stem of fixed width

    def __init__(self, num_classes: int, in_chans: int, width_mult: float, dropout: float) -> None:
        super().__init__()
        stem, channels = make_divisible(32 * width_mult), make_divisible(16 * width_mult)
        layers: list[nn.Module] = [
            nn.Conv2d(in_chans, stem, 3, 2, 1, bias=False),
            _norm(stem),
            nn.ReLU(inplace=True),
            DepthwiseConv2d(stem, stem, 3, padding=1, bias=False),
            _norm(stem),
            nn.ReLU(inplace=True),
            PointwiseConv2d(stem, channels, bias=False),
            _norm(channels),
        ]
        for stage in _B1:
            out_channels = make_divisible(stage.channels * width_mult)
            blocks = []
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                adds_input = i > 0 or (stride == 1 and channels == out_channels)
                blocks.append(
                    InvertedResidual(channels, out_channels, stage.kernel_size, stride, stage.expansion, adds_input)
                )
                channels = out_channels
            layers.append(FusedSequential(*blocks))
        layers += [PointwiseConv2d(channels, _HEAD, bias=False), _norm(_HEAD), nn.ReLU(inplace=True)]
        self.layers = FusedSequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), nn.Linear(_HEAD, num_classes))
        mnasnet_init(self)

    def outline(self) -> Outline:
        return Outline([f"layers.{i}" for i in range(len(self.layers) - 3)])

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return self.classifier(self.layers(x).mean((2, 3)))


@known
class InvertedResidual(Chained):
    """`mobilenet_fast.nn.InvertedResidual` without squeeze-and-excitation, under the keys of MnasNet-B1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int, adds_input: bool
    ) -> None:
        super().__init__()
        expanded, padding = in_channels * expansion, kernel_size // 2
        self.layers = FusedSequential(
            PointwiseConv2d(in_channels, expanded, bias=False),
            _norm(expanded),
            nn.ReLU(inplace=True),
            DepthwiseConv2d(expanded, expanded, kernel_size, stride, padding, bias=False),
            _norm(expanded),
            nn.ReLU(inplace=True),
            PointwiseConv2d(expanded, out_channels, bias=False),
            _norm(out_channels),
        )
        self.apply_residual = adds_input

    def links(self) -> Links:
        return Links([self.layers], self.apply_residual)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=1 - 0.9997)
