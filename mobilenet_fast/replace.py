"""Putting the layers of `mobilenet_fast.nn` into an existing model, and taking them out again."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from . import nn as fast
from .nn.depthwise import is_depthwise
from .nn.dispatch import activation_name, activation_of, known, unhooked
from .nn.fusion import PLANS, Chained, Links, RunsChains, run_chain
from .nn.pointwise import is_pointwise
from .reference import pair

__all__ = ["Replacement", "replace_layers", "restore_layers"]

_REFUSED = "refused by filter_fn"


class Replacement(NamedTuple):
    """One line of `replace_layers`'s report: what became of a module that has a faster layer."""

    name: str
    """as in ``model.named_modules()``; empty for the model itself"""
    layer: str
    """the class that it has, or had"""
    replaced_by: str | None
    """the class of `mobilenet_fast.nn` that it is now; None if it stayed"""
    reason: str
    """why it stayed; empty if it was replaced"""


def replace_layers(
    model: nn.Module,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    *,
    report: list[Replacement] | None = None,
) -> nn.Module:
    """Makes the layers of ``model`` that `mobilenet_fast.nn` has faster ones for into those, and returns ``model``.

    It is done instance by instance, by giving a module another class, derived from `mobilenet_fast.nn`'s and its own:
    the modules stay the same objects, with their parameters, buffers, hooks, modes, names and state_dict keys, in all
    the places that share them, and ``isinstance`` holds as before. Nothing else is touched, no class is changed, and
    `restore_layers` gives each its class back. The model copies and pickles; unpickling needs this package.

    Replaced are depthwise and 1x1 `nn.Conv2d`, `nn.BatchNorm2d`, and `nn.Sequential` with any subclass that leaves
    its forward alone (it becomes a `FusedSequential`, which runs convolution, batch norm and activation as one kernel
    call); torchvision's `SqueezeExcitation`; timm's `BatchNormAct2d`, `Conv2dSame`, `SqueezeExcite` and `SEModule`; the
    blocks of both's EfficientNets and MobileNets, of transformers' MobileNets, and timm's Xception; of timm's networks
    of these kinds all before the head is one chain. What gains is inference under `torch.no_grad` or
    `torch.inference_mode` on tensors that `mobilenet_fast.functional` has kernels for, and training: on the CPU in
    float32 and float64, of whole blocks, in time and memory; on GPUs of depthwise convolutions, batch norms with their
    activations, and squeeze-excite. Other training, other devices and export run as before.

    Args:
        model: any module; it is changed in place.
        filter_fn: called with name and module of those that have a faster layer; where it returns False, a module keeps
            its class. To have no layers of a container fused, refuse the container.
        strict: raise if a depthwise convolution or a squeeze-and-excitation that ``filter_fn`` accepts can't be
            replaced.
        report: a list that gets a `Replacement` for each module that has a faster layer, with the reason where it
            stayed.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: under ``strict``, with names and reasons; the model is unchanged then.
    """
    _check_module("replace_layers", model)
    rows, found = [], []
    of_parents: dict[int, type[nn.Module]] = {}
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        layer, reason = _faster_layer(module)
        layer = of_parents.get(id(module), layer)
        if layer is PaddedLayer and places[id(module.convolution)] != places[id(module)]:
            layer, reason = None, "its convolution is part of another module too"
        if layer is None and not reason:
            continue
        if filter_fn is not None and not filter_fn(name, module):
            layer, reason = None, _REFUSED
        if layer is not None:
            found.append((module, layer))
            if layer is PaddedLayer:
                of_parents |= PaddedLayer.convolutions_that_pad(module)
        rows.append(Replacement(name, type(module).__name__, layer and layer.__name__, reason))
    if strict and (left := [row for row in rows if row.reason not in ("", _REFUSED)]):
        lines = "; ".join(f"{row.name or 'the model'} ({row.layer}): {row.reason}" for row in left)
        raise ValueError(f"replace_layers: no faster layer for {lines}")
    for module, layer in found:
        module.__class__ = _replaced_class(layer, type(module))
    if report is not None:
        report += rows
    return model


def restore_layers(model: nn.Module) -> nn.Module:
    """Gives every module that `replace_layers` changed its class back, and returns ``model``, as it was before.

    Copies and unpickled models can be restored as well.

    Args:
        model: what `replace_layers` was given, or a part of it, or something around it.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a replaced module was given yet another class, as `torch.nn.utils.parametrize` does.
    """
    _check_module("restore_layers", model)
    replaced = [(name, module) for name, module in model.named_modules() if isinstance(module, _Replaced)]
    for name, module in replaced:
        if "stock_class" not in vars(type(module)):
            raise ValueError(
                f"restore_layers: {name or 'the model'} became a {type(module).__name__} after it was replaced; "
                "undo that first"
            )
    for _, module in replaced:
        module.__class__ = type(module).stock_class
        for plan in PLANS:
            vars(module).pop(plan, None)
            vars(module).pop(_SHORTCUT + plan, None)
    return model


