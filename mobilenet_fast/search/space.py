"""What a search chooses from: MnasNet's factorised hierarchical space and one around MobileNetV3-Large.

A network is a row of blocks, each of some layers alike. Searching the blocks apart, with the layers of one alike, makes
a space of a size that can be searched and still lets early blocks differ from late ones: MnasNet (Tan et al., 2019,
arXiv:1807.11626), section 4.1.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from ..messages import no_such
from ..models.initialisation import mobilenet_init
from ..models.rounding import make_divisible
from ..nn import ConvNormAct, FusedSequential, InvertedResidual, SqueezeExcitation

OPERATIONS = ("conv", "separable", "inverted_residual")
SKIPS = ("none", "identity", "pool")

Choices = tuple[int, ...]
"""A network of a space: of each decision, which option it takes."""


@dataclass(frozen=True)
class Block:
    """Layers alike, one after another; the first has the stride and changes the number of channels.

    ``operation`` is that of each layer: "conv", a dense convolution with batch norm and activation; "separable", a
    depthwise convolution with both and a linear 1x1 convolution; or "inverted_residual", the same behind a 1x1
    convolution to ``expansion`` times the input's channels. ``squeeze_ratio`` is the share of the channels that
    squeeze-and-excitation sees which it keeps between its two layers, 0 for none. ``skip`` is what is added to a layer
    that keeps its input's shape: "none", "identity", the input, or "pool", the input's means over 3 x 3 pixels.
    """

    out_channels: int
    layers: int = 1
    stride: int = 1
    operation: str = "inverted_residual"
    kernel_size: int = 3
    expansion: int = 6
    squeeze_ratio: float = 0.0
    skip: str = "identity"
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"Block: {no_such('operation', self.operation, OPERATIONS)}")
        if self.skip not in SKIPS:
            raise ValueError(f"Block: {no_such('skip', self.skip, SKIPS)}")
        for name in ("out_channels", "layers", "stride", "kernel_size", "expansion"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Block: {name} must be a positive integer, got {value!r}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"Block: kernel_size must be odd, got {self.kernel_size}")
        if not 0 <= self.squeeze_ratio <= 1:
            raise ValueError(f"Block: squeeze_ratio must be from 0 to 1, got {self.squeeze_ratio}")

    def build(self, in_channels: int) -> list[nn.Module]:
        """The layers, for an input of so many channels."""
        built = []
        for i in range(self.layers):
            stride = self.stride if i == 0 else 1
            layer = self._layer(in_channels, stride)
            keeps_shape = stride == 1 and in_channels == self.out_channels
            if isinstance(layer, InvertedResidual):
                layer.use_res_connect = keeps_shape and self.skip == "identity"
            elif keeps_shape and self.skip == "identity":
                layer = Skip(layer, pool=False)
            built.append(Skip(layer, pool=True) if keeps_shape and self.skip == "pool" else layer)
            in_channels = self.out_channels
        return built

    def _layer(self, in_channels: int, stride: int) -> nn.Module:
        k, out_channels = self.kernel_size, self.out_channels
        seen = out_channels if self.operation == "conv" else in_channels
        if self.operation == "inverted_residual":
            seen *= self.expansion
        squeeze = make_divisible(seen * self.squeeze_ratio) if self.squeeze_ratio else None
        if self.operation != "conv":
            return InvertedResidual(
                in_channels,
                seen,
                out_channels,
                k,
                stride,
                squeeze_channels=squeeze,
                activation_layer=self.activation,
            )
        layer = ConvNormAct(in_channels, out_channels, k, stride, activation_layer=self.activation)
        if squeeze is None:
            return layer
        return FusedSequential(layer, SqueezeExcitation(out_channels, squeeze, nn.ReLU, nn.Hardsigmoid))


class Skip(nn.Module):
    """``layer(x) + x``, or ``layer(x) + avg_pool2d(x, 3, 1, 1)``."""

    def __init__(self, layer: nn.Module, pool: bool) -> None:
        super().__init__()
        self.layer = layer
        self.skip = nn.AvgPool2d(3, 1, 1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.skip(x)


@dataclass(frozen=True)
class Architecture:
    """A network: a 3x3 stem of stride 2, blocks, a 1x1 convolution, means over the map, and a classifier.

    ``hidden_channels`` is the classifier's hidden layer, 0 for none; ``activation`` that of all but the blocks.
    """

    blocks: tuple[Block, ...]
    stem_channels: int = 32
    head_channels: int = 1280
    hidden_channels: int = 0
    num_classes: int = 1000
    activation: str = "relu"

    def build(self) -> SearchedNetwork:
        """The module, with weights to start training from."""
        return SearchedNetwork(self)

    def to_json(self) -> str:
        """In one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Raises ValueError if the text is no architecture."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "blocks": tuple(Block(**block) for block in fields["blocks"])})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"Architecture: no description of a network ({error})") from None

    def __str__(self) -> str:
        return " ".join(_summary(block) for block in self.blocks)


