"""A MobileNetV3 as tutorials write it: activations spelled out, squeeze-and-excitation by views and linear layers,
in-place operations, and nothing from this package."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class HSwish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3) / 6


class HSigmoid(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3, inplace=True) / 6


class SELayer(nn.Module):
    def __init__(self, channels, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            HSigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Bottleneck(nn.Module):
    def __init__(self, inp, hidden, oup, kernel, stride, use_se, use_hs):
        super().__init__()
        self.use_shortcut = stride == 1 and inp == oup
        act = HSwish if use_hs else lambda: nn.ReLU(inplace=True)
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden, 1, 1, 0, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
            nn.Conv2d(hidden, hidden, kernel, stride, (kernel - 1) // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            SELayer(hidden) if use_se else nn.Identity(),
            act(),
            nn.Conv2d(hidden, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x):
        out = self.conv(x)
        if self.use_shortcut:
            out += x
        return out


class TutorialMobileNetV3(nn.Module):
    # kernel, hidden, out, squeeze-and-excitation, h-swish, stride
    cfg = [
        (3, 16, 16, True, False, 2),
        (3, 72, 24, False, False, 2),
        (3, 88, 24, False, False, 1),
        (5, 96, 40, True, True, 2),
        (5, 240, 40, True, True, 1),
        (5, 120, 48, True, True, 1),
        (5, 288, 96, True, True, 2),
        (5, 576, 96, True, True, 1),
    ]

    def __init__(self, num_classes=100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inp, blocks = 16, []
        for kernel, hidden, oup, use_se, use_hs, stride in self.cfg:
            blocks.append(Bottleneck(inp, hidden, oup, kernel, stride, use_se, use_hs))
            inp = oup
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inp, 576, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(576)
        self.hs = HSwish()
        self.linear3 = nn.Linear(576, 1024)
        self.dropout = nn.Dropout(0.2)
        self.linear4 = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = x.mul_(F.relu6(x + 3.0) / 6.0)
        x = self.blocks(x)
        x = self.hs(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(x, x.size()[2:])
        x = torch.flatten(x, 1)
        x = self.linear3(x)
        x = x * F.hardtanh(x + 3, 0.0, 6.0) * (1 / 6)
        return self.linear4(self.dropout(x))