def _check_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")


class _Replaced(nn.Module):
    """Marks the classes made here, and pickles their instances by what the class is made of."""

    stock_class: type[nn.Module]
    fast_class: type[nn.Module]

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_replaced, (self.fast_class, self.stock_class), *state


@functools.cache
def _replaced_class(layer: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """A class that computes as ``layer`` does, and otherwise is what ``stock`` is."""
    # Tracers know a layer of torch.nn by the module of its class.
    attributes = {"__module__": stock.__module__, "__doc__": layer.__doc__, "stock_class": stock, "fast_class": layer}
    return known(type(layer.__name__, (_Replaced, layer, stock), attributes))


def _new_replaced(layer: type[nn.Module], stock: type[nn.Module]) -> nn.Module:
    kind = _replaced_class(layer, stock)
    return kind.__new__(kind)


def _faster_layer(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The layer to replace the module by, or None and, if there might have been one, the reason."""
    kind = type(module)
    if isinstance(module, _Replaced) or kind.__module__.startswith("mobilenet_fast."):
        return None, ""
    if kind is nn.Conv2d:
        return _faster_conv(module)
    if kind is nn.BatchNorm2d:
        return fast.BatchNormAct2d, ""
    if isinstance(module, nn.Sequential):
        stock = kind.forward is nn.Sequential.forward and kind.__iter__ is nn.Sequential.__iter__
        return (fast.FusedSequential, "") if stock and _might_fuse(module) else (None, "")
    find = _BY_NAME.get(_qualified_name(kind))
    if find is not None:
        return find(module)
    if isinstance(module, nn.Conv2d) and is_depthwise(module):
        return None, "its class is not known"
    return None, ""


def _faster_conv(conv: nn.Conv2d) -> tuple[type[nn.Module] | None, str]:
    if conv.padding_mode != "zeros":
        return None, f"padding_mode is {conv.padding_mode!r}" if is_depthwise(conv) else ""
    if is_depthwise(conv):
        return fast.DepthwiseConv2d, ""
    return (fast.PointwiseConv2d, "") if is_pointwise(conv) else (None, "")


def _might_fuse(modules: nn.Sequential) -> bool:
    """Whether two neighbours are of kinds that `FusedSequential` runs as one, or there is another chain inside."""
    for module in modules:
        layer, _ = _faster_layer(module)
        if isinstance(module, Chained) or (layer is not None and issubclass(layer, Chained)):
            return True
    for first, second in itertools.pairwise(modules):
        is_conv = isinstance(first, nn.Conv2d) and (is_depthwise(first) or is_pointwise(first))
        if (is_conv or isinstance(first, nn.BatchNorm2d)) and (
            isinstance(second, nn.BatchNorm2d) or activation_of(type(second)) is not None
        ):
            return True
    return False


# torchvision's and timm's layers. Their forwards take the same calls as ours, but find their parts under other names.


class BatchNormAct2d(fast.BatchNormAct2d):
    """timm's `BatchNormAct2d`, whose activation is a module."""

    @property
    def activation(self) -> str | None:
        drops = type(self.drop) is not nn.Identity or not unhooked(self.drop)
        return None if drops else activation_name(self.act)

    def plain_forward(self, input: Tensor) -> Tensor:
        return super(fast.BatchNormAct2d, self).forward(input)


class SqueezeExcite(fast.SqueezeExcitation):
    """timm's `SqueezeExcite`."""

    part_names = ("conv_reduce", "act1", "conv_expand", "gate")

    def pools_plainly(self) -> bool:
        return True

    def plain_forward(self, input: Tensor) -> Tensor:
        return super(fast.SqueezeExcitation, self).forward(input)


class SEModule(SqueezeExcite):
    """timm's `SEModule`, as far as it is a plain squeeze-and-excitation."""

    part_names = ("fc1", "act", "fc2", "gate")

    def pools_plainly(self) -> bool:
        return not self.add_maxpool and type(self.bn) is nn.Identity and unhooked(self.bn)


class Block(Chained):
    """A block: its modules in the order of use, and the input again if an attribute says so."""

    def links(self) -> Links | None:
        modules = self._modules
        names, skips, drops = _BLOCKS[_qualified_name(self.stock_class)]
        if not _passes_through(modules.get(drops)):
            return None
        if any(vars(self).get(name) is not None for name in names):
            return None  # a function
        parts = [part for name in names if (part := modules.get(name)) is not None]
        return Links(parts, vars(self).get(skips, False))

    def plain_forward(self, input):
        return super(Chained, self).forward(input)

    def forward(self, input=None, **named):
        stock = super(Chained, self).forward
        if named:
            if input is not None or [*named] != [self.stock_class.forward.__code__.co_varnames[1]]:
                return stock(*([] if input is None else [input]), **named)  # which says what is wrong
            (input,) = named.values()
        return stock() if input is None else super().forward(input)


class PaddedLayer(Block):
    """A convolution layer of transformers' MobileNets. Where its configuration asks for TensorFlow's padding it pads
    what its convolution gets; here its convolution does so itself, and a hook on that sees the image as it was."""

    def links(self) -> Links | None:
        return None if self._pads() else super().links()

    def plain_forward(self, input):
        if self._pads() or any(vars(self).get(name) is not None for name in _PADDED[0]):
            return super().plain_forward(input)
        for name in _PADDED[0]:
            if (module := self._modules.get(name)) is not None:
                input = module(input)
        return input

    def _pads(self) -> bool:
        return bool(PaddedLayer.convolutions_that_pad(self)) and not isinstance(self.convolution, fast.Conv2dSame)

    def convolutions_that_pad(self) -> dict[int, type[nn.Module]]:
        """By the module's id, what it is to be replaced by."""
        pads = self.config.tf_padding and not is_pointwise(self.convolution)
        return {id(self.convolution): fast.Conv2dSame} if pads else {}


_SHORTCUT = "_shortcut"


class XceptionBlock(Block):
    """A block of timm's Xception: separable convolutions, plus the input or a strided 1x1 convolution of it."""

    def links(self) -> Links | None:
        return None if self.skip is not None else Links([self.rep], True)

    def shortcut(self) -> Links:
        return Links([self.skip, self.skipbn])

    def chains(self) -> list[Links]:
        return super().chains() if self.skip is None else [Links([self.rep]), self.shortcut()]

    def plain_forward(self, input):
        if self.skip is None:
            return super().plain_forward(input)
        return self.rep(input) + run_chain(self, self.shortcut, self.plain_shortcut, input, _SHORTCUT)

    def plain_shortcut(self, input):
        return self.skipbn(self.skip(input))


class Network(RunsChains):
    """A network whose ``forward_features`` runs its children one after another."""

    def chains(self) -> list[Links]:
        links = self.features()
        return [] if links is None else [links]

    def features(self) -> Links | None:
        names = _NETWORKS[_qualified_name(self.stock_class)]
        checkpoints = vars(self).get("grad_checkpointing", False)
        return None if checkpoints else Links([self._modules[name] for name in names])

    def forward_features(self, x):
        return run_chain(self, self.features, super().forward_features, x)


def _passes_through(drop_path: nn.Module | None) -> bool:
    if drop_path is None:
        return True
    kind = type(drop_path)
    drops = kind is not nn.Identity and (kind.__name__ not in ("DropPath", "StochasticDepth") or drop_path.training)
    return not drops and unhooked(drop_path)


_PADDED = ("convolution", "normalization", "activation"), None, None
# The modules in the order of use; the attribute that says whether the input is added; what may drop the rest.
_BLOCKS = {
    "torchvision.models.efficientnet.FusedMBConv": (("block",), "use_res_connect", "stochastic_depth"),
    "torchvision.models.efficientnet.MBConv": (("block",), "use_res_connect", "stochastic_depth"),
    "torchvision.models.mnasnet._InvertedResidual": (("layers",), "apply_residual", None),
    "torchvision.models.mobilenetv2.InvertedResidual": (("conv",), "use_res_connect", None),
    "torchvision.models.mobilenetv3.InvertedResidual": (("block",), "use_res_connect", None),
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetExpansionLayer": (
        ("expand_conv", "expand_bn", "expand_act"),
        None,
        None,
    ),
    "transformers.models.mobilenet_v1.modeling_mobilenet_v1.MobileNetV1ConvLayer": _PADDED,
    "transformers.models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2ConvLayer": _PADDED,
    "transformers.models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2InvertedResidual": (
        ("expand_1x1", "conv_3x3", "reduce_1x1"),
        "use_residual",
        None,
    ),
    "transformers.models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2Stem": (
        ("first_conv", "expand_1x1", "conv_3x3", "reduce_1x1"),
        None,
        None,
    ),
    "timm.models.xception.SeparableConv2d": (("conv1", "pointwise"), None, None),
    "timm.layers.conv_bn_act.ConvNormAct": (("conv", "bn", "aa"), None, None),
    "timm.models._efficientnet_blocks.ConvBnAct": (("conv", "bn1", "aa"), "has_skip", "drop_path"),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": (
        ("conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw", "bn2"),
        "has_skip",
        "drop_path",
    ),
    "timm.models._efficientnet_blocks.EdgeResidual": (
        ("conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2"),
        "has_skip",
        "drop_path",
    ),
    "timm.models._efficientnet_blocks.InvertedResidual": (
        ("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3"),
        "has_skip",
        "drop_path",
    ),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": (
        ("dw_start", "pw_exp", "dw_mid", "se", "pw_proj", "dw_end", "layer_scale"),
        "has_skip",
        "drop_path",
    ),
}


