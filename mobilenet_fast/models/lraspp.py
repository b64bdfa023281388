"""LR-ASPP on MobileNetV3 (Howard et al., 2019, arXiv:1905.02244), section 6.4 and figure 10, with torchvision's
state_dict keys. As there, the gate is pooled over the whole map."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import FusedSequential, PointwiseConv2d
from .features import Outline, Run
from .mobilenet_v3 import _LARGE, MobileNetV3
from .pretrained import named_weights, torchvision
from .registry import Weights, load_weights, register_model
from .sizes import check_size

_LOW = 4  # the block of MobileNetV3-Large that strides to 8


@functools.partial(register_model, task="segmentation")
@named_weights(torchvision(lraspp_mobilenet_v3_large=("COCO_WITH_VOC_LABELS_V1",)))
def lraspp_mobilenet_v3_large(weights: Weights | None = None, *, num_classes: int = 21, **kwargs) -> LRASPP:
    """`torchvision.models.segmentation.lraspp_mobilenet_v3_large`: the same network with the same state_dict keys.

    Args:
        weights: None, a state_dict, the path of one, or one of `list_weights`; torchvision's checkpoints fit.
        num_classes: logits a pixel.
        **kwargs: of the backbone, see `MobileNetV3`; ``dilated`` is True.

    Raises:
        TypeError: ``dropout``, which is the classifier's.
        ValueError: ``weights`` is no file.
        RuntimeError: ``weights`` are another model's.
    """
    if "dropout" in kwargs:
        raise TypeError("lraspp_mobilenet_v3_large: there is no dropout in this network")
    backbone = MobileNetV3(_LARGE, 1280, **{"dilated": True} | kwargs).features
    return load_weights(LRASPP(backbone, num_classes), weights)


class LRASPP(nn.Module):
    """See `lraspp_mobilenet_v3_large`. (N, in_chans, H, W) → {"out": (N, num_classes, H, W)}."""

    least_size = 1

    def __init__(self, backbone: FusedSequential, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = LRASPPHead(backbone[_LOW].out_channels, backbone[-1].out_channels, num_classes)
        names = self.outline().names
        self.runs = Run(self, names[: _LOW + 1]), Run(self, names[_LOW + 1 :])

    def outline(self) -> Outline:
        return Outline([f"backbone.{i}" for i in range(len(self.backbone))])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        check_size(self, x)
        to_low, to_high = self.runs
        low = to_low(x)
        out = self.classifier(low, to_high(low))
        return {"out": F.interpolate(out, x.shape[-2:], mode="bilinear", align_corners=False)}


class LRASPPHead(nn.Module):
    """(N, low_channels, h, w) and (N, high_channels, h', w') → (N, num_classes, h, w)."""

    def __init__(self, low_channels: int, high_channels: int, num_classes: int, channels: int = 128) -> None:
        super().__init__()
        self.cbr = FusedSequential(
            PointwiseConv2d(high_channels, channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(high_channels, channels, 1, bias=False), nn.Sigmoid()
        )
        self.low_classifier = PointwiseConv2d(low_channels, num_classes)
        self.high_classifier = PointwiseConv2d(channels, num_classes)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        gated = self.cbr(high) * self.scale(high)
        gated = F.interpolate(gated, low.shape[-2:], mode="bilinear", align_corners=False)
        return self.low_classifier(low) + self.high_classifier(gated)
