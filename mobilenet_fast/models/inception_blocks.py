"""What GoogLeNet and Inception v3 have in common, with torchvision's state_dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import PointwiseConv2d
from ..nn.dispatch import known
from ..nn.fusion import Chained, Links
from .pretrained import StateDict


@known
class BasicConv2d(Chained):
    """Convolution, batch norm and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        if kernel_size == stride == 1 and padding == 0:
            self.conv = PointwiseConv2d(in_channels, out_channels, bias=False)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)
        self.relu = nn.ReLU(inplace=True)

    def links(self) -> Links:
        return Links([self.conv, self.bn, self.relu])


def normalise(x: Tensor) -> Tensor:
    """Pictures normalised by ImageNet's mean and deviation, as if by 0.5 and 0.5 for each channel, which is what
    weights that come from TensorFlow take."""
    mean, deviation = (x.new_tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return x * (deviation / 0.5) + (mean - 0.5) / 0.5


def truncated_normal_init(model: nn.Module, deviation: float) -> None:
    """The normal distribution within ±2 for convolutions and linear layers, whose attribute ``stddev`` goes before
    ``deviation``."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=getattr(module, "stddev", deviation), a=-2, b=2)


def without(state: StateDict, *prefixes: str) -> StateDict:
    """A state_dict without the keys that start with one of these."""
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


class Branches(nn.Module):
    """Several ways from the same input, concatenated."""

    def branches(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.branches(x), 1)