_STEM = ("conv_stem", "bn1", "blocks")
_NETWORKS = {
    "timm.models.efficientnet.EfficientNet": (*_STEM, "conv_head", "bn2"),
    "timm.models.mobilenetv3.MobileNetV3": _STEM,
    "timm.models.xception.Xception": (
        *("conv1", "bn1", "act1", "conv2", "bn2", "act2"),
        *(f"block{i}" for i in range(1, 13)),
        *("conv3", "bn3", "act3", "conv4", "bn4", "act4"),
    ),
}


@functools.cache
def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _faster_block(block: nn.Module) -> tuple[type[nn.Module] | None, str]:
    # Another release may use other parts: the attributes that its forward reads say so.
    parts = _BLOCKS[_qualified_name(type(block))]
    names, *others = parts
    others += ["getattr", *(("config", "tf_padding", "apply_tf_padding") if parts is _PADDED else ())]
    read = [name for name in type(block).forward.__code__.co_names if name not in others]
    if read != list(names) or (parts is _PADDED and not _pads_as_known(block)):
        return None, ""
    return (PaddedLayer if parts is _PADDED else Block), ""


def _pads_as_known(layer: nn.Module) -> bool:
    """Whether a layer of transformers, if it pads at all, does so as `Conv2dSame`."""
    conv = layer.convolution
    if not layer.config.tf_padding:
        return True
    odd_and_dense = pair(conv.stride) == (1, 1) and all(k % 2 for k in pair(conv.kernel_size))
    same = pair(conv.dilation) == (1, 1) or odd_and_dense
    return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and pair(conv.padding) == (0, 0) and same


