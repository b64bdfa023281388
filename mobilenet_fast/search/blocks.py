"""The widths of a network of inverted residuals that can be made smaller, found in its captured graph.

Every tensor of the graph has a number of channels, and so has each dimension of a layer's weights. A dense convolution
or linear layer has one number at its input and another at its output; nearly all else (depthwise convolutions, norms,
activations, gates, residual sums) has the same at both, and ties them. What is tied is one width, and can only change
together. No class is known by name, so this holds for whatever is built of such layers.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..accelerate.capture import Capture
from ..accelerate.graph import Constant, Graph, Node
from ..messages import first_line

__all__ = ["KEEPS", "ChannelGroup", "channel_groups", "shrink", "with_widths"]

KEEPS = ("first", "largest norm")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only change together. Layers are named as in ``model.named_modules()``, in the order of use.

    A squeeze-and-excitation's own hidden width is none of its group's: it stays as it is.
    """

    kind: str
    """"expansion": channels that one dense convolution makes for a depthwise one; "bottleneck": those that blocks give,
    with all blocks that a sum of residuals ties together"""
    writers: tuple[str, ...]
    """the dense convolutions that make the channels: expansion, projection, stem"""
    depthwise: tuple[str, ...]
    norms: tuple[str, ...]
    squeeze_excite: tuple[str, ...]
    """the first and the last layer of each squeeze-and-excitation that weighs the channels"""
    readers: tuple[str, ...]
    """the dense convolutions and linear layers that read them: projection, the next block's expansion, head"""
    tensors: tuple[tuple[str, int], ...]
    """the parameters and buffers that have the channels, each with its dimension"""

    @property
    def name(self) -> str:
        """That of the first layer that makes the channels."""
        return self.writers[0]

    def width(self, model: nn.Module) -> int:
        """How many channels the group has in ``model``."""
        name, dim = self.tensors[0]
        return _tensor(model, name).shape[dim]


def channel_groups(model: nn.Module, example_input: Tensor | tuple) -> list[ChannelGroup]:
    """The widths of ``model`` that NetAdapt may change, in the order of use; the model itself is left as it is.

    They are those that depthwise convolutions work on, those that a 1x1 convolution makes of these, and, for blocks
    whose expansion is not depthwise, those between two of the latter; whatever classes the model is made of. Where the
    first block does not expand, its width is the stem's. Widths that the model's inputs or outputs have, or an
    operation that is not known to keep channels apart (a concatenation, a grouped convolution, a change of shape), are
    not among them, nor are those of the head.

    Args:
        model: any module that ``torch.export`` captures; what it does in evaluation mode counts.
        example_input: a tensor, (N, C, H, W) for these networks, or a tuple of the model's inputs.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it can't be captured with this input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"channel_groups: model must be an nn.Module, got {type(model).__name__}")
    frozen = copy.deepcopy(model).eval()
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    state = dict((*frozen.named_parameters(remove_duplicate=False), *frozen.named_buffers(remove_duplicate=False)))
    leaves = pytree.tree_leaves(inputs)
    dtype = next((x.dtype for x in leaves if isinstance(x, Tensor)), torch.float32)
    try:
        graph = Capture(frozen, inputs, {}, None).lower(leaves, state, (dtype,))
    except Exception as error:  # what an export raises depends on the model
        raise ValueError(f"channel_groups: the model can't be captured: {first_line(error)}") from error
    first_names: dict[int, str] = {}  # a tensor that modules share has several
    for name, tensor in state.items():
        first_names.setdefault(id(tensor), name)
    names = {name: first_names[id(tensor)] for name, tensor in state.items()}
    return _Widths(graph, names, _sliceable(frozen)).groups()


def shrink(model: nn.Module, group: ChannelGroup, channels: int, keep: str = "first") -> nn.Module:
    """A copy of ``model`` in which ``group`` has fewer channels, with the weights of those that are kept.

    Args:
        model: that whose groups they are, or one that this function made of it.
        group: one of `channel_groups`.
        channels: how many it keeps.
        keep: "first" keeps the first ones, as MobileNetV3's authors do; "largest norm" those whose filters have the
            largest sum of squares over all layers that make the channels, as NetAdapt's (section 3.3).

    Raises:
        ValueError: ``channels`` is not from 1 to the group's width, or ``keep`` is another.
    """
    width = group.width(model)
    if not isinstance(channels, int) or not 1 <= channels <= width:
        raise ValueError(f"shrink: {group.name} has {width} channels, channels must be from 1 to that, got {channels}")
    if keep not in KEEPS:
        raise ValueError(f'shrink: keep must be "first" or "largest norm", got {keep!r}')
    if keep == "first":
        kept = torch.arange(channels)
    else:
        filters = [_tensor(model, f"{name}.weight").detach() for name in (*group.writers, *group.depthwise)]
        norms = sum(filter.double().square().flatten(1).sum(1) for filter in filters)
        kept = norms.argsort(descending=True, stable=True)[:channels].sort().values
    smaller = copy.deepcopy(model)
    before = {module: _out_channels(module) for module in smaller.modules()}
    holders = defaultdict(list)  # a tensor may be held by several modules, or under several names
    for module in smaller.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                holders[id(tensor)].append((module, held, name))
    for name, dim in group.tensors:
        old = _tensor(smaller, name)
        new = _taken(old, dim, kept)
        holders[id(new)] = holders[id(old)]
        for module, held, own_name in holders[id(old)]:
            held[own_name] = new
            _set_sizes(module)
    for module, channels_before in before.items():
        if vars(module).get("out_channels") == channels_before != _out_channels(module):
            module.out_channels = _out_channels(module)
    return smaller


def with_widths(
    model: nn.Module, groups: Iterable[ChannelGroup], widths: dict[str, int], keep: str = "first"
) -> nn.Module:
    """A copy of ``model`` in which each group has the width given for its name; see `shrink`."""
    smaller = copy.deepcopy(model)
    for group in groups:
        if widths[group.name] != group.width(smaller):
            smaller = shrink(smaller, group, widths[group.name], keep)
    return smaller


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, own_name = name.rpartition(".")
    return getattr(model.get_submodule(owner), own_name)


def _taken(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    new = tensor.detach().index_select(dim, kept.to(tensor.device))
    if tensor.dim() == 4 and not tensor.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _sliceable(model: nn.Module) -> set[str]:
    """The tensors of the layers whose sizes `_set_sizes` knows."""
    kinds = nn.Conv2d, nn.Linear, nn.modules.batchnorm._NormBase
    return {
        f"{name}.{own_name}" if name else own_name
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for own_name in (*module._parameters, *module._buffers)
    }


def _set_sizes(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels > 1:  # depthwise; of one channel, a dense one is no other
            module.groups = module.weight.shape[0]
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        sized = (*module._parameters.values(), module._buffers.get("running_mean"))
        module.num_features = next(len(tensor) for tensor in sized if tensor is not None)


def _out_channels(module: nn.Module) -> int | None:
    """Of a container: those of its last convolution, by which torchvision's call themselves."""
    if isinstance(module, nn.Conv2d):
        return None
    convs = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
    return convs[-1].out_channels if convs else None


