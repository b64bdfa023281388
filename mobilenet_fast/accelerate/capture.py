"""From a module to ATen operations: ``torch.export`` with a symbolic batch where possible, and the lowering of its graph to
:class:`~mobilenet_fast.accelerate.graph.Graph` for one concrete input shape.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import sympy
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .graph import BatchNorm, Call, Constant, Graph, Node, Weights

aten = torch.ops.aten
_capture_ids = itertools.count()


class Capture:
    """An exported program that serves every batch size from 2 on, and batch 1 where that was seen to take the same path;
    or, when the batch could not stay symbolic, exactly the example's shapes.
    """

    def __init__(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]):
        self.id = next(_capture_ids)
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.examples = [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        symbolic = len(tensors) == 1 and tensors[0].dim() >= 2
        self.serves_batch_1 = symbolic and tensors[0].size(0) == 1 and _same_path(model, args, kwargs)
        if symbolic and tensors[0].size(0) == 1 and not self.serves_batch_1:
            symbolic = False
        self.program = None
        if symbolic:
            try:
                self.program = _export(model, _with_batch((args, kwargs), max(2, tensors[0].size(0))), symbolic=True)
            except Exception:  # the batch could not stay symbolic: the error, if it is one, comes again below
                self.program = None
        if self.program is None:
            self.program = _export(model, (args, kwargs), symbolic=False)
        if _has_aliased_writes(self.program.graph):
            self.program = self.program.run_decompositions({})
        signature = self.program.graph_signature
        self.inputs_to_constants: dict[str, str] = {}
        for spec in signature.input_specs:
            kind = spec.kind.name
            if kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
                self.inputs_to_constants[spec.arg.name] = (
                    spec.target if spec.target in self.program.state_dict else f"{self.id}:{spec.target}"
                )
        self.placeholders = [
            node
            for node in self.program.graph.nodes
            if node.op == "placeholder" and node.name not in self.inputs_to_constants
        ]
        self.out_spec = self.program.call_spec.out_spec

    def serves(self, leaves: list[Any]) -> bool:
        """Whether inputs of these shapes can run on this capture."""
        return self._symbols(leaves) is not None

    def _symbols(self, leaves: list[Any]) -> dict[Any, int] | None:
        symbols: dict[Any, int] = {}
        if len(leaves) != len(self.placeholders):
            return None
        for placeholder, leaf in zip(self.placeholders, leaves, strict=True):
            value = placeholder.meta.get("val")
            if not isinstance(value, torch.Tensor):
                if value is not leaf and value != leaf:
                    return None
                continue
            if not isinstance(leaf, torch.Tensor) or value.dim() != leaf.dim() or value.dtype != leaf.dtype:
                return None
            for expected, actual in zip(value.shape, leaf.shape, strict=True):
                if not isinstance(expected, torch.SymInt):
                    if expected != actual:
                        return None
                    continue
                expression = expected.node.expr
                if not expression.is_Symbol or symbols.setdefault(expression, actual) != actual:
                    return None
                bounds = self.program.range_constraints.get(expression)
                if actual == 1 and self.serves_batch_1:
                    continue
                if actual == 1 or (bounds is not None and not bounds.lower <= max(actual, 2) <= bounds.upper):
                    return None
        return symbols

    def lower(self, leaves: list[Any], state: dict[str, torch.Tensor]) -> Graph:
        """The graph for inputs of these shapes. ``state`` holds the module's parameters and buffers by name."""
        return _Lowering(self, self._symbols(leaves) or {}, leaves, state).graph()


def _with_batch(tree: Any, batch: int) -> Any:
    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.zeros((batch, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device)

    return pytree.tree_map(widen, tree)


def _export(model: torch.nn.Module, inputs: tuple[tuple, dict], *, symbolic: bool) -> torch.export.ExportedProgram:
    args, kwargs = inputs
    shapes = torch.export.ShapesCollection() if symbolic else None
    if shapes is not None:
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, torch.Tensor):
                shapes[leaf] = {0: torch.export.Dim.AUTO}
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


class _Trace(TorchFunctionMode):
    """Notes each torch function called and the shapes of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Size]]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf.shape for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.calls.append((getattr(func, "__name__", str(func)), tensors))
        return result


def _same_path(model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the model does the same with one image as with two: the same functions, with shapes that differ by the batch
    alone. A symbolic batch stands for two or more, so one image needs this look of its own (think of ``squeeze()``).
    """
    calls = []
    for batch in (1, 2):
        trace = _Trace()
        wide_args, wide_kwargs = _with_batch((args, kwargs), batch)
        try:
            with torch.no_grad(), trace:
                model(*wide_args, **wide_kwargs)
        except Exception:
            if batch == 1:
                raise
            return False
        calls.append(trace.calls)
    if len(calls[0]) != len(calls[1]):
        return False
    for (name1, shapes1), (name2, shapes2) in zip(*calls, strict=True):
        if name1 != name2 or [len(s) for s in shapes1] != [len(s) for s in shapes2]:
            return False
        for shape1, shape2 in zip(shapes1, shapes2, strict=True):
            if any(d2 not in (d1, 2 * d1) for d1, d2 in zip(shape1, shape2, strict=True)):
                return False
    return True