def _faster_xception_block(block: nn.Module) -> tuple[type[nn.Module] | None, str]:
    return (XceptionBlock, "") if type(block).forward.__code__.co_names == ("rep", "skip", "skipbn") else (None, "")


def _faster_network(network: nn.Module) -> tuple[type[nn.Module] | None, str]:
    kind = type(network)
    called = _called(kind.forward_features.__code__)
    return (Network, "") if called == _NETWORKS[_qualified_name(kind)] else (None, "")


def _called(code) -> tuple[str, ...]:
    others = ("grad_checkpointing", "torch", "jit", "is_scripting", "checkpoint_seq")
    return tuple(name for name in code.co_names if name not in others)


def _faster_squeeze_excite(layer: type[nn.Module]) -> Callable[[nn.Module], tuple[type[nn.Module] | None, str]]:
    def find(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
        names = [activation_of(type(getattr(module, name))) for name in layer.part_names[1::2]]
        if None in names:
            return None, "an activation has no kernel"
        return layer, ""

    return find


_BY_NAME: dict[str, Callable[[nn.Module], tuple[type[nn.Module] | None, str]]] = {
    "torchvision.ops.misc.SqueezeExcitation": _faster_squeeze_excite(fast.SqueezeExcitation),
    "timm.layers.norm_act.BatchNormAct2d": lambda norm: (BatchNormAct2d, ""),
    "timm.layers.conv2d_same.Conv2dSame": lambda conv: (fast.Conv2dSame, "") if is_depthwise(conv) else (None, ""),
    "timm.layers.squeeze_excite.SEModule": _faster_squeeze_excite(SEModule),
    "timm.models._efficientnet_blocks.SqueezeExcite": _faster_squeeze_excite(SqueezeExcite),
    "timm.models.xception.Block": _faster_xception_block,
    **dict.fromkeys(_BLOCKS, _faster_block),
    **dict.fromkeys(_NETWORKS, _faster_network),
}
