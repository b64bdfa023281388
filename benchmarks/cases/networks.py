"""Whole models of torchvision and timm, or ours where these are missing, with made-up weights and statistics."""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import third_party
from benchmarks.cases.registry import Problem, case, inputs, version
from mobilenet_fast import models
from mobilenet_fast.nn import Conv2dSame, DepthwiseConv2d, PointwiseConv2d


def randomise(model: nn.Module, size: int) -> nn.Module:
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
            model(torch.randn(8, 3, size, size))
    for norm in norms:
        norm.momentum = norm.usual_momentum
        del norm.usual_momentum
    return model.eval()


def network(build: Callable[[], nn.Module], size: int) -> Callable[[int], Problem]:
    def make(batch):
        model = randomise(build(), size)
        with torch.no_grad():
            a, b = model(torch.randn(2, 3, size, size))
        assert (a - b).abs().max() > 0.1 * a.abs().max(), "this model forgets its input: parity would mean nothing"
        return Problem(model, inputs(batch, 3, size, size))

    return make


def torchvision(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: getattr(third_party.torchvision_models(), name)(**options)


def timm(name: str) -> Callable[[], nn.Module]:
    return lambda: third_party.timm().create_model(name)


class PlainConv2d(nn.Conv2d):
    """A class that no fusion of this package knows."""


class PlainBatchNorm2d(nn.BatchNorm2d):
    """Likewise."""


class PlainConv2dSame(Conv2dSame):
    def forward(self, input):
        options = self.stride, 0, self.dilation, self.groups
        return nn.functional.conv2d(self.pad(input), self.weight, self.bias, *options)


PLAIN_CLASSES = {
    nn.Conv2d: PlainConv2d,
    DepthwiseConv2d: PlainConv2d,
    PointwiseConv2d: PlainConv2d,
    Conv2dSame: PlainConv2dSame,
    nn.BatchNorm2d: PlainBatchNorm2d,
}


def plain(model: nn.Module) -> nn.Module:
    """The model without kernels of this package: peers that start from it are to run PyTorch's."""
    for module in model.modules():
        module.__class__ = PLAIN_CLASSES.get(type(module), type(module))
        chooser = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        if "plain_forward" in vars(chooser):  # whose forward runs that or a kernel
            module.forward = module.plain_forward
    return model


def installed(package: str, theirs: Callable[[], nn.Module], ours: str, **options) -> Callable[[], nn.Module]:
    """Their network, or where the package is missing this package's copy of it."""

    def build():
        if version(package) is None:
            return plain(models.create_model(ours, **options))
        return theirs()

    return build


# GoogLeNet and Inception v3 as for inference: without auxiliary classifiers, and images already normalised.
PLAIN = {"aux_logits": False, "init_weights": False, "transform_input": False}
SOURCES: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "mobilenet_v1": ("timm", timm("mobilenetv1_100"), 224),
    "mobilenet_v2": ("torchvision", torchvision("mobilenet_v2"), 224),
    "mobilenet_v3_large": ("torchvision", torchvision("mobilenet_v3_large"), 224),
    "mobilenet_v3_small": ("torchvision", torchvision("mobilenet_v3_small"), 224),
    "mnasnet_a1": ("timm", timm("semnasnet_100"), 224),
    "efficientnet_lite0": ("timm", timm("tf_efficientnet_lite0"), 224),
    "efficientnet_b0": ("torchvision", torchvision("efficientnet_b0"), 224),
    "xception": ("timm", timm("legacy_xception"), 299),
    "googlenet": ("torchvision", torchvision("googlenet", **PLAIN), 224),
    "inception_v3": ("torchvision", torchvision("inception_v3", **PLAIN), 299),
}
WITHOUT_AUXILIARY = dict.fromkeys(("googlenet", "inception_v3"), {"aux_logits": False})
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    name: (installed(package, build, name, **WITHOUT_AUXILIARY.get(name, {})), size)
    for name, (package, build, size) in SOURCES.items()
}

_recipe = inspect.getsource(randomise) + inspect.getsource(network)
for _name, (_build, _size) in NETWORKS.items():
    case("models", _name, _recipe)(network(_build, _size))


@case("demo", "efficientnet_lite0")
def photographs(batch):
    from benchmarks import demo

    pictures = [picture[None].expand(batch, -1, -1, -1).contiguous() for picture in demo.pictures().values()]
    return Problem(demo.stock(), pictures)
