"""Every model of this package beside the network that it is a copy of, and networks of other people."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks import third_party
from benchmarks.cases.networks import PLAIN, randomise, timm, torchvision
from benchmarks.cases.registry import Problem, case
from mobilenet_fast import models


class Part(nn.Module):
    """One of the outputs of a network that gives several."""

    def __init__(self, module: nn.Module, key: str) -> None:
        super().__init__()
        self.module, self.key = module, key

    def forward(self, x):
        return self.module(x)[self.key]


def network(build: Callable[[], nn.Module], size: int) -> Callable[[int], Problem]:
    def make(batch):
        model = build()
        hook = model.register_forward_pre_hook(lambda model, inputs: picture(*inputs))
        randomise(model, size)
        hook.remove()
        # Deep networks give most pictures of noise about the same outputs.
        for _ in range(8):
            inputs = [picture(torch.randn(batch, 3, size, size)) for _ in range(4)]
            with torch.no_grad():
                a, b = model(inputs[0]), model(inputs[1])
            if (a - b).abs().max() >= 0.15 * torch.max(a.abs().max(), b.abs().max()):
                break
        return Problem(model, inputs)

    return make


def picture(noise: torch.Tensor) -> torch.Tensor:
    """Gives each its own contrast, colours and coarse spots: all noise looks the same to deep networks."""
    n = len(noise)
    spots = nn.functional.interpolate(torch.randn(n, 3, 8, 8), noise.shape[2:])
    return noise * (0.5 + torch.rand(n, 1, 1, 1)) + spots + torch.randn(n, 3, 1, 1)


@dataclass(frozen=True)
class Entry:
    """``build`` makes the network, with random weights. Those of ``ours`` are then loaded into the model of that name
    of this package, made with ``options``; None for a network that the package has no model of."""

    source: str  # who wrote what is built
    build: Callable[[], nn.Module]
    size: int = 224
    ours: str | None = None
    options: dict = field(default_factory=dict)
    output: str | None = None  # of those that the network gives by name


def copy_of(name: str, source: str, theirs: str, size: int = 224, build_options=None, **options) -> Entry:
    build = {"timm": timm, "torchvision": torchvision}[source](theirs, **(build_options or {}))
    return Entry(f"{source} {theirs}", build, size, name, options)


def segmentation(name: str, key: str) -> Callable[[], nn.Module]:
    return lambda: Part(
        getattr(third_party.torchvision_models().segmentation, name)(weights=None, weights_backbone=None), key
    )


def ssd_backbone(name: str) -> Callable[[], nn.Module]:
    """The smallest map is computed from all the others."""
    return lambda: Part(
        getattr(third_party.torchvision_models().detection, name)(weights=None, weights_backbone=None).backbone, "5"
    )


def reparameterised(name: str) -> Callable[[], nn.Module]:
    """As it is used: what trains as several branches is one convolution, and has no batch norm left to be random."""

    def build():
        model = randomise(timm(name)(), 224)
        from timm.utils import reparameterize_model

        return reparameterize_model(model)

    return build


def transformers(kind: str, key: str = "logits", **config) -> Callable[[], nn.Module]:
    def build():
        third_party.torchvision_models()
        import transformers

        family = kind.removesuffix("Model").removesuffix("ForImageClassification")
        return Part(getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**config)), key)

    return build


def efficientnet_lite_pytorch(name: str) -> Callable[[], nn.Module]:
    def build():
        from efficientnet_lite_pytorch import EfficientNet

        return EfficientNet.from_name(name)

    return build


B_SIZES = (224, 240, 260, 300, 380, 456, 528, 600)
LITE_SIZES = (224, 240, 260, 280, 300)
OURS = [
    copy_of("mobilenet_v1", "timm", "mobilenetv1_100"),
    copy_of("mobilenet_v2", "torchvision", "mobilenet_v2"),
    copy_of("mobilenet_v3_large", "torchvision", "mobilenet_v3_large"),
    copy_of("mobilenet_v3_small", "torchvision", "mobilenet_v3_small"),
    copy_of("mnasnet_a1", "timm", "semnasnet_100"),
    copy_of("mnasnet_b1", "torchvision", "mnasnet1_0"),
    *(copy_of(f"efficientnet_b{i}", "torchvision", f"efficientnet_b{i}", size) for i, size in enumerate(B_SIZES)),
    *(copy_of(f"efficientnet_lite{i}", "timm", f"tf_efficientnet_lite{i}", s) for i, s in enumerate(LITE_SIZES)),
    copy_of("googlenet", "torchvision", "googlenet", 224, PLAIN, aux_logits=False),
    copy_of("inception_v3", "torchvision", "inception_v3", 299, PLAIN, aux_logits=False),
    copy_of("xception", "timm", "legacy_xception", 299),
    Entry(
        "torchvision lraspp_mobilenet_v3_large",
        segmentation("lraspp_mobilenet_v3_large", "out"),
        520,
        "lraspp_mobilenet_v3_large",
        output="out",
    ),
    Entry(  # nobody's that could be installed: what the row compares are eager and accelerated
        "none",
        lambda: Part(models.deeplab_v3plus_xception(), "out"),
        513,
        "deeplab_v3plus_xception",
        output="out",
    ),
]

TIMM = {
    "mobilenetv4_conv_small": 224,
    "mobilenetv4_conv_medium": 256,
    "mobilenetv4_hybrid_medium": 256,
    "mobilenet_edgetpu_v2_m": 224,
    "lcnet_100": 224,
    "tinynet_a": 192,
    "mixnet_s": 224,
    "mixnet_l": 224,
    "ghostnet_100": 224,
    "fbnetc_100": 224,
    "hardcorenas_a": 224,
    "mobileone_s0": 224,
    "mobileone_s1": 224,
    "efficientnet_lite0": 224,
    "efficientnet_es": 224,
    "tf_efficientnetv2_b0": 224,
    "inception_v4": 299,
    "inception_resnet_v2": 299,
}
TORCHVISION = (
    "vgg16",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "regnet_y_400mf",
    "squeezenet1_1",
    "densenet121",
    "shufflenet_v2_x1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
)
B0 = {"num_labels": 1000, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
OTHERS = [
    *(Entry(f"timm {name}", timm(name), size) for name, size in TIMM.items()),
    Entry("timm mobileone_s0, reparameterised", reparameterised("mobileone_s0")),
    *(Entry(f"torchvision {name}", torchvision(name)) for name in TORCHVISION),
    Entry("torchvision ssdlite320_mobilenet_v3_large, backbone", ssd_backbone("ssdlite320_mobilenet_v3_large"), 320),
    Entry("efficientnet-lite-pytorch efficientnet-lite0", efficientnet_lite_pytorch("efficientnet-lite0")),
    Entry("transformers MobileNetV1Model", transformers("MobileNetV1Model", "pooler_output")),
    Entry(
        "transformers MobileNetV1ForImageClassification",
        transformers("MobileNetV1ForImageClassification", num_labels=1000),
    ),
    Entry(
        "transformers MobileNetV2ForImageClassification",
        transformers("MobileNetV2ForImageClassification", num_labels=1000),
    ),
    Entry("transformers EfficientNetForImageClassification", transformers("EfficientNetForImageClassification", **B0)),
]

ZOO: dict[str, Entry] = {entry.ours or entry.source: entry for entry in [*OURS, *OTHERS]}

_recipe = inspect.getsource(randomise) + inspect.getsource(network) + inspect.getsource(picture)
for _name, _entry in ZOO.items():
    case("zoo", _name, _recipe)(network(_entry.build, _entry.size))
