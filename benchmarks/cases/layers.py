"""Every convolution of the models, once: found by running them without data."""

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from benchmarks.cases.networks import NETWORKS
from benchmarks.cases.registry import Case, Problem, inputs


@dataclass(frozen=True)
class Convolution:
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    depthwise: bool

    @classmethod
    def of(cls, layer: nn.Conv2d, shape: torch.Size, out_shape: torch.Size) -> "Convolution":
        """Padding is told by the sizes: timm's convolutions with TensorFlow's padding hold none in ``padding``."""
        totals = [
            (out - 1) * s + k - size
            for size, out, k, s in zip(shape[2:], out_shape[2:], layer.kernel_size, layer.stride, strict=True)
        ]
        padding = tuple(max(0, (total + 1) // 2) for total in totals)
        depthwise = layer.groups > 1
        assert not depthwise or layer.groups == layer.in_channels == layer.out_channels
        return cls(*shape[1:], layer.out_channels, layer.kernel_size, layer.stride[0], padding, depthwise)

    @property
    def operation(self) -> str:
        if self.depthwise:
            return "depthwise_conv2d"
        return "pointwise_conv2d" if (self.kernel, self.stride) == ((1, 1), 1) else "conv2d"

    def __str__(self) -> str:
        (kh, kw), (ph, pw) = self.kernel, self.padding
        size = f"{self.channels}x{self.height}x{self.width}"
        return f"{self.operation} {size} to {self.out_channels} k{kh}x{kw} s{self.stride} p{ph}x{pw}"

    @classmethod
    def parse(cls, name: str) -> "Convolution":
        operation, *numbers = re.fullmatch(
            r"(\w+) (\d+)x(\d+)x(\d+) to (\d+) k(\d+)x(\d+) s(\d+) p(\d+)x(\d+)", name
        ).groups()
        c, h, w, k, kh, kw, s, ph, pw = map(int, numbers)
        return cls(c, h, w, k, (kh, kw), s, (ph, pw), operation == "depthwise_conv2d")

    def problem(self, batch: int) -> Problem:
        from mobilenet_fast import functional

        groups = self.channels if self.depthwise else 1
        conv = nn.Conv2d(self.channels, self.out_channels, self.kernel, self.stride, self.padding, groups=groups).eval()
        fused = {
            "depthwise_conv2d": lambda x: functional.depthwise_conv2d(
                x, conv.weight, conv.bias, conv.stride, conv.padding
            ),
            "pointwise_conv2d": lambda x: functional.pointwise_conv2d(x, conv.weight, conv.bias),
        }
        shape = batch, self.channels, self.height, self.width
        return Problem(conv, inputs(*shape), fused.get(self.operation))

    def case(self, models: tuple[str, ...] = ()) -> Case:
        return Case("layers", str(self), self.problem, models=models)


def convolutions(name: str) -> set[Convolution]:
    """Those of a model but for squeeze-excite's, whose maps are of one pixel."""
    build, size = NETWORKS[name]
    found = set()

    def note(layer, given, output):
        if output.shape[2:].numel() > 1:
            found.add(Convolution.of(layer, given[0].shape, output.shape))

    with torch.device("meta"), torch.no_grad():
        model = build().eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(note)
        model(torch.empty(1, 3, size, size))
    return found


@cache
def cases() -> list[Case]:
    users: dict[Convolution, list[str]] = {}
    for name in NETWORKS:
        for convolution in convolutions(name):
            users.setdefault(convolution, []).append(name)
    return sorted((c.case(tuple(models)) for c, models in users.items()), key=lambda case: case.name)
