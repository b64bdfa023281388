"""What is run: whole models, and single operators in the shapes that MobileNetV3-Large and V2 have.

A case is a plain PyTorch module with its inputs, which every peer takes as its starting point. ``fused``, for
operators, is the same computation by `mobilenet_fast.functional`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import third_party


@dataclass
class Problem:
    module: nn.Module
    inputs: tuple[Tensor, ...]
    fused: Callable[..., Tensor] | None = None

    def macs(self) -> int:
        """Multiply-adds of the module's convolutions and linear layers."""
        total = 0

        def count(layer, _, output):
            nonlocal total
            total += output.numel() * layer.weight[0].numel()

        layers = [m for m in self.module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        with torch.no_grad():
            self.module(*self.inputs)
        for hook in hooks:
            hook.remove()
        return total


@dataclass(frozen=True)
class Case:
    suite: str
    name: str
    make: Callable[[int], Problem]  # batch size → problem


CASES: dict[tuple[str, str], Case] = {}


def case(suite: str, name: str):
    def register(make):
        CASES[suite, name] = Case(suite, name, make)
        return make

    return register


def randomise(model: nn.Module) -> nn.Module:
    """Gives a fresh model batch-norm statistics with which its outputs depend on its inputs.

    With default initialisation two pictures give logits equal to nine digits, and any engine would pass for right.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
        norm.reset_running_stats()
        norm.momentum, norm.usual_momentum = None, norm.momentum  # None averages over all the forwards
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 128, 128))
    for norm in norms:
        norm.momentum = norm.usual_momentum
        del norm.usual_momentum
    return model.eval()


def network(build) -> Callable[[int], Problem]:
    def make(batch):
        model = randomise(build())
        inputs = torch.randn(batch, 3, 224, 224)
        with torch.no_grad():
            a, b = model(torch.randn(2, 3, 224, 224))
        assert (a - b).abs().max() > 0.1 * a.abs().max(), "this model forgets its input: parity would mean nothing"
        return Problem(model, (inputs,))

    return make


for _name in ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"):
    case("models", _name)(network(lambda name=_name: getattr(third_party.torchvision_models(), name)()))
case("models", "efficientnet_lite0")(network(lambda: third_party.timm().create_model("tf_efficientnet_lite0")))

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish}


def batch_norm_act(channels, size, activation):
    def make(batch):
        from mobilenet_fast import functional

        norm = nn.BatchNorm2d(channels)
        for parameter in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(parameter, 0.5, 1.5)
        module = nn.Sequential(norm, ACTIVATIONS[activation]()).eval()

        def fused(x):
            return functional.batch_norm_act(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps, activation=activation
            )

        return Problem(module, (torch.randn(batch, channels, size, size),), fused)

    return make


class PlainSqueezeExcite(nn.Module):
    def __init__(self, channels, squeeze_channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, x):
        return x * nn.functional.hardsigmoid(self.fc2(nn.functional.relu(self.fc1(self.pool(x)))))


def squeeze_excite(channels, size, squeeze_channels):
    def make(batch):
        from mobilenet_fast import functional

        module = PlainSqueezeExcite(channels, squeeze_channels).eval()

        def fused(x):
            fc1, fc2 = module.fc1, module.fc2
            return functional.squeeze_excite(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

        return Problem(module, (torch.randn(batch, channels, size, size),), fused)

    return make


def depthwise_conv2d(channels, size, kernel, stride, activation):
    def make(batch):
        from mobilenet_fast import functional

        conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        module = nn.Sequential(conv, ACTIVATIONS[activation]()).eval()

        def fused(x):
            return functional.depthwise_conv2d(
                x, conv.weight, conv.bias, conv.stride, conv.padding, activation=activation
            )

        return Problem(module, (torch.randn(batch, channels, size, size),), fused)

    return make


def pointwise_conv2d(channels, out_channels, size, activation):
    def make(batch):
        from mobilenet_fast import functional

        conv = nn.Conv2d(channels, out_channels, 1)
        module = nn.Sequential(conv, ACTIVATIONS[activation]()).eval()

        def fused(x):
            return functional.pointwise_conv2d(x, conv.weight, conv.bias, activation=activation)

        return Problem(module, (torch.randn(batch, channels, size, size),), fused)

    return make


for _c, _size, _act in [
    (16, 112, "hardswish"),
    (72, 56, "relu"),
    (120, 28, "relu"),
    (192, 28, "relu6"),
    (672, 14, "hardswish"),
    (960, 7, "hardswish"),
]:
    case("operators", f"batch_norm_act {_c}x{_size}x{_size} {_act}")(batch_norm_act(_c, _size, _act))

for _c, _size, _s in [(72, 28, 24), (120, 28, 32), (480, 14, 120), (672, 14, 168), (960, 7, 240)]:
    case("operators", f"squeeze_excite {_c}x{_size}x{_size} squeeze {_s}")(squeeze_excite(_c, _size, _s))

for _c, _size, _k, _stride, _act in [
    (16, 112, 3, 1, "relu"),
    (64, 112, 3, 2, "relu"),
    (72, 56, 3, 1, "relu"),
    (72, 56, 5, 2, "relu"),
    (120, 28, 5, 1, "relu"),
    (240, 28, 3, 2, "hardswish"),
    (480, 14, 3, 1, "hardswish"),
    (672, 14, 5, 1, "hardswish"),
    (672, 14, 5, 2, "hardswish"),
    (960, 7, 5, 1, "hardswish"),
]:
    case("operators", f"depthwise_conv2d {_c}x{_size}x{_size} k{_k} s{_stride}")(
        depthwise_conv2d(_c, _size, _k, _stride, _act)
    )

for _c, _out, _size, _act in [
    (16, 64, 112, "relu"),
    (64, 24, 56, "none"),
    (24, 72, 56, "relu"),
    (40, 120, 28, "relu"),
    (120, 40, 28, "none"),
    (80, 480, 14, "hardswish"),
    (672, 112, 14, "none"),
    (160, 960, 7, "hardswish"),
    (960, 160, 7, "none"),
]:
    case("operators", f"pointwise_conv2d {_c}to{_out} {_size}x{_size}")(pointwise_conv2d(_c, _out, _size, _act))


@case("demo", "efficientnet_lite0")
def photograph(batch):
    from benchmarks import demo

    picture = next(iter(demo.pictures().values()))[None].expand(batch, -1, -1, -1).contiguous()
    return Problem(demo.stock(), (picture,))
