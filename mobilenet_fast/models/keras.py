"""Weights of Keras's applications, for the models here that are the same networks."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import first_line, no_such
from .registry import create_model

Layers = Mapping[str, Sequence[Any]]

_TOP = {"conv_preds", "conv_2", "logits", "predictions"}  # what include_top=False leaves out


def from_keras(weights: str | os.PathLike | Layers, model: str) -> dict[str, Tensor]:
    """The state_dict of a model whose weights are those of ``keras.applications``' network of the same name.

    To be loaded into a model with ``same_padding=True``; MobileNetV1 with ``same_padding="keras"``, and Keras's
    minimalistic MobileNetV3 with ``minimalistic=True`` as well. It then gives the logits whose softmax Keras gives, at
    every size that the model takes, for a Keras network of that input size; one of input size None pads images of odd
    size in its own way. The pictures are (N, 3, H, W), scaled as the network's ``preprocess_input`` does
    or, for MobileNetV3 and EfficientNet, its first layers do: to -1 … 1, and for EfficientNet, by ImageNet's mean and
    deviation.

    Args:
        weights: the path of an .h5 file of weights or of a whole model, or of a .weights.h5 or .keras file of Keras 3.8
            or later; or the arrays of each layer by its name, as ``layer.get_weights()`` gives them.
        model: "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "efficientnet_b0" …
            "efficientnet_b7" or "xception"; of the widths that Keras has weights for, MobileNetV3 of 1.

    Returns:
        All of the network's tensors, but for the classifier's if the file has none (``include_top=False``).

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: there is no such file.
        ValueError: Keras has no such network, the file is no file of weights, or it holds another network's.
    """
    if model not in _NAMES:
        raise ValueError(f"from_keras: {no_such('model', model, _NAMES)}")
    source = "the arrays" if isinstance(weights, Mapping) else os.fspath(weights)
    arrays = weights if isinstance(weights, Mapping) else _read(source)
    layers = {_plain(name): values for name, values in arrays.items() if len(values)}
    network = _empty(model, layers)
    names = list(_NAMES[model](network, layers))
    keys = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    if not _TOP & layers.keys():
        names = [name for name in names if name not in _TOP]
        keys = {key: value for key, value in keys.items() if not key.startswith(("classifier.", "fc."))}
    missing = [name for name in names if name not in layers]
    if missing:
        raise ValueError(f"from_keras: {source} is not of {model}: it has no layer {missing[0]!r} with weights")
    found = [(name, array) for name in names for array in layers[name]]
    if len(found) != len(keys):
        raise ValueError(f"from_keras: {model} has {len(keys)} tensors, its layers in {source} have {len(found)}")
    return {key: _to_torch(array, keys[key], name) for key, (name, array) in zip(keys, found, strict=True)}


def _empty(model: str, layers: Layers) -> nn.Module:
    minimalistic = model.startswith("mobilenet_v3") and not any("squeeze_excite" in name for name in layers)
    with torch.device("meta"):
        return create_model(model, **({"minimalistic": True} if minimalistic else {}))


def _plain(name: str) -> str:
    """The name that Keras 3 gives a layer, in small letters; before, MobileNetV3's were written as scopes."""
    return name.lower().replace("/", "_").replace("batchnorm", "bn")


def _to_torch(array: Any, like: Tensor, layer: str) -> Tensor:
    """Keras's kernels have their channels behind rows and columns: in and out, or of depthwise ones in and filters."""
    value = torch.as_tensor(array, device="cpu")
    if value.dim() == 4 and like.dim() in (2, 4):
        is_depthwise = like.dim() == 4 and like.size(1) == 1
        value = value.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1) if is_depthwise else value.permute(3, 2, 0, 1)
        value = value.flatten(1) if like.dim() == 2 else value
    elif value.dim() == 2 and like.dim() == 2:
        value = value.t()
    elif value.dim() != like.dim():
        shape = tuple(value.shape)
        raise ValueError(f"from_keras: layer {layer!r} has an array of shape {shape}, not of {like.dim()} dimensions")
    return value.clone(memory_format=torch.contiguous_format)


def _read(path: str) -> dict[str, list[Any]]:
    try:
        import h5py
    except ImportError:
        raise ImportError("from_keras: Keras's files are read by h5py; run: pip install h5py") from None
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file):  # .keras
                file = io.BytesIO(zipfile.ZipFile(file).read("model.weights.h5"))
            with h5py.File(file, "r") as contents:
                layers = _read_layers(contents)
        except (KeyError, OSError) as error:
            reason = first_line(error)
            raise ValueError(f"from_keras: {path} is not a file of Keras's weights: {reason}") from None
    return layers


