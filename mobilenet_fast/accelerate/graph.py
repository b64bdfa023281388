"""The small graph that passes work on: a list of nodes in execution order, each with one tensor result.

Operations: ``conv2d`` and ``linear`` (dense, pointwise, depthwise: one node with weights, see :class:`Weights`),
``batch_norm``, ``activation``, ``add``, ``mul``, ``add_scalar``, ``mul_scalar``, ``global_avg_pool``, ``pool2d``
(maxima or means over windows), ``cat`` (of channels), ``channels`` (some, from ``start`` on), ``pad``, ``expand``,
``reshape``, ``squeeze_excite`` (its result is the gate), ``gate`` (x times a gate), ``input``, ``aten`` for everything
else, and ``result`` for one of several results of such a call. Shapes are concrete: a graph belongs to one input shape.
``inverted_residual`` comes with :func:`~mobilenet_fast.accelerate.blocks.fuse_blocks`, ``part`` and ``whole`` with
:func:`~mobilenet_fast.accelerate.batch.split_batch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .outputs import Structure


@dataclass(eq=False)
class Node:
    """One operation. ``inputs`` are the nodes whose results it reads; ``attrs`` are its constants."""

    op: str
    inputs: list[Node]
    shape: tuple[int, ...]
    dtype: torch.dtype
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    parts: int = 1
    """How often it runs for a whole batch, of which ``shape`` is a part then."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return (self.shape[0] * self.parts, *self.shape[1:]) if self.parts > 1 else self.shape

    @property
    def activation(self) -> str:
        return self.attrs.get("activation", "none")

    def __repr__(self) -> str:
        return f"{self.name}: {self.op}({', '.join(i.name for i in self.inputs)}) -> {self.shape}"


@dataclass(frozen=True)
class Constant:
    """A tensor known before the network runs, by its name in :attr:`Graph.constants`, and its dtype in the network, if
    that differs.
    """

    name: str
    dtype: torch.dtype | None = None

    def of(self, constants: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tensor as the network has it."""
        tensor = constants[self.name]
        return tensor if self.dtype is None else tensor.to(self.dtype)


@dataclass(frozen=True)
class Slot:
    """Stands for ``inputs[index]`` of a node among the arguments of its call."""

    index: int


class Call:
    """The ATen operator that a node came from, with all arguments in the order of the schema: what runs where no kernel
    of ours serves. Nodes among the arguments are kept as :class:`Slot`, since passes change a node's inputs.
    """

    def __init__(self, target: torch._ops.OpOverload, arguments: list[Any]):
        self.target = target
        self.inputs: list[Node] = []
        self.arguments = [self._slot(argument) for argument in arguments]

    def _slot(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            self.inputs.append(argument)
            return Slot(len(self.inputs) - 1)
        if isinstance(argument, (list, tuple)):
            return [self._slot(each) for each in argument]
        return argument


@dataclass(frozen=True)
class BatchNorm:
    """Names of a batch norm's tensors, and its epsilon."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Weights:
    """Names of a layer's tensors, and the batch norms and factors folded into it: the key of packed weights."""

    weight: str
    bias: str | None
    folded: tuple[BatchNorm | float, ...] = ()


@dataclass
class Graph:
    """Nodes in execution order; ``inputs`` in the order of the call."""

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Any]
    """Nodes, constant tensors and plain values."""
    out_spec: pytree.TreeSpec | Structure
    """How the model arranges its outputs."""
    constants: dict[str, torch.Tensor]
    """Every parameter, buffer and constant, by name. Weights may be more precise than :attr:`dtype`."""
    dtype: torch.dtype
    """What kernels of ours compute on; nodes of another type are ``aten``."""

    def users(self) -> dict[Node, list[Node]]:
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                users[source].append(node)
        return users

    def output_nodes(self) -> set[Node]:
        return {output for output in self.outputs if isinstance(output, Node)}

    def replace(self, old: Node, new: Node) -> None:
        """Makes every reader of ``old`` read ``new``."""
        for node in self.nodes:
            node.inputs = [new if source is old else source for source in node.inputs]
        self.outputs = [new if output is old else output for output in self.outputs]

    def remove_dead(self) -> None:
        live = self.output_nodes() | set(self.inputs)
        for node in reversed(self.nodes):
            if node in live:
                live.update(node.inputs)
        self.nodes = [node for node in self.nodes if node in live]

    def matches(self, test: Callable[[Node], bool]) -> Iterator[Node]:
        """The nodes that pass ``test``, while the graph changes under the caller's hands."""
        for node in list(self.nodes):
            if test(node):
                yield node
