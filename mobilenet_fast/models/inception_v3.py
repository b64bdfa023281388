"""Inception v3 (Szegedy et al., 2016, arXiv:1512.00567), table 1, with torchvision's state_dict keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Outline
from .inception_blocks import BasicConv2d, Branches, normalise, truncated_normal_init, without
from .pretrained import named_weights, torchvision
from .registry import Weights, load_weights, register_model
from .sizes import check_size


class InceptionOutputs(NamedTuple):
    """What the network with an auxiliary head gives in training, (N, num_classes) each."""

    logits: Tensor
    aux_logits: Tensor


@register_model
@named_weights(torchvision(inception_v3=("IMAGENET1K_V1",)), transform_input=True)
def inception_v3(
    weights: Weights | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    aux_logits: bool = True,
    transform_input: bool = False,
    dropout: float = 0.5,
) -> InceptionV3:
    """`torchvision.models.inception_v3`: the same network with the same state_dict keys, for pictures of 299 x 299.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; torchvision's checkpoints fit, with
            ``transform_input`` for pictures normalised as for other networks, which a name brings with it. The
            auxiliary heads' weights are left out without ``aux_logits``.
        num_classes: logits a picture.
        in_chans: channels of the input.
        aux_logits: with an auxiliary head, which counts in training alone: the network then gives `InceptionOutputs`.
        transform_input: take pictures normalised by ImageNet's mean and deviation for weights from TensorFlow.
        dropout: before the classifier, in training.

    Raises:
        ValueError: ``weights`` is neither a file nor a name, or ``transform_input`` with other than three channels.
        RuntimeError: ``weights`` are another model's.
    """
    model = InceptionV3(num_classes, in_chans, aux_logits, transform_input, dropout)
    return load_weights(model, weights, lambda state: state if aux_logits else without(state, "AuxLogits."))


class InceptionV3(nn.Module):
    """See `inception_v3`. (N, in_chans, H, W) → (N, num_classes), or `InceptionOutputs`; H and W at least 75, in
    training with ``aux_logits`` 299."""

    least_size = 75
    least_size_aux = 299

    def __init__(
        self, num_classes: int, in_chans: int, aux_logits: bool, transform_input: bool, dropout: float
    ) -> None:
        super().__init__()
        if transform_input and in_chans != 3:
            raise ValueError(f"inception_v3: transform_input takes pictures of 3 channels, got in_chans={in_chans}")
        self.transform_input = transform_input
        self.Conv2d_1a_3x3 = BasicConv2d(in_chans, 32, 3, 2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, 1, 1)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.AuxLogits = InceptionAux(768, num_classes) if aux_logits else None
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        truncated_normal_init(self, 0.1)

    def outline(self) -> Outline:
        names = [name for name in self._modules if name.startswith(("Conv2d", "maxpool", "Mixed"))]
        return Outline(names, normalise if self.transform_input else None)

    def forward(self, x: Tensor) -> Tensor | InceptionOutputs:
        if self.training and self.AuxLogits is not None:
            check_size(self, x, self.least_size_aux, " in training with aux_logits")
        check_size(self, x)
        if self.transform_input:
            x = normalise(x)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        aux = self.AuxLogits(x) if self.training and self.AuxLogits is not None else None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        x = self.fc(self.dropout(self.avgpool(x)).flatten(1))
        return x if aux is None else InceptionOutputs(x, aux)


def _pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1)


class InceptionA(Branches):
    """35 x 35: 5x5 convolutions as two of 3x3, the paper's figure 5, and one of 5x5."""

    def __init__(self, in_channels: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, 1, 2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, 1, 1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, 1, 1)
        self.branch_pool = BasicConv2d(in_channels, pool_channels, 1)

    def branches(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_pool(x)),
        ]


class InceptionB(Branches):
    """From 35 x 35 to 17 x 17, the paper's figure 10."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, 2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, 1, 1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, 2)

    def branches(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, F.max_pool2d(x, 3, 2)]


class InceptionC(Branches):
    """17 x 17: 7x7 convolutions as 1x7 and 7x1, the paper's figure 6."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_channels, channels, 1)
        self.branch7x7_2 = BasicConv2d(channels, channels, *row)
        self.branch7x7_3 = BasicConv2d(channels, 192, *column)
        self.branch7x7dbl_1 = BasicConv2d(in_channels, channels, 1)
        self.branch7x7dbl_2 = BasicConv2d(channels, channels, *column)
        self.branch7x7dbl_3 = BasicConv2d(channels, channels, *row)
        self.branch7x7dbl_4 = BasicConv2d(channels, channels, *column)
        self.branch7x7dbl_5 = BasicConv2d(channels, 192, *row)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def branches(self, x: Tensor) -> list[Tensor]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_pool(x)),
        ]


class InceptionD(Branches):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, 2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), 1, (0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), 1, (3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, 2)

    def branches(self, x: Tensor) -> list[Tensor]:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return [self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)]


class InceptionE(Branches):
    """8 x 8: 3x3 convolutions as 1x3 beside 3x1, the paper's figure 7."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, *row)
        self.branch3x3_2b = BasicConv2d(384, 384, *column)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, 1, 1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, *row)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, *column)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def branches(self, x: Tensor) -> list[Tensor]:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(_pool(x)),
        ]


class InceptionAux(nn.Module):
    """The auxiliary head. (N, C, H, W) → (N, num_classes), H and W at least 17."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = BasicConv2d(in_channels, 128, 1)
        self.conv1 = BasicConv2d(128, 768, 5)
        self.fc = nn.Linear(768, num_classes)
        self.fc.stddev = 0.001

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, 3)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
