"""Every layer of the models, once: found by running them without data.

On the CPU these are their convolutions, on a GPU depthwise and 1×1 convolutions, batch norm with the activation behind
it, squeeze-excite, and depthwise convolutions far larger than any network's, as they are published with figures.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from benchmarks.cases import operators
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
        devices = ("cpu",) if self.operation == "conv2d" else ("cpu", "cuda")
        directions = operators.CONVOLUTION_DIRECTIONS
        return Case("layers", str(self), self.problem, models=models, devices=devices, directions=directions)


@dataclass(frozen=True)
class BatchNorm:
    channels: int
    size: int
    activation: str

    def __str__(self) -> str:
        return f"batch_norm_act {self.channels}x{self.size}x{self.size} {self.activation}"

    def case(self, models: tuple[str, ...] = ()) -> Case:
        make = operators.batch_norm_act(self.channels, self.size, self.activation)
        directions = operators.BATCH_NORM_DIRECTIONS
        return Case("layers", str(self), make, models=models, devices=("cuda",), directions=directions)


@dataclass(frozen=True)
class SqueezeExcite:
    channels: int
    size: int
    squeeze_channels: int
    activation: str
    gate: str

    def __str__(self) -> str:
        size = f"{self.channels}x{self.size}x{self.size}"
        return f"squeeze_excite {size} squeeze {self.squeeze_channels} {self.activation} {self.gate}"

    def case(self, models: tuple[str, ...] = ()) -> Case:
        arguments = self.channels, self.size, self.squeeze_channels, self.activation, self.gate
        make = operators.squeeze_excite(*arguments)
        directions = operators.SQUEEZE_EXCITE_DIRECTIONS
        return Case("layers", str(self), make, models=models, devices=("cuda",), directions=directions)


Layer = Convolution | BatchNorm | SqueezeExcite


def parse(name: str) -> Layer:
    if match := re.fullmatch(r"batch_norm_act (\d+)x(\d+)x\2 (\w+)", name):
        return BatchNorm(int(match[1]), int(match[2]), match[3])
    if match := re.fullmatch(r"squeeze_excite (\d+)x(\d+)x\2 squeeze (\d+) (\w+) (\w+)", name):
        return SqueezeExcite(*map(int, match.groups()[:3]), *match.groups()[3:])
    match = re.fullmatch(r"(\w+) (\d+)x(\d+)x(\d+) to (\d+) k(\d+)x(\d+) s(\d+) p(\d+)x(\d+)", name)
    operation, *numbers = match.groups()
    c, h, w, k, kh, kw, s, ph, pw = map(int, numbers)
    return Convolution(c, h, w, k, (kh, kw), s, (ph, pw), operation == "depthwise_conv2d")


ACTIVATIONS = {
    F.relu: "relu",
    F.relu6: "relu6",
    F.hardtanh: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
    F.hardsigmoid: "hardsigmoid",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.Tensor.sigmoid: "sigmoid",
    torch.Tensor.sigmoid_: "sigmoid",
}


class _Calls(TorchFunctionMode):
    """Notes batch norms, and the activation that each one's output goes through next."""

    def __init__(self):
        super().__init__()
        self.norms: list[list] = []  # output, activation

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if args and self.norms and args[0] is self.norms[-1][0] and function in ACTIVATIONS:
            self.norms[-1][1] = ACTIVATIONS[function]
        output = function(*args, **(kwargs or {}))
        if function is F.batch_norm:
            self.norms.append([output, "none"])
        return output


def _activation(module: nn.Module) -> str:
    """Which one an activation's module computes."""
    x = torch.linspace(-4, 8, 97, device="cpu")
    with torch.device("cpu"):
        expected = {name: make()(x) for name, make in operators.ACTIVATIONS.items()}
    given = module(x.clone())
    return next(name for name, y in expected.items() if torch.allclose(given, y, atol=1e-6))


def found(name: str) -> list[Layer]:
    """Those of a model but for squeeze-excite's convolutions, whose maps are of one pixel."""
    build, size = NETWORKS[name]
    layers: list[Layer] = []

    def convolution(layer, given, output):
        if output.shape[2:].numel() > 1:
            layers.append(Convolution.of(layer, given[0].shape, output.shape))

    def squeeze_excite(layer, given, output):
        squeeze = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
        first, last = ("act1", "gate") if hasattr(layer, "act1") else ("activation", "scale_activation")
        activations = (_activation(getattr(layer, which)) for which in (first, last))
        _, channels, height, _ = output.shape
        layers.append(SqueezeExcite(channels, height, squeeze.out_channels, *activations))

    with torch.device("meta"), torch.no_grad(), _Calls() as calls:
        model = build().eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(convolution)
            if type(layer).__name__ in ("SqueezeExcitation", "SqueezeExcite"):
                layer.register_forward_hook(squeeze_excite)
        model(torch.empty(1, 3, size, size))
    for output, activation in calls.norms:
        layers.append(BatchNorm(output.shape[1], output.shape[2], activation))
    return layers


# (16, 64, 512, 512) and (64, 128, 256, 512) in float32: what others have published figures of.
LARGE = (
    (Convolution(64, 512, 512, 64, (3, 3), 1, (1, 1), True), 16),
    (Convolution(128, 256, 512, 128, (3, 3), 1, (1, 1), True), 64),
)


def large(convolution: Convolution, batch: int) -> Case:
    directions = operators.CONVOLUTION_DIRECTIONS
    fixed = {"devices": ("cuda",), "directions": directions, "batches": (batch,), "dtypes": ("fp32",)}
    return Case("layers", str(convolution), convolution.problem, **fixed)


@cache
def cases() -> list[Case]:
    users: dict[Layer, list[str]] = {}
    for name in NETWORKS:
        for layer in set(found(name)):
            users.setdefault(layer, []).append(name)
    cases = sorted((layer.case(tuple(models)) for layer, models in users.items()), key=lambda case: case.name)
    return [*cases, *(large(*shape) for shape in LARGE)]
