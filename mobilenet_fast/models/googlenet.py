"""GoogLeNet, or Inception v1 (Szegedy et al., 2015, arXiv:1409.4842), table 1, with batch norm and torchvision's
state_dict keys. As there, the branch called 5x5 has a 3x3 convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import FusedSequential
from .features import Outline
from .inception_blocks import BasicConv2d, Branches, normalise, truncated_normal_init, without
from .pretrained import named_weights, torchvision
from .registry import Weights, load_weights, register_model
from .sizes import check_size


class GoogLeNetOutputs(NamedTuple):
    """What the network with auxiliary heads gives in training, (N, num_classes) each; aux2 is the deeper one."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


# 1x1; reduction and 3x3; reduction and "5x5"; behind the pooling.
_MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


@register_model
@named_weights(torchvision(googlenet=("IMAGENET1K_V1",)), transform_input=True)
def googlenet(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    aux_logits: bool = True,
    transform_input: bool = False,
    dropout: float = 0.2,
    dropout_aux: float = 0.7,
) -> GoogLeNet:
    """`torchvision.models.googlenet`: the same network with the same state_dict keys.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; torchvision's checkpoints fit, with
            ``transform_input`` for pictures normalised as for other networks, which a name brings with it. The
            auxiliary heads' weights are left out without ``aux_logits``.
        num_classes: logits a picture.
        in_chans: channels of the input.
        aux_logits: with two auxiliary heads, which count in training alone: the network then gives `GoogLeNetOutputs`.
        transform_input: take pictures normalised by ImageNet's mean and deviation for weights from TensorFlow.
        dropout, dropout_aux: before the classifier, and in the heads, in training.

    Raises:
        ValueError: ``weights`` is neither a file nor a name, or ``transform_input`` with other than three channels.
        RuntimeError: ``weights`` are another model's.
    """
    model = GoogLeNet(num_classes, in_chans, aux_logits, transform_input, dropout, dropout_aux)
    return load_weights(model, weights, lambda state: state if aux_logits else without(state, "aux1.", "aux2."))


class GoogLeNet(nn.Module):
    """See `googlenet`. (N, in_chans, H, W) → (N, num_classes), or `GoogLeNetOutputs`; H and W at least 15."""

    least_size = 15

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        aux_logits: bool,
        transform_input: bool,
        dropout: float,
        dropout_aux: float,
    ) -> None:
        super().__init__()
        if transform_input and in_chans != 3:
            raise ValueError(f"googlenet: transform_input takes pictures of 3 channels, got in_chans={in_chans}")
        self.transform_input = transform_input
        self.conv1 = BasicConv2d(in_chans, 64, 7, 2, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, 1)
        self.conv3 = BasicConv2d(64, 192, 3, 1, 1)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        channels, aux_channels = 192, {}
        for name, widths in _MODULES.items():
            module = Inception(channels, *widths)
            setattr(self, f"inception{name}", module)
            channels = aux_channels[name] = module.out_channels
            if name == "3b":
                self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
            elif name == "4e":
                self.maxpool4 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.aux1 = InceptionAux(aux_channels["4a"], num_classes, dropout_aux) if aux_logits else None
        self.aux2 = InceptionAux(aux_channels["4d"], num_classes, dropout_aux) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        truncated_normal_init(self, 0.01)

    def outline(self) -> Outline:
        names = [name for name in self._modules if name.startswith(("conv", "maxpool", "inception"))]
        return Outline(names, normalise if self.transform_input else None)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        check_size(self, x)
        if self.transform_input:
            x = normalise(x)
        x = self.maxpool2(self.conv3(self.conv2(self.maxpool1(self.conv1(x)))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.inception5b(self.inception5a(self.maxpool4(self.inception4e(x))))
        x = self.fc(self.dropout(self.avgpool(x).flatten(1)))
        return x if aux1 is None and aux2 is None else GoogLeNetOutputs(x, aux2, aux1)


class Inception(Branches):
    """The module of the paper's figure 2b."""

    def __init__(
        self, in_channels: int, ch1x1: int, ch3x3red: int, ch3x3: int, ch5x5red: int, ch5x5: int, pool_proj: int
    ) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(in_channels, ch1x1, 1)
        self.branch2 = FusedSequential(BasicConv2d(in_channels, ch3x3red, 1), BasicConv2d(ch3x3red, ch3x3, 3, 1, 1))
        self.branch3 = FusedSequential(BasicConv2d(in_channels, ch5x5red, 1), BasicConv2d(ch5x5red, ch5x5, 3, 1, 1))
        pool = nn.MaxPool2d(3, 1, 1, ceil_mode=True)
        self.branch4 = FusedSequential(pool, BasicConv2d(in_channels, pool_proj, 1))
        self.out_channels = ch1x1 + ch3x3 + ch5x5 + pool_proj

    def branches(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]


class InceptionAux(nn.Module):
    """An auxiliary head. (N, C, H, W) → (N, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = BasicConv2d(in_channels, 128, 1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x), inplace=True)))
