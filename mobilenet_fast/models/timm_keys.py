"""timm's state_dict keys for networks that have torchvision's here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .pretrained import StateDict

# timm's names for the parts of a block, in torchvision's order, which counts the rows that there are.
_INVERTED = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("se.conv_reduce", "se.conv_expand"), ("conv_pwl", "bn3"))
_SEPARABLE = (("conv_dw", "bn1"), ("se.conv_reduce", "se.conv_expand"), ("conv_pw", "bn2"))


def efficientnet_keys(state: StateDict) -> StateDict:
    """A state_dict of timm's EfficientNet under torchvision's keys; another network's as it is."""
    if "conv_stem.weight" not in state:
        return state
    blocks = _blocks(state)
    head = f"features.{len({stage for stage, _ in blocks}) + 1}"
    layers = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": f"{head}.0", "bn2": f"{head}.1"}
    for stage, i in blocks:
        layers |= _parts(state, f"blocks.{stage}.{i}", f"features.{stage + 1}.{i}.block")
    return rename_layers(state, layers | {"classifier": "classifier.1"})


def mobilenet_v3_keys(state: StateDict) -> StateDict:
    """A state_dict of timm's MobileNetV3 under torchvision's keys; another network's as it is."""
    if "conv_stem.weight" not in state:
        return state
    layers = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    for number, (stage, i) in enumerate(_blocks(state), 1):
        theirs, ours = f"blocks.{stage}.{i}", f"features.{number}"
        if f"{theirs}.conv.weight" in state:  # the last, which is no block
            layers |= {f"{theirs}.conv": f"{ours}.0", f"{theirs}.bn1": f"{ours}.1"}
        else:
            layers |= _parts(state, theirs, f"{ours}.block")
    state = rename_layers(state, layers | {"conv_head": "classifier.0", "classifier": "classifier.3"})
    # timm's hidden layer is a 1x1 convolution.
    return {key: value.flatten(1) if key == "classifier.0.weight" else value for key, value in state.items()}


def rename_layers(state: StateDict, layers: Mapping[str, str]) -> StateDict:
    """The state_dict with other names for these layers; keys of others are for load_state_dict to refuse."""

    def rename(key: str) -> str:
        layer, _, entry = key.rpartition(".")
        return f"{layers[layer]}.{entry}" if layer in layers else key

    return {rename(key): value for key, value in state.items()}


def _blocks(state: StateDict) -> list[tuple[int, int]]:
    """The stage of each block, and its number there."""
    matches = (re.match(r"blocks\.(\d+)\.(\d+)\.", key) for key in state)
    return sorted({(int(match[1]), int(match[2])) for match in matches if match})


def _parts(state: StateDict, theirs: str, ours: str) -> dict[str, str]:
    rows = _INVERTED if f"{theirs}.conv_pwl.weight" in state else _SEPARABLE
    present = [row for row in rows if f"{theirs}.{row[0]}.weight" in state]
    return {
        f"{theirs}.{part}": f"{ours}.{number}.{name}"
        for number, row in enumerate(present)
        for part, name in zip(row, ("fc1", "fc2") if row[0].startswith("se.") else ("0", "1"), strict=True)
    }