def _summary(block: Block) -> str:
    name = {"conv": "conv", "separable": "sep", "inverted_residual": f"ir{block.expansion}"}[block.operation]
    extras = "-se" * (block.squeeze_ratio > 0) + ("" if block.skip == "identity" else f"-{block.skip}")
    extras += "" if block.activation == "relu" else f"-{block.activation}"
    return f"{block.layers}×{name}k{block.kernel_size}c{block.out_channels}{extras}"


class SearchedNetwork(nn.Module):
    """See `Architecture`. (N, 3, H, W) → (N, num_classes)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        channels = a.stem_channels
        features: list[nn.Module] = [ConvNormAct(3, channels, stride=2, activation_layer=a.activation)]
        for block in a.blocks:
            features += block.build(channels)
            channels = block.out_channels
        features.append(ConvNormAct(channels, a.head_channels, 1, activation_layer=a.activation))
        self.features = FusedSequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        layers: list[nn.Module] = []
        channels = a.head_channels
        if a.hidden_channels:
            layers = [nn.Linear(channels, a.hidden_channels), nn.Hardswish()]
            channels = a.hidden_channels
        self.classifier = nn.Sequential(*layers, nn.Linear(channels, a.num_classes))
        mobilenet_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


@dataclass(frozen=True)
class Stage:
    """Where a block of the space lies: the channels and layers that its options scale, and its stride."""

    out_channels: int
    layers: int
    stride: int = 1
    expands: bool = True
    """Whether an inverted residual expands; the first of MobileNetV2 and V3 does not."""


@dataclass(frozen=True)
class SearchSpace:
    """Every field of a block that has several options is a decision of its own, block by block.

    Options of the filters are factors on a stage's channels, made divisible by 8; those of the layers are added to a
    stage's, of which one stays at least. ``squeeze_ratios`` and all others are what `Block` takes.
    """

    name: str
    stages: tuple[Stage, ...]
    operations: tuple[str, ...] = OPERATIONS
    kernel_sizes: tuple[int, ...] = (3, 5)
    expansions: tuple[int, ...] = (3, 6)
    squeeze_ratios: tuple[float, ...] = (0.0, 0.25)
    skips: tuple[str, ...] = SKIPS
    activations: tuple[str, ...] = ("relu",)
    filters: tuple[float, ...] = (0.75, 1.0, 1.25)
    layers: tuple[int, ...] = (-1, 0, 1)
    stem_channels: int = 32
    head_channels: int | None = 1280
    """None makes it six times the last block's channels, as in MobileNetV3."""
    hidden_channels: int = 0
    num_classes: int = 1000
    activation: str = "relu"

    def __post_init__(self) -> None:
        for name in _FIELDS:
            if not getattr(self, name):
                raise ValueError(f"SearchSpace: {name} must have an option, got none")
        if not self.stages:
            raise ValueError("SearchSpace: there must be a stage, got none")

    @property
    def decisions(self) -> tuple[tuple[str, tuple], ...]:
        """The name of each decision and its options, block after block."""
        return tuple(
            (f"{i}.{name}", self._options(stage, name)) for i, stage in enumerate(self.stages) for name in _FIELDS
        )

    def _options(self, stage: Stage, name: str) -> tuple:
        return (1,) if name == "expansions" and not stage.expands else getattr(self, name)

    @property
    def size(self) -> int:
        """How many choices there are; some may give the same network."""
        return math.prod(len(options) for _, options in self.decisions)

    def sample(self, generator: random.Random) -> Choices:
        """Each option alike likely."""
        return tuple(generator.randrange(len(options)) for _, options in self.decisions)

    def mutate(self, choices: Choices, generator: random.Random) -> Choices:
        """One decision changed, if any has a second option."""
        counts = [len(options) for _, options in self.decisions]
        places = [i for i, count in enumerate(counts) if count > 1]
        if not places:
            return choices
        place = generator.choice(places)
        option = (choices[place] + generator.randrange(1, counts[place])) % counts[place]
        return (*choices[:place], option, *choices[place + 1 :])

    def architecture(self, choices: Sequence[int]) -> Architecture:
        """Raises ValueError if the choices are not this space's."""
        decisions = self.decisions
        fits = len(choices) == len(decisions) and all(
            0 <= choice < len(options) for choice, (_, options) in zip(choices, decisions, strict=True)
        )
        if not fits:
            raise ValueError(f"SearchSpace: choices must be {len(decisions)} options of {self.name}, got {choices}")
        picked = [options[choice] for choice, (_, options) in zip(choices, decisions, strict=True)]
        per_stage = len(_FIELDS)
        blocks = [
            self._block(stage, picked[i * per_stage : (i + 1) * per_stage]) for i, stage in enumerate(self.stages)
        ]
        head = self.head(blocks[-1])
        return Architecture(
            tuple(blocks), self.stem_channels, head, self.hidden_channels, self.num_classes, self.activation
        )

    def head(self, last: Block) -> int:
        """Channels of the 1x1 convolution behind this block."""
        return 6 * last.out_channels if self.head_channels is None else self.head_channels

    def blocks(self, stage: int) -> list[Block]:
        """Every block that there can be in the stage of this number, once each, with as many layers as the most."""
        of = self.stages[stage]
        options = [self._options(of, name) for name in _FIELDS[:-1]]
        return list(
            dict.fromkeys(self._block(of, [*picked, max(self.layers)]) for picked in itertools.product(*options))
        )

    def _block(self, stage: Stage, picked: Sequence) -> Block:
        operation, kernel_size, expansion, squeeze_ratio, skip, activation, filters, layers = picked
        return Block(
            make_divisible(stage.out_channels * filters),
            max(1, stage.layers + layers),
            stage.stride,
            operation,
            kernel_size,
            expansion if operation == "inverted_residual" else 1,
            squeeze_ratio,
            skip,
            activation,
        )