def _is_view(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _written(node: torch.fx.Node) -> torch.fx.Node | None:
    """The node that an in-place operation writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return None
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.fx.Node):
            return value
    return None


def _has_aliased_writes(graph: torch.fx.Graph) -> bool:
    """Whether something is written in place that a later node reads under another name: a view, or the base of one."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    identity: dict[torch.fx.Node, torch.fx.Node] = {}  # the tensor that a node stands for: writing returns its argument
    base: dict[torch.fx.Node, torch.fx.Node] = {}  # the tensor whose memory it shares
    members: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        written = _written(node)
        source = written
        if written is None and _is_view(node):
            source = next((arg for arg in node.all_input_nodes), None)
        identity[node] = node if written is None else identity[written]
        base[node] = node if source is None else base[source]
        members.setdefault(base[node], []).append(node)
    for node in graph.nodes:
        written = _written(node)
        if written is None:
            continue
        for other in members[base[node]]:
            same_tensor = identity[other] is identity[written]
            if not same_tensor and any(position[user] > position[node] for user in other.users):
                return True
    return False


_IDENTITIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
}
_RESHAPES = {
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_REFUSED = "accelerate: {} cannot be a step of a plan"


class _Lowering:
    def __init__(self, capture: Capture, symbols: dict, leaves: list[Any], state: dict[str, torch.Tensor]):
        self.capture = capture
        self.symbols = {symbol: sympy.Integer(size) for symbol, size in symbols.items()}
        self.env: dict[torch.fx.Node, Any] = {}  # a Node, a constant's name, or a plain Python value
        self.nodes: list[Node] = []
        self.constants = dict(state)
        program = capture.program
        for name, tensor in program.constants.items():
            if isinstance(tensor, torch.Tensor):
                self.constants.setdefault(f"{capture.id}:{name}", tensor.detach())
        self.dtype = next((t.dtype for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
        if self.dtype not in (torch.float32, torch.float64):
            self.dtype = torch.float32
        self.inputs = []
        for placeholder, leaf in zip(capture.placeholders, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                node = Node("input", [], tuple(leaf.shape), leaf.dtype, name=placeholder.name)
                self.inputs.append(node)
                self.nodes.append(node)
                self.env[placeholder] = node
            else:
                self.env[placeholder] = leaf

    def graph(self) -> Graph:
        outputs: list[Any] = []
        for fx_node in self.capture.program.graph.nodes:
            if fx_node.op == "placeholder":
                if fx_node not in self.env:
                    self.env[fx_node] = Constant(self.capture.inputs_to_constants[fx_node.name])
            elif fx_node.op == "output":
                outputs = [
                    self.value(item) for item in pytree.tree_leaves(fx_node.args[0], is_leaf=lambda x: x is None)
                ]
            elif fx_node.op == "call_function":
                self.call(fx_node)
            else:
                raise NotImplementedError(_REFUSED.format(fx_node.format_node()))
        outputs = [self.constants[o.name].clone() if isinstance(o, Constant) else o for o in outputs]
        return Graph(self.nodes, self.inputs, outputs, self.constants, self.dtype)

    def value(self, item: Any) -> Any:
        """An fx argument with nodes looked up and symbolic sizes made concrete."""
        if isinstance(item, torch.fx.Node):
            return self.env[item]
        if isinstance(item, (list, tuple)):
            return [self.value(each) for each in item]
        return self.concrete(item)

    def concrete(self, item: Any) -> Any:
        if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            result = item.node.expr.xreplace(self.symbols)
            if isinstance(item, torch.SymInt):
                return int(result)
            return float(result) if isinstance(item, torch.SymFloat) else bool(result)
        return item

    def shape(self, fake: torch.Tensor) -> tuple[int, ...]:
        return tuple(self.concrete(size) for size in fake.shape)

    def add(self, fx_node: torch.fx.Node, op: str, call: Call, **attrs: Any) -> Node:
        fake = fx_node.meta["val"]
        shape, dtype = (self.shape(fake), fake.dtype) if isinstance(fake, torch.Tensor) else ((), torch.float32)
        node = Node(op, list(call.inputs), shape, dtype, {"call": call, **attrs}, fx_node.name)
        self.nodes.append(node)
        return node

    def call(self, fx_node: torch.fx.Node) -> None:
        target, fake = fx_node.target, fx_node.meta.get("val")
        if target is operator.getitem:
            source = self.value(fx_node.args[0])
            if isinstance(source, (list, tuple)):
                self.env[fx_node] = source[fx_node.args[1]]
                return
        if not isinstance(target, torch._ops.OpOverload):
            if isinstance(fake, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
                self.env[fx_node] = self.concrete(fake)
                return
            raise NotImplementedError(_REFUSED.format(target))
        leaves = pytree.tree_leaves(fake)
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            if fake is not None:
                self.env[fx_node] = pytree.tree_map(self.concrete, fake)
            return  # a size, or an assertion about sizes
        written = _written(fx_node)
        if written is not None:
            target = _functional(target)
        arguments = self.arguments(fx_node, target)
        tensors = [a for a in pytree.tree_leaves(arguments) if isinstance(a, (Node, Constant))]
        if written is not None and isinstance(self.env[written], Constant):
            raise NotImplementedError(f"accelerate: the model changes its own '{self.env[written].name}' in forward")
        if tensors and all(isinstance(a, Constant) for a in tensors):
            result = self.fold_constant(fx_node, target, arguments)
        else:
            result = self.lower(fx_node, target, arguments)
        self.env[fx_node] = result
        while written is not None:  # later readers of what was written see the result
            self.env[written] = result
            written = _written(written)

    def arguments(self, fx_node: torch.fx.Node, target: torch._ops.OpOverload) -> list[Any]:
        """All arguments in the order of the schema, defaults filled in."""
        arguments = []
        for i, argument in enumerate(target._schema.arguments):
            if i < len(fx_node.args):
                arguments.append(self.value(fx_node.args[i]))
            elif argument.name in fx_node.kwargs:
                arguments.append(self.value(fx_node.kwargs[argument.name]))
            else:
                arguments.append(argument.default_value)
        return arguments

    def fold_constant(self, fx_node: torch.fx.Node, target: torch._ops.OpOverload, arguments: list[Any]) -> Any:
        def tensor(argument: Any) -> Any:
            return self.constants[argument.name] if isinstance(argument, Constant) else argument

        with torch.no_grad():
            result = _call_with_schema(target, pytree.tree_map(tensor, arguments))

        def name(index: int, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            constant = Constant(f"{self.capture.id}:{fx_node.name}:{index}")
            self.constants[constant.name] = value
            return constant

        if isinstance(result, (list, tuple)):
            return [name(i, value) for i, value in enumerate(result)]
        return name(0, result)

    def lower(self, fx_node: torch.fx.Node, target: torch._ops.OpOverload, arguments: list[Any]) -> Any:
        fake = fx_node.meta["val"]
        call = Call(target, arguments)
        x = arguments[0] if arguments else None
        if isinstance(fake, torch.Tensor) and isinstance(x, Node) and x.dtype == fake.dtype == self.dtype:
            if target in _IDENTITIES and self.shape(fake) == x.shape:
                return x
            for targets, op, rule in _RULES:
                if target in targets:
                    attrs = rule(self, target, *arguments)
                    if attrs is not None:
                        return self.add(fx_node, op or attrs.pop("op"), call, **attrs)
        node = self.add(fx_node, "aten", call)
        if isinstance(fake, torch.Tensor):
            return node
        # Several results: a node each, which reads the call's.
        results: list[Any] = []
        for index, each in enumerate(fake):
            if not isinstance(each, torch.Tensor):
                results.append(each)
                continue
            result = Node("result", [node], self.shape(each), each.dtype, {"index": index}, f"{fx_node.name}_{index}")
            self.nodes.append(result)
            results.append(result)
        return results


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The out-of-place form of an in-place operator."""
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None:
        raise NotImplementedError(_REFUSED.format(f"{target} (it writes in place)"))
    return overload


def _call_with_schema(target: torch._ops.OpOverload, arguments: list[Any]) -> Any:
    """Calls an operator with arguments in the order of its schema, keyword-only ones by name."""
    positional, keywords = [], {}
    for argument, value in zip(target._schema.arguments, arguments, strict=True):
        if argument.kwarg_only:
            keywords[argument.name] = value
        else:
            positional.append(value)
    return target(*positional, **keywords)


def _name(argument: Any) -> str | None:
    return argument.name if isinstance(argument, Constant) else None


def _pair(value: Any) -> tuple[int, int]:
    value = list(value) if isinstance(value, (list, tuple)) else [value]
    return (value[0], value[-1])


# What a node of our own operations needs to know, from the arguments of an ATen operator in the order of its schema; None
# where the operation does not fit, which leaves the call to ATen.


def _conv2d(lowering, target, x, weight, bias, stride, padding, dilation, groups):
    if not isinstance(weight, Constant) or isinstance(bias, Node) or len(x.shape) != 4:
        return None
    kernel = tuple(lowering.constants[weight.name].shape[2:])
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pads = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        ph, pw = (0, 0) if padding == "valid" else _pair(padding)
        pads = (ph, ph, pw, pw)
    return {
        "weights": Weights(weight.name, _name(bias)),
        "kernel": kernel,
        "stride": stride,
        "padding": pads,  # top, bottom, left, right
        "dilation": dilation,
        "groups": groups,
    }


def _linear(lowering, target, x, weight, bias):
    if not isinstance(weight, Constant) or isinstance(bias, Node) or len(x.shape) not in (2, 3):
        return None
    return {"weights": Weights(weight.name, _name(bias))}


def _batch_norm(lowering, target, x, weight, bias, mean, var, training, momentum, eps, cudnn):
    if training or not isinstance(mean, Constant) or not isinstance(var, Constant):
        return None
    return {"batch_norm": BatchNorm(_name(weight), _name(bias), mean.name, var.name, eps)}


def _binary(lowering, target, x, y, alpha=1):
    kind = target._schema.name.split("::")[1]
    if isinstance(y, Constant) and lowering.constants[y.name].dim() == 0:
        y = lowering.constants[y.name].item()
    if isinstance(y, (int, float)) and not isinstance(y, bool):
        if kind == "add":
            return {"op": "add_scalar", "value": float(y) * alpha}
        if kind == "sub":
            return {"op": "add_scalar", "value": -float(y) * alpha}
        return {"op": "mul_scalar", "value": 1.0 / y if kind == "div" else float(y)} if y != 0 else None
    if isinstance(y, Node) and kind in ("add", "mul") and y.dtype == x.dtype and alpha == 1:
        return {"op": kind}
    return None


def _clamp(lowering, target, x, low=None, high=None):
    names = {(0, None): "relu", (0, 6): "relu6"}
    simple = all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))
    return {"activation": names[low, high]} if simple and (low, high) in names else None


def _mean(lowering, target, x, dims, keepdim, dtype):
    if len(x.shape) != 4 or dims is None or dtype not in (None, x.dtype) or sorted(d % 4 for d in dims) != [2, 3]:
        return None
    return {}


def _adaptive_avg_pool2d(lowering, target, x, size):
    return {} if len(x.shape) == 4 and _pair(size) == (1, 1) else None


def _avg_pool2d(lowering, target, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    whole = len(x.shape) == 4 and _pair(kernel) == x.shape[2:] and _pair(padding) == (0, 0)
    return {} if whole and divisor is None else None


def _pad(lowering, target, x, pads, mode="constant", value=None):
    if target is aten.constant_pad_nd.default:
        mode, value = "constant", mode
    if mode != "constant" or (value or 0) != 0 or len(x.shape) != 4 or len(pads) > 4 or min(pads) < 0:
        return None
    left, right, top, bottom = (*pads, 0, 0)[:4]
    return {"padding": (top, bottom, left, right)}


def _always(lowering, target, *arguments):
    return {}


def _activation(name):
    return lambda lowering, target, x: {"activation": name}


_RULES = [
    ({aten.relu.default}, "activation", _activation("relu")),
    ({aten.relu6.default}, "activation", _activation("relu6")),
    ({aten.hardswish.default}, "activation", _activation("hardswish")),
    ({aten.hardsigmoid.default}, "activation", _activation("hardsigmoid")),
    ({aten.silu.default}, "activation", _activation("silu")),
    ({aten.sigmoid.default}, "activation", _activation("sigmoid")),
    ({aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}, "activation", _clamp),
    ({aten.conv2d.default, aten.conv2d.padding}, "conv2d", _conv2d),
    ({aten.linear.default}, "linear", _linear),
    ({aten.batch_norm.default}, "batch_norm", _batch_norm),
    ({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}, None, _binary),
    ({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}, None, _binary),
    ({aten.mean.dim}, "global_avg_pool", _mean),
    ({aten.adaptive_avg_pool2d.default}, "global_avg_pool", _adaptive_avg_pool2d),
    ({aten.avg_pool2d.default}, "global_avg_pool", _avg_pool2d),
    ({aten.pad.default, aten.constant_pad_nd.default}, "pad", _pad),
    ({aten.expand.default}, "expand", _always),
    (_RESHAPES, "reshape", _always),
]