def _read_layers(contents: Mapping) -> dict[str, list[Any]]:
    """The arrays of each layer, in the order of Keras's `get_weights`."""
    if "layers" in contents:  # Keras 3: groups by class, whose numbered arrays have their layer's name from 3.8 on
        groups = [group["vars"] for group in contents["layers"].values() if "vars" in group]
        return {group.attrs["name"]: [group[key][()] for key in sorted(group, key=int)] for group in groups}
    root = contents.get("model_weights", contents)
    return {
        layer: [root[layer][name][()] for name in _attribute(root[layer], "weight_names")]
        for layer in _attribute(root, "layer_names")
    }


def _attribute(group: Any, name: str) -> list[str]:
    """A list of strings; Keras cuts what HDF5 can't hold as one attribute into numbered ones."""
    parts = [group.attrs[name]] if name in group.attrs else []
    while not parts or f"{name}{len(parts)}" in group.attrs:
        parts.append(group.attrs[f"{name}{len(parts)}"])
    return [entry.decode() if isinstance(entry, bytes) else str(entry) for part in parts for entry in part]


# The layers that have weights, in the order of the state_dict. Each family's function takes the network and the layers.


def _mobilenet_v1(network: nn.Module, layers: Layers) -> Iterator[str]:
    yield from ("conv1", "conv1_bn")
    for i in range(1, 1 + sum(map(len, network.blocks))):
        yield from (f"conv_dw_{i}", f"conv_dw_{i}_bn", f"conv_pw_{i}", f"conv_pw_{i}_bn")
    yield "conv_preds"


def _mobilenet_v2(network: nn.Module, layers: Layers) -> Iterator[str]:
    yield from ("conv1", "bn_conv1")
    for i in range(len(network.features) - 2):
        block = f"block_{i}" if i else "expanded_conv"
        for part in ("expand", "depthwise", "project") if i else ("depthwise", "project"):
            yield from (f"{block}_{part}", f"{block}_{part}_bn")
    yield from ("conv_1", "conv_1_bn", "predictions")


def _mobilenet_v3(network: nn.Module, layers: Layers) -> Iterator[str]:
    yield from ("conv", "conv_bn")
    for i in range(len(network.features) - 2):
        block = f"expanded_conv_{i}" if i else "expanded_conv"
        for part in ("expand", "depthwise") if i else ("depthwise",):
            yield from (f"{block}_{part}", f"{block}_{part}_bn")
        if f"{block}_squeeze_excite_conv" in layers:
            yield from (f"{block}_squeeze_excite_conv", f"{block}_squeeze_excite_conv_1")
        yield from (f"{block}_project", f"{block}_project_bn")
    yield from ("conv_1", "conv_1_bn", "conv_2", "logits")


def _efficientnet(network: nn.Module, layers: Layers) -> Iterator[str]:
    yield from ("stem_conv", "stem_bn")
    for i, stage in enumerate(network.features[1:-1], 1):
        for j in range(len(stage)):
            block = f"block{i}{'abcdefghijklmnopqrstuvwxyz'[j]}"
            if i > 1:
                yield from (f"{block}_expand_conv", f"{block}_expand_bn")
            yield from (f"{block}_dwconv", f"{block}_bn", f"{block}_se_reduce", f"{block}_se_expand")
            yield from (f"{block}_project_conv", f"{block}_project_bn")
    yield from ("top_conv", "top_bn", "predictions")


def _xception(network: nn.Module, layers: Layers) -> Iterator[str]:
    # Keras numbers the layers of the shortcuts itself, on from those that it has made before.
    skips = zip(_numbered(layers, "conv2d"), _numbered(layers, "batch_normalization"), strict=False)
    yield from ("block1_conv1", "block1_conv1_bn", "block1_conv2", "block1_conv2_bn")
    for i in range(1, network.blocks + 2):
        block = getattr(network, f"block{i}", None)  # Keras's block i + 1; its last has no shortcut
        if hasattr(block, "skip"):
            yield from next(skips, ("conv2d", "batch_normalization"))
        for j in range(1, 1 + (2 if block is None else sum(hasattr(layer, "pointwise") for layer in block.rep))):
            yield from (f"block{i + 1}_sepconv{j}", f"block{i + 1}_sepconv{j}_bn")
    yield "predictions"


def _numbered(layers: Layers, name: str) -> list[str]:
    found = (re.fullmatch(rf"{name}(?:_(\d+))?", layer) for layer in layers)
    return [match[0] for match in sorted(filter(None, found), key=lambda match: int(match[1] or 0))]


_NAMES = {
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "mobilenet_v3_large": _mobilenet_v3,
    "mobilenet_v3_small": _mobilenet_v3,
    **{f"efficientnet_b{i}": _efficientnet for i in range(8)},
    "xception": _xception,
}