_FIELDS = (
    "operations",
    "kernel_sizes",
    "expansions",
    "squeeze_ratios",
    "skips",
    "activations",
    "filters",
    "layers",
)


def mnasnet_space(num_classes: int = 1000, width: float = 1.0) -> SearchSpace:
    """MnasNet's space (arXiv:1807.11626, section 4.1): in each of seven blocks the operation, kernel 3 or 5, without or
    with squeeze-and-excitation of ratio 0.25, the skip, 0.75, 1 or 1.25 times MobileNetV2's filters, and one layer
    less, as many, or one more. The paper leaves open what an inverted residual expands by; 3 or 6, which its networks
    have, are a decision here.

    Args:
        num_classes: logits a picture.
        width: factor on all channels.

    Raises:
        ValueError: ``width`` is not positive.
    """
    rows = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
    stages = tuple(Stage(make_divisible(c * width), n, s) for c, n, s in rows)
    return SearchSpace(
        "mnasnet",
        stages,
        stem_channels=make_divisible(32 * width),
        head_channels=make_divisible(1280 * width),
        num_classes=num_classes,
    )


def mobilenet_v3_space(num_classes: int = 1000) -> SearchSpace:
    """Networks on MobileNetV3-Large's skeleton (arXiv:1905.02244, table 1): in each of six blocks kernel 3, 5 or 7,
    expansion 3, 4 or 6 (none in the first), squeeze-and-excitation, ReLU or hardswish, filters and layers.

    Args:
        num_classes: logits a picture.
    """
    stages = (
        Stage(16, 1, 1, False),
        Stage(24, 2, 2),
        Stage(40, 3, 2),
        Stage(80, 4, 2),
        Stage(112, 2),
        Stage(160, 3, 2),
    )
    return SearchSpace(
        "mobilenet_v3",
        stages,
        operations=("inverted_residual",),
        kernel_sizes=(3, 5, 7),
        expansions=(3, 4, 6),
        skips=("identity",),
        activations=("relu", "hardswish"),
        stem_channels=16,
        head_channels=None,
        hidden_channels=1280,
        num_classes=num_classes,
        activation="hardswish",
    )


def digits_space(num_classes: int = 10) -> SearchSpace:
    """A small space for small pictures: MnasNet's options in four blocks of 16 to 64 channels.

    Args:
        num_classes: logits a picture.
    """
    stages = (Stage(16, 1), Stage(24, 2, 2), Stage(40, 2, 2), Stage(64, 2, 2))
    return SearchSpace("digits", stages, stem_channels=16, head_channels=256, num_classes=num_classes)


SPACES = {"mnasnet": mnasnet_space, "mobilenet_v3": mobilenet_v3_space, "digits": digits_space}
"""By name, what makes a space from the number of classes."""
