"""Weights to start training from."""

from __future__ import annotations

import math

from torch import nn


def mobilenet_init(model: nn.Module) -> None:
    """He et al.'s normal distribution by fan-out for convolutions, N(0, 0.01²) for linear layers, and neutral norms."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def efficientnet_init(model: nn.Module, per_group: bool = True) -> None:
    """As EfficientNet's authors start: He et al.'s normal distribution by fan-out, and linear layers uniform by their
    outputs. The authors, and timm, count the fan-out within a group, torchvision that of all groups."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // (module.groups if per_group else 1)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            limit = module.out_features**-0.5
            nn.init.uniform_(module.weight, -limit, limit)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mnasnet_init(model: nn.Module) -> None:
    """He et al.'s normal distribution by fan-out for convolutions, the uniform one by outputs for linear layers."""
    mobilenet_init(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, mode="fan_out", nonlinearity="sigmoid")
