"""``torch.compile(model, backend="mobilenet_fast")``, which torch finds by the package's entry point."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import _C, reference
from ..messages import first_line
from .module import AcceleratedModule

_log = logging.getLogger(__name__)
_MAX_WEIGHTS = 8
_MAX_NUMBERS = 8


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None) -> Callable:
    """What TorchDynamo calls for each graph that it captures.

    The graph runs as :func:`accelerate` runs a model: as plans, made at the first call with each set of input shapes.
    Weights are packed once for each set of parameters and buffers, and again when PyTorch has counted that one of them
    was written to: not through ``.data`` or numpy, nor of inference tensors, for which nothing is counted. Graphs that
    need gradients, and those that are not for float32 or float64 tensors on the CPU, that run under autocast, that
    write to their inputs or weights, or that cannot be captured, run in PyTorch; the log says why (logger
    ``mobilenet_fast.accelerate.backend``, level INFO).

    Args:
        graph: what the graph's operations are.
        inputs: examples of the graph's inputs, parameters and buffers among them.
        options: ``{"strict": True}`` raises NotImplementedError where something would run in PyTorch for another reason
            than gradients, as the argument of :func:`accelerate` does.

    Returns:
        A function of the graph's inputs.

    Raises:
        ValueError: there is no such option.
    """
    options = dict(options or {})
    strict = options.pop("strict", False)
    if options:
        raise ValueError(f"mobilenet_fast backend: options may have strict, got {', '.join(map(repr, options))}")
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        _log.info("a graph runs in PyTorch: it needs gradients")
        return graph.forward
    why = _why_not(tensors)
    if why is None:
        return _CompiledGraph(graph, strict)
    if strict:
        raise NotImplementedError(f"mobilenet_fast backend: {why}")
    _log.info("a graph runs in PyTorch: %s", why)
    return graph.forward


def _why_not(tensors: list[Tensor]) -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return f"an input is {tensor.layout} on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            return f"an input is {tensor.dtype}"
    if not any(tensor.is_floating_point() for tensor in tensors):
        return "no input is float32 or float64"
    return None


class _CompiledGraph:
    """Runs a graph on the accelerated form that has the weights of the call."""

    def __init__(self, graph: fx.GraphModule, strict: bool):
        self.graph, self.strict = graph, strict
        placeholders = graph.graph.find_nodes(op="placeholder")
        is_weight = [bool(p.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")) for p in placeholders]
        self.weight_positions = [i for i, weight in enumerate(is_weight) if weight]
        self.plain, derived, self.numbers = _for_export(graph)
        self.input_positions = [i for i, weight in enumerate(is_weight) if not weight and i not in derived]
        # With torch._inductor.config.freezing, Dynamo leaves them in the graph.
        self.own_weights = [*graph.parameters(), *graph.buffers()]
        self.forms: list[_Form] = []
        self.seen: set[tuple] = set()  # numbers, each of which takes a capture of its own
        self.refused = False

    def __call__(self, *args: Any) -> Any:
        if self.refused:
            return self.graph(*args)
        weights = [args[i] for i in self.weight_positions]
        inputs = [args[i].item() if i in self.numbers else args[i] for i in self.input_positions]
        try:
            outputs = self.run(weights, inputs)
            if outputs is not None:
                return self.arrange(outputs)
        except Exception as error:
            if self.strict:
                raise
            outputs = self.graph(*args)  # where an error of the caller's comes again
            self.refuse(first_line(error))
            return outputs
        return self.graph(*args)

    def run(self, weights: list[Tensor], inputs: list[Any]) -> Sequence[Tensor] | None:
        """The outputs, or None if the graph was refused."""
        numbers = tuple(value for value in inputs if not isinstance(value, Tensor))
        if numbers:
            self.seen.add(numbers)
            if len(self.seen) > _MAX_NUMBERS:
                return self.refuse("its numbers change all the time")
        everything = self.own_weights + weights
        form = next((form for form in self.forms if form.has(everything)), None)
        if form is None:
            form = self.form(weights, everything)
            if why := form.fast._plan(tuple(inputs), {})[1].capture.shared_memory:
                if self.strict:
                    raise NotImplementedError(f"mobilenet_fast backend: the graph {why}")
                return self.refuse(why)
            # The same tensors with other values, and those that have been away longest, make room.
            self.forms = [form, *(f for f in self.forms if not f.is_of(everything))][:_MAX_WEIGHTS]
        return form.fast(*inputs)

    def form(self, weights: list[Tensor], everything: list[Tensor]) -> _Form:
        module = _WithWeights(self.plain, self.weight_positions, weights, self.input_positions)
        form = _Form(AcceleratedModule(module, strict=self.strict), everything)
        alike = next((other for other in self.forms if other.resembles(form)), None)
        if alike is not None:  # what was captured holds no weights
            form.fast._take_captures(alike.fast)
        return form

    def arrange(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """In the layouts that the graph gives them: what follows was compiled for those."""
        if all(
            layout is None or y.is_contiguous(memory_format=layout)
            for y, layout in zip(outputs, self.layouts, strict=True)
        ):
            return outputs
        return tuple(
            y if f is None else y.contiguous(memory_format=f) for y, f in zip(outputs, self.layouts, strict=True)
        )

    @cached_property
    def layouts(self) -> list[torch.memory_format | None]:
        return [_layout(output) for output in self.graph.graph.output_node().args[0]]

    def refuse(self, why: str) -> None:
        _log.info("a graph runs in PyTorch: %s", why)
        self.refused, self.forms = True, []


class _Form:
    """A graph with weights packed, and which those were."""

    def __init__(self, fast: AcceleratedModule, weights: list[Tensor]):
        self.fast, self.weights = fast, weights
        self.counting = [weight for weight in weights if not weight.is_inference()]  # how often they were written to
        self.versions = self.current_versions()
        # Batch norm in training writes to its statistics without counting it.
        self.statistics = [w for w in weights if _may_be_statistics(w)]
        self.statistics_then = [statistic.clone() for statistic in self.statistics]

    def is_of(self, weights: list[Tensor]) -> bool:
        return all(map(is_, self.weights, weights))

    def has(self, weights: list[Tensor]) -> bool:
        return (
            self.is_of(weights)
            and self.versions == self.current_versions()
            and _C.hold_the_same(self.statistics, self.statistics_then)
        )

    def resembles(self, other: _Form) -> bool:
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(self.weights, other.weights, strict=True))

    def current_versions(self) -> list[int]:
        return [weight._version for weight in self.counting]


def _may_be_statistics(weight: Tensor) -> bool:
    return type(weight) is Tensor and weight.dim() == 1 and weight.is_floating_point() and weight.is_contiguous()


class _WithWeights(nn.Module):
    """A graph that takes some of its inputs from its own buffers."""

    def __init__(self, graph: fx.GraphModule, positions: list[int], weights: list[Tensor], inputs: list[int]):
        super().__init__()
        self.graph, self.inputs = graph, inputs
        self.names = {}
        for position, weight in zip(positions, weights, strict=True):
            self.names[position] = name = f"weight_{position}"
            self.register_buffer(name, weight.detach())
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        given = dict(zip(self.inputs, inputs, strict=True)) | {i: getattr(self, n) for i, n in self.names.items()}
        return self.graph(*(given[i] for i in sorted(given)))


def _for_export(graph: fx.GraphModule) -> tuple[fx.GraphModule, set[int], set[int]]:
    """A copy of the graph without our own operators, where sizes come from the tensors that have them, so that one
    capture serves every batch, and numbers are numbers. Which inputs are but such sizes, and which are numbers in
    tensors, comes with it.
    """
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for node in copied.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if "mobilenet_fast" in getattr(node.target, "__module__", "") and hasattr(reference, name.split(".")[0]):
            node.target = getattr(reference, name.split(".")[0])
    placeholders = copied.find_nodes(op="placeholder")
    sizes, numbers = set(), set()
    for i, node in enumerate(placeholders):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and (found := _dimension_of(value, placeholders)) is not None:
            sizes.add(i)
            with copied.inserting_after(placeholders[-1]):
                node.replace_all_uses_with(copied.call_method("size", found))
        elif _is_number(node):
            numbers.add(i)
            for user in list(node.users):
                user.replace_all_uses_with(node)
                copied.erase_node(user)
    for i in sizes:
        copied.erase_node(placeholders[i])
    return fx.GraphModule(graph, copied), sizes, numbers


def _layout(output: Any) -> torch.memory_format | None:
    """Of an image among a graph's outputs."""
    value = output.meta.get("example_value") if isinstance(output, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    layouts = (torch.contiguous_format, torch.channels_last)
    return next((layout for layout in layouts if value.is_contiguous(memory_format=layout)), None)


def _is_number(node: fx.Node) -> bool:
    """Whether an input is a Python number that Dynamo put into a tensor, since another may come."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor) or value.dim() > 0 or not node.users:
        return False
    return all(user.op == "call_method" and user.target == "item" for user in node.users)


def _dimension_of(size: torch.SymInt, placeholders: list[fx.Node]) -> tuple[fx.Node, int] | None:
    for node in placeholders:
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor):
            continue
        for dim, other in enumerate(value.shape):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return node, dim
    return None