_FIXED = "fixed"  # what is tied to it stays
_KEEPING = {"activation", "add_scalar", "mul_scalar", "global_avg_pool", "pool2d", "pad"}


class _Widths:
    """Sets of what has one number of channels: nodes of the graph, and (name, dimension) of tensors."""

    def __init__(self, graph: Graph, names: dict[str, str], sliceable: set[str]) -> None:
        self.graph, self.names, self.sliceable = graph, names, sliceable
        self.parents: dict[Hashable, Hashable] = {}
        self.order: dict[tuple[str, int], None] = {}  # of tensors
        self.pooled: set[Node] = set()  # images of one pixel: a squeeze-and-excitation's, and the head's
        for node in graph.nodes:
            self.visit(node)
            if node.op == "global_avg_pool" or (node.inputs and all(x in self.pooled for x in node.inputs)):
                self.pooled.add(node)
        self.tie(_FIXED, *graph.output_nodes())

    def root(self, item: Hashable) -> Hashable:
        while (parent := self.parents.setdefault(item, item)) != item:
            item = parent
        return item

    def tie(self, *items: Hashable) -> None:
        for item in items[1:]:
            self.parents[self.root(item)] = self.root(items[0])

    def tie_tensor(self, node: Node, name: str | None, dim: int = 0) -> None:
        if name is not None:
            name = self.names.get(name, name)
            self.order.setdefault((name, dim))
            self.tie(node, (name, dim))
            if name not in self.sliceable:
                self.tie(_FIXED, node)

    def visit(self, node: Node) -> None:
        op, inputs = node.op, node.inputs
        if op in ("conv2d", "linear"):
            self.visit_layer(node, inputs[0])
        elif op == "batch_norm":
            norm = node.attrs["batch_norm"]
            self.tie(node, inputs[0])
            for name in (norm.weight, norm.bias, norm.mean, norm.var):
                self.tie_tensor(node, name)
        elif op in _KEEPING or self.is_elementwise(node):
            self.tie(node, *inputs)
        elif op in ("add", "mul", "expand", "reshape"):
            for x in inputs:
                # The same batch and channels: what is behind them alone has another shape, or is repeated.
                same = len(node.shape) > 1 and x.shape[:2] == node.shape[:2]
                self.tie(node, x) if same else self.tie(_FIXED, node, x)
        else:
            self.tie(_FIXED, node, *inputs, *self.dimensions(node))

    def visit_layer(self, node: Node, x: Node) -> None:
        weights = node.attrs["weights"]
        groups = node.attrs.get("groups", 1)
        self.tie_tensor(node, weights.weight)
        self.tie_tensor(node, weights.bias)
        if groups == 1:
            self.tie_tensor(x, weights.weight, 1)
            if node.op == "linear" and len(node.shape) > 2:
                self.tie(_FIXED, node, x)
        else:
            self.tie(node, x)
            if not groups == x.shape[1] == node.shape[1]:
                self.tie(_FIXED, node)

    def is_elementwise(self, node: Node) -> bool:
        """Whether it maps each number of one tensor to one."""
        if node.op != "aten" or len(node.inputs) != 1 or node.shape != node.inputs[0].shape or self.dimensions(node):
            return False
        return torch.Tag.pointwise in node.attrs["call"].target.tags

    def dimensions(self, node: Node) -> list[tuple[str, int]]:
        """Of the tensors of the model's own that an operation takes."""
        call = node.attrs.get("call")
        constants = pytree.tree_leaves(call.arguments) if call else []
        return [
            (self.names.get(c.name, c.name), dim)
            for c in constants
            if isinstance(c, Constant)
            for dim in range(self.graph.constants[c.name].dim())
        ]

    def layers(self, root: Hashable) -> Iterator[tuple[str, Node]]:
        """Those that have a width, and what each is to it."""
        for node in self.graph.nodes:
            if node.op == "batch_norm" and self.root(node) == root:
                yield "norms", node
            elif node.op in ("conv2d", "linear"):
                is_pooled = node.inputs[0] in self.pooled
                if node.attrs.get("groups", 1) > 1:
                    if self.root(node) == root:
                        yield "depthwise", node
                    continue
                if self.root(node) == root:
                    yield "excites" if is_pooled else "writers", node
                if self.root(node.inputs[0]) == root:
                    yield "squeezes" if is_pooled else "readers", node

    def groups(self) -> list[ChannelGroup]:
        roots = dict.fromkeys(self.root(node) for node in self.graph.nodes)
        del roots[self.root(_FIXED)]
        layers: dict[Hashable, dict[str, list[Node]]] = {}
        for root in roots:
            layers[root] = defaultdict(list)
            for role, node in self.layers(root):
                layers[root][role].append(node)
        deep = {root for root in roots if layers[root]["depthwise"]}
        bottlenecks = {
            root
            for root in roots
            for node in layers[root]["writers"]
            if node.attrs["kernel"] == (1, 1) and self.root(node.inputs[0]) in deep
        }
        between = {
            root
            for root in roots
            if layers[root]["writers"]
            and layers[root]["readers"]
            and all(self.root(node.inputs[0]) in bottlenecks for node in layers[root]["writers"])
            and all(self.root(node) in bottlenecks for node in layers[root]["readers"])
        }
        # A sum of residuals is of blocks' outputs, also where a depthwise convolution stands before an expansion.
        summed = {self.root(node) for node in self.graph.nodes if node.op == "add"}
        found = []
        for root in roots:
            if root not in deep | bottlenecks | between or not layers[root]["writers"]:
                continue
            expands = root in between or (root in deep and len(layers[root]["writers"]) == 1)
            expands = expands and root not in summed
            found.append(self.group(root, "expansion" if expands else "bottleneck", layers[root]))
        return found

    def group(self, root: Hashable, kind: str, layers: dict[str, list[Node]]) -> ChannelGroup:
        if not layers["excites"]:  # the head's layers read behind a pooling too
            layers["readers"] += layers.pop("squeezes", [])
        squeeze_excite = sorted(layers["squeezes"] + layers["excites"], key=self.graph.nodes.index)

        def names(nodes: list[Node]) -> tuple[str, ...]:
            found = []
            for node in nodes:
                norm = node.attrs.get("batch_norm")
                name = norm.mean if norm else node.attrs["weights"].weight
                found.append(self.names[name].rpartition(".")[0])
            return tuple(dict.fromkeys(found))

        return ChannelGroup(
            kind,
            names(layers["writers"]),
            names(layers["depthwise"]),
            names(layers["norms"]),
            names(squeeze_excite),
            names(layers["readers"]),
            tuple(tensor for tensor in self.order if self.root(tensor) == root),
        )
