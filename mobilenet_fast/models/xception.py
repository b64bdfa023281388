"""Xception (Chollet, 2017, arXiv:1610.02357), figure 5, with timm's state_dict keys."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import DepthwiseConv2d, FusedSequential, PointwiseConv2d
from ..nn.dispatch import known
from ..nn.fusion import Chained, Links
from .features import Outline
from .pretrained import named_weights, timm
from .registry import Weights, load_weights, register_model
from .sizes import check_size
from .tensorflow import MaxPool2dSame


class _Module(NamedTuple):
    """The channels of its separable convolutions, and the stride of its pooling, or 1 for none."""

    channels: tuple[int, ...]
    stride: int


_ENTRY = (_Module((128, 128), 2), _Module((256, 256), 2), _Module((728, 728), 2))
_MIDDLE = (_Module((728, 728, 728), 1),) * 8
_EXIT = (_Module((728, 1024), 2),)
_BETWEEN = {"relu": nn.ReLU, "elu": nn.ELU}


@register_model
@named_weights(timm(legacy_xception=("tf_in1k",)))
def xception(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    activation_between: str | None = None,
    residual: bool = True,
    dropout: float = 0.0,
    same_padding: bool = False,
) -> Xception:
    """timm's ``legacy_xception``: the same network with the same state_dict keys, for pictures of 299 x 299.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; timm's checkpoints fit.
        num_classes: logits a picture.
        in_chans: channels of the input.
        activation_between: depthwise and 1x1 convolution: None, "relu" or "elu", of which the paper finds None best
            (section 4.7, figure 10).
        residual: modules add their input, through a 1x1 convolution where it changes (section 4.6, figure 9).
        dropout: before the classifier, in training; the paper's is 0.5.
        same_padding: pad as TensorFlow does, and batch norm with eps 1e-3, for weights from there (`from_keras`).

    Raises:
        ValueError: ``weights`` is neither a file nor a name, or ``activation_between`` is another.
        RuntimeError: ``weights`` are another model's.
    """
    model = Xception(num_classes, in_chans, activation_between, residual, dropout, same_padding)
    return load_weights(model, weights)


class Xception(Chained):
    """See `xception`. (N, in_chans, H, W) → (N, num_classes), H and W at least 7."""

    least_size = 7  # of which the stem, without padding, leaves one pixel

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        activation_between: str | None,
        residual: bool,
        dropout: float,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        if activation_between is not None and activation_between not in _BETWEEN:
            raise ValueError(f'xception: activation_between must be None, "relu" or "elu", got {activation_between!r}')
        between = None if activation_between is None else _BETWEEN[activation_between]
        self.conv1 = nn.Conv2d(in_chans, 32, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.act2 = nn.ReLU(inplace=True)
        channels = 64
        modules = (*_ENTRY, *_MIDDLE, *_EXIT)
        for i, module in enumerate(modules):
            setattr(self, f"block{i + 1}", Block(channels, module, i > 0, residual, between, same_padding))
            channels = module.channels[-1]
        self.blocks = len(modules)
        for i, out_channels in ((3, 1536), (4, 2048)):
            setattr(self, f"conv{i}", SeparableConv(channels, out_channels, between))
            setattr(self, f"bn{i}", nn.BatchNorm2d(out_channels))
            setattr(self, f"act{i}", nn.ReLU(inplace=True))
            channels = out_channels
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif same_padding and isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = 1e-3, 0.01

    def outline(self) -> Outline:
        names = ["conv1", "bn1", "act1", "conv2", "bn2", "act2", *(f"block{i + 1}" for i in range(self.blocks))]
        names += ["conv3", "bn3", "act3", "conv4", "bn4", "act4"]
        # Each module starts with a ReLU, in its residual branch alone.
        return Outline(names, behind=F.relu)

    def links(self) -> Links:
        return Links([self._modules[name] for name in self.outline().names])

    def forward(self, x: Tensor) -> Tensor:
        check_size(self, x)
        return self.fc(self.dropout(super().forward(x).mean((2, 3))))


@known
class SeparableConv(Chained):
    """`mobilenet_fast.nn.SeparableConv2d` with timm's keys: 3x3 depthwise and 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, between: type[nn.Module] | None) -> None:
        super().__init__()
        self.conv1 = DepthwiseConv2d(in_channels, in_channels, 3, padding=1, bias=False)
        if between is not None:
            self.act = between(inplace=True)
        self.pointwise = PointwiseConv2d(in_channels, out_channels, bias=False)

    def links(self) -> Links:
        return Links(list(self._modules.values()))


class Block(nn.Module):
    """A module of the paper's figure 5: separable convolutions, each behind a ReLU, and a pooling; plus the input."""

    def __init__(
        self,
        in_channels: int,
        module: _Module,
        starts_with_relu: bool,
        residual: bool,
        between: type[nn.Module] | None,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        channels, layers = in_channels, []
        for i, out_channels in enumerate(module.channels):
            if i > 0 or starts_with_relu:
                layers.append(nn.ReLU(inplace=i > 0))  # the first one's input is the residual too
            layers += [SeparableConv(channels, out_channels, between), nn.BatchNorm2d(out_channels)]
            channels = out_channels
        if module.stride > 1:
            layers.append(MaxPool2dSame() if same_padding else nn.MaxPool2d(3, module.stride, 1))
        changes = module.stride > 1 or channels != in_channels
        if residual and changes:
            self.skip = nn.Conv2d(in_channels, channels, 1, module.stride, bias=False)
            self.skipbn = nn.BatchNorm2d(channels)
        self.residual = residual
        self.rep = FusedSequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rep(x)
        if not self.residual:
            return y
        return y + (self.skipbn(self.skip(x)) if "skip" in self._modules else x)
