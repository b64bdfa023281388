"""From a module to ATen operations: ``torch.export`` with a symbolic batch where possible, and the lowering of its
graph to :class:`~mobilenet_fast.accelerate.graph.Graph` for one concrete input shape.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .graph import BatchNorm, Call, Constant, Graph, Node, Weights
from .outputs import Flattened, Structure

aten = torch.ops.aten
_capture_ids = itertools.count()


class Capture:
    """An exported program that serves every batch size from 2 on, and batch 1 where that was seen to take the same
    path; or, of an empty batch or when the batch could not stay symbolic, exactly the example's shapes. It holds no
    parameters or buffers.
    ``structure`` is given where the outputs hold dataclasses.
    """

    def __init__(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], structure: Structure | None):
        self.id = next(_capture_ids)
        self.structure = structure
        model = model if structure is None else Flattened(model)
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        batches = {leaf.shape[:1] for leaf in leaves if isinstance(leaf, torch.Tensor)}
        batch = batches.pop()[0] if len(batches) == 1 and () not in batches else None
        self.serves_batch_1 = batch is not None and _same_path(model, args, kwargs)
        program = None
        if batch and (batch != 1 or self.serves_batch_1):
            try:
                program = _export(model, _with_batch((args, kwargs), max(2, batch)), symbolic=True)
            except Exception:  # the batch could not stay symbolic: the error, if it is one, comes again below
                pass
        if program is None or not self._take(program).serves(leaves):
            self._take(_export(model, (args, kwargs), symbolic=False))

    def _take(self, program: torch.export.ExportedProgram) -> Capture:
        for node in program.graph.nodes:
            # Dropout in evaluation mode gives its input back, the same memory.
            if node.target in _DROPOUTS and not node.args[2]:
                node.target, node.args = aten.alias.default, node.args[:1]
        _inline_regions(program.graph_module)
        self.shared_memory = _shared_memory(program, self._own)
        if _needs_functional(program.graph):
            program = program.run_decompositions({})
        signature = program.graph_signature
        mutated = {"BUFFER_MUTATION": "buffer", "PARAMETER_MUTATION": "parameter"}
        for spec in signature.output_specs:
            if spec.kind.name in mutated:
                raise NotImplementedError(_WRITES.format(f"{mutated[spec.kind.name]} '{self._own(spec.target)}'"))
        self.graph = program.graph
        self.range_constraints = program.range_constraints
        self.out_spec = self.structure or program.call_spec.out_spec
        # In functional graphs, what was written to inputs comes before the outputs: accelerated models leave inputs be.
        self.outputs = [i for i, spec in enumerate(signature.output_specs) if spec.kind.name == "USER_OUTPUT"]
        self.constants: dict[str, str] = {}  # by placeholder, the name in the model's state or in `tensors`
        self.tensors: dict[str, torch.Tensor] = {}  # what is no parameter or buffer
        for spec in signature.input_specs:
            if spec.kind.name in ("PARAMETER", "BUFFER"):
                self.constants[spec.arg.name] = self._own(spec.target)
            elif spec.kind.name == "CONSTANT_TENSOR":
                name = f"{self.id}:{spec.target}"
                self.constants[spec.arg.name] = name
                self.tensors[name] = program.constants[spec.target].detach()
        self.placeholders = [
            node for node in self.graph.nodes if node.op == "placeholder" and node.name not in self.constants
        ]
        return self

    def _own(self, name: str) -> str:
        """What the model itself calls a parameter or buffer."""
        return name if self.structure is None else name.removeprefix("model.")

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
                if type(value) is not type(leaf) or repr(value) != repr(leaf):
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
                bounds = self.range_constraints.get(expression)
                if actual == 1 and self.serves_batch_1:
                    continue
                if actual < 2 or (bounds is not None and not bounds.lower <= actual <= bounds.upper):
                    return None
        return symbols

    def lower(self, leaves: list[Any], state: dict[str, torch.Tensor], kernel_dtypes: tuple[torch.dtype, ...]) -> Graph:
        """The graph for inputs of these shapes, whose kernels take one of some dtypes, the first of them by default.

        ``state`` holds the module's parameters and buffers by name; floating-point ones may be of another dtype than
        those of the module that was captured.
        """
        return _Lowering(self, self._symbols(leaves) or {}, leaves, state, kernel_dtypes).graph()


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
    """Notes each torch function called, which tensors of what sizes and plain values it was given and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.numbers: dict[int, int] = {}  # of tensors computed, by identity
        self.seen: list[torch.Tensor] = []  # so that no other gets the identity of one that is gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.note(getattr(func, "__name__", str(func)), (args, kwargs, result))
        return result

    def note(self, what: str, values: Any) -> None:
        self.calls.append((what, *map(self.describe, pytree.tree_leaves(values))))

    def describe(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf if isinstance(leaf, (int, float, str, slice, torch.dtype)) else None
        if not isinstance(leaf, FakeTensor):
            return (f"own {id(leaf)}", *leaf.shape)
        if id(leaf) not in self.numbers:
            self.numbers[id(leaf)] = len(self.seen)
            self.seen.append(leaf)
        return (f"computed {self.numbers[id(leaf)]}", *leaf.shape)


_SEVERAL = 7
"""Images of a batch: a number that little else is likely to be."""


def _same_path(model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the model does the same with one image as with several: the same functions on the same tensors, with
    sizes that differ by the batch alone. A symbolic batch stands for two or more, so one image needs a look of its own:
    think of ``squeeze()``.
    """

    def same(one: Any, several: Any) -> bool:
        if isinstance(one, tuple) and isinstance(several, tuple) and len(one) == len(several):
            return all(map(same, one, several))
        if type(one) is int and type(several) is int:
            return several in (one, _SEVERAL * one)
        return type(one) is type(several) and one == several

    calls = []
    errors = logging.getLogger("torch._subclasses.fake_tensor")
    for batch in (1, _SEVERAL):
        trace = _Trace()
        was_disabled, errors.disabled = errors.disabled, True  # a batch that the model does not take is no news
        try:
            # Fake tensors compute nothing but shapes, and our own layers take them through plain PyTorch, as in export.
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
                wide_args, wide_kwargs = _with_batch((args, kwargs), batch)
                with trace:
                    result = model(*wide_args, **wide_kwargs)
                trace.note("result", result)
        except Exception:
            return False
        finally:
            errors.disabled = was_disabled
        calls.append(tuple(trace.calls))
    return same(*calls)


def _inline_regions(module: torch.fx.GraphModule) -> None:
    """Puts the bodies of ``with`` blocks that set what has no bearing here in place of the operators that run them."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            _, body, *inputs = node.args
        elif node.target is torch.ops.higher_order.wrap_with_autocast and not node.args[2]:
            _, _, _, _, body, *inputs = node.args
        else:
            continue
        body = getattr(module, body.target).graph
        placeholders = body.find_nodes(op="placeholder")
        with graph.inserting_before(node):
            outputs = graph.graph_copy(body, dict(zip(placeholders, inputs, strict=True)))
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    module.recompile()


def _arguments(node: torch.fx.Node) -> Iterator[tuple[torch.Argument, Any]]:
    """The arguments that a call was given, each with its entry in the schema."""
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            yield argument, node.args[i]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """The node whose memory this one may share, by the schema of its operation."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:  # one of several views
        return node.args[0]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target in _UNTOLD_VIEWS:
        return next(iter(node.all_input_nodes), None)
    if all(result.alias_info is None for result in node.target._schema.returns):
        return None
    return next((value for argument, value in _arguments(node) if argument.alias_info is not None), None)


def _written(node: torch.fx.Node) -> Any:
    """What an operation writes to in place: a node, or whatever else the schema allows."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    written = [value for argument, value in _arguments(node) if argument.is_write]
    return written[0] if len(written) == 1 else written or None


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The out-of-place form of an in-place operator, where there is one under that name."""
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


# Those that may give a view of their first tensor, or that itself, although their schemas do not say so.
_UNTOLD_VIEWS = {
    aten.broadcast_tensors.default,
    aten.channel_shuffle.default,
    aten.einsum.default,
    aten.meshgrid.default,
    aten.meshgrid.indexing,
    aten.type_as.default,
}


def _shared_memory(program: torch.export.ExportedProgram, own_name: Callable[[str], str]) -> str | None:
    """What a program does that others who hold its inputs, weights or outputs would see, if anything: accelerated
    models only read their inputs, and each output has memory of its own.

    Raises NotImplementedError where it writes to a view of what is the model's own.
    """
    signature = program.graph_signature
    inputs = set(signature.user_inputs)
    own = {spec.arg.name: spec for spec in signature.input_specs if spec.kind.name in _OWN}
    base: dict[torch.fx.Node, torch.fx.Node] = {}  # the tensor whose memory it may share
    shared = None
    for node in program.graph.nodes:
        written = _written(node)
        source = _viewed(node) if written is None else written
        base[node] = base[source] if isinstance(source, torch.fx.Node) else node
        bases = [base[n].name for n in pytree.tree_leaves(written) if isinstance(n, torch.fx.Node)]
        if changed := next((own[name] for name in bases if name in own), None):
            raise NotImplementedError(_WRITES.format(f"{_OWN[changed.kind.name]} '{own_name(changed.target)}'"))
        if any(name in inputs for name in bases):
            shared = "writes to an input"
    outputs = [value for value in program.graph.output_node().args[0] if isinstance(value, torch.fx.Node)]
    if not shared and any(base[output].name in inputs for output in outputs):
        shared = "returns memory of an input"
    bases = [base[output] for output in outputs]
    if not shared and (len(set(bases)) < len(bases) or any(b.name in own for b in bases)):
        shared = "returns memory of a weight, or the same memory twice"
    return shared


def _needs_functional(graph: torch.fx.Graph) -> bool:
    """Whether something is written in place in a way that renaming its later readers does not cover: it is read
    through a view, or through the base of one, is one of several, or keeps its dtype since it is written in place.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    identity: dict[torch.fx.Node, torch.fx.Node] = {}  # the tensor that a node stands for: writing returns its argument
    base: dict[torch.fx.Node, torch.fx.Node] = {}  # the tensor whose memory it shares
    members: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    writes = []
    for node in graph.nodes:
        written = _written(node)
        if written is not None:
            if not isinstance(written, torch.fx.Node) or _functional(node.target) is None:
                return True
            operands = [written, *node.all_input_nodes]
            if len({n.meta["val"].dtype for n in operands if isinstance(n.meta.get("val"), torch.Tensor)}) > 1:
                return True
            writes.append(node)
        source = written if written is not None else _viewed(node)
        identity[node] = node if written is None else identity[written]
        base[node] = base[source] if isinstance(source, torch.fx.Node) else node
        members.setdefault(base[node], []).append(node)
    for node in writes:
        for other in members[base[node]]:
            # A view taken later is one of the result.
            stale = identity[other] is not identity[node] and position[other] < position[node]
            if stale and any(position[user] > position[node] for user in other.users):
                return True
    return False


_DROPOUTS = {
    getattr(aten, name + suffix).default
    for name in ("dropout", "feature_dropout", "alpha_dropout")
    for suffix in ("", "_")
}
# What gives its input back where neither shape nor dtype change.
_IDENTITIES = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.slice.Tensor,
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
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_STRIDELESS = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
_STRIDED = {aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default}
_REFUSED = "accelerate: {} cannot be a step of a plan"
_WRITES = "accelerate: the model changes its own {} in forward"
_OWN = {"PARAMETER": "parameter", "BUFFER": "buffer", "CONSTANT_TENSOR": "tensor"}


class _Lowering:
    def __init__(self, capture: Capture, symbols: dict, leaves: list[Any], state: dict, kernel_dtypes: tuple):
        self.capture = capture
        self.symbols = {symbol: sympy.Integer(size) for symbol, size in symbols.items()}
        self.env: dict[torch.fx.Node, Any] = {}  # a Node, a constant's name, or a plain Python value
        self.nodes: list[Node] = []
        self.constants = {**state, **capture.tensors}
        self.sized: set[str] = set()  # of them, those that depend on the sizes of inputs
        self.dtype = next((t.dtype for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
        if self.dtype not in kernel_dtypes:
            self.dtype = kernel_dtypes[0]
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
        for fx_node in self.capture.graph.nodes:
            if fx_node.op == "placeholder":
                if fx_node not in self.env:
                    self.env[fx_node] = self.constant(fx_node)
            elif fx_node.op == "output":
                outputs = [self.value(fx_node.args[0][i]) for i in self.capture.outputs]
            elif fx_node.op == "call_function":
                self.call(fx_node)
            # What is left is get_attr, the body of an operator that takes functions; that operator is refused.
        outputs = [o.of(self.constants) if isinstance(o, Constant) else o for o in outputs]
        return Graph(self.nodes, self.inputs, outputs, self.capture.out_spec, self.constants, self.dtype)

    def constant(self, placeholder: torch.fx.Node) -> Constant:
        name, dtype = self.capture.constants[placeholder.name], placeholder.meta["val"].dtype
        return Constant(name, None if self.constants[name].dtype == dtype else dtype)

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
            if result.free_symbols:
                raise NotImplementedError("accelerate: the model's sizes or numbers depend on its data")
            if isinstance(item, torch.SymInt):
                return int(result)
            return float(result) if isinstance(item, torch.SymFloat) else bool(result)
        return item

    def shape(self, fake: torch.Tensor) -> tuple[int, ...]:
        return tuple(self.concrete(size) for size in fake.shape)

    def add(self, name: str, op: str, call: Call, shape: tuple[int, ...], dtype: torch.dtype, **attrs: Any) -> Node:
        node = Node(op, list(call.inputs), shape, dtype, {"call": call, **attrs}, name)
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
            constant = self.env[written]
            if isinstance(constant, Constant) and constant.name in self.capture.constants.values():
                raise NotImplementedError(_WRITES.format(f"'{constant.name.split(':')[-1]}'"))
            target = _functional(target)
        arguments = self.arguments(fx_node, target)
        tensors = [a for a in pytree.tree_leaves(arguments) if isinstance(a, (Node, Constant))]
        random = torch.Tag.nondeterministic_seeded in target.tags
        if tensors and all(isinstance(a, Constant) for a in tensors) and not random:
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
        return [self.listed(fx_node.name, argument) for argument in arguments]

    def listed(self, name: str, argument: Any) -> Any:
        """Lists of tensors hold values of the plan alone: constants beside such values become some."""
        if not isinstance(argument, list) or not any(isinstance(each, Node) for each in argument):
            return argument

        def node(constant: Constant) -> Node:
            tensor = self.constants[constant.name]
            call = Call(aten.alias.default, [constant])
            return self.add(f"{name}_constant", "aten", call, tuple(tensor.shape), constant.dtype or tensor.dtype)

        return [node(each) if isinstance(each, Constant) else each for each in argument]

    def fold_constant(self, fx_node: torch.fx.Node, target: torch._ops.OpOverload, arguments: list[Any]) -> Any:
        def tensor(argument: Any) -> Any:
            return argument.of(self.constants) if isinstance(argument, Constant) else argument

        with torch.no_grad():
            result = call_with_schema(target, pytree.tree_map(tensor, arguments))

        # What depends on the sizes of inputs is another constant for others.
        sized = any(
            isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
            or (isinstance(self.env[n], Constant) and self.env[n].name in self.sized)
            for n in fx_node.all_input_nodes
        )
        sizes = f":{list(self.symbols.values())}" if sized else ""

        def name(index: int, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            constant = Constant(f"{self.capture.id}:{fx_node.name}:{index}{sizes}")
            self.constants[constant.name] = value
            if sized:
                self.sized.add(constant.name)
            return constant

        if isinstance(result, (list, tuple)):
            return [name(i, value) for i, value in enumerate(result)]
        return name(0, result)

    def lower(self, fx_node: torch.fx.Node, target: torch._ops.OpOverload, arguments: list[Any]) -> Any:
        fake = fx_node.meta["val"]
        if target is aten._native_batch_norm_legit_no_training.default:  # what batch norm is in functional graphs
            x, weight, bias, mean, var, momentum, eps = arguments
            arguments = [x, weight, bias, mean, var, False, momentum, eps, False]
            return [self.lower_one(fx_node, aten.batch_norm.default, arguments, fake[0])]
        if isinstance(fake, torch.Tensor):
            return self.lower_one(fx_node, target, arguments, fake)
        if target in _SPLITS and _is_image(arguments[0], self.dtype) and arguments[2] in (1, -3):
            return self.channels(fx_node, arguments[0], [self.shape(each)[1] for each in fake])
        # Several results: a node each, which reads the call's.
        node = self.add(fx_node.name, "aten", _runnable(target, arguments), (), self.dtype)
        results: list[Any] = []
        for index, each in enumerate(fake):
            if isinstance(each, torch.Tensor):
                result = Node("result", [node], self.shape(each), each.dtype, {"index": index}, f"{node.name}_{index}")
                self.nodes.append(result)
                results.append(result)
            else:
                results.append(each)
        return results

    def channels(self, fx_node: torch.fx.Node, x: Node, sizes: list[int]) -> list[Node]:
        """The channels of an image in parts that follow each other."""
        n, _, h, w = x.shape
        results, start = [], 0
        for i, size in enumerate(sizes):
            call = Call(aten.slice.Tensor, [x, 1, start, start + size, 1])
            results.append(self.add(f"{fx_node.name}_{i}", "channels", call, (n, size, h, w), x.dtype, start=start))
            start += size
        return results

    def lower_one(
        self, fx_node: torch.fx.Node, target: torch._ops.OpOverload, arguments: list[Any], fake: torch.Tensor
    ) -> Node:
        shape, x = self.shape(fake), arguments[0] if arguments else None
        if isinstance(x, list):
            x = next((each for each in x if isinstance(each, Node)), None)
        call = _runnable(target, arguments)
        if isinstance(x, Node) and x.dtype == fake.dtype:
            if target in _IDENTITIES | _RESHAPES and shape == x.shape:
                return x
            for targets, op, rule in _RULES if x.dtype == self.dtype else ():
                if target in targets:
                    attrs = rule(self, target, *arguments)
                    if attrs is not None:
                        return self.add(fx_node.name, op or attrs.pop("op"), call, shape, fake.dtype, **attrs)
        return self.add(fx_node.name, "aten", call, shape, fake.dtype)


def _runnable(target: torch._ops.OpOverload, arguments: list[Any]) -> Call:
    """The call in a form that the dispatcher takes, and that asks nothing of its inputs' strides: they differ from
    those that the model was written for.
    """
    if target in _STRIDED:
        raise NotImplementedError(_REFUSED.format(f"{target}, which reads memory by its strides,"))
    target = _STRIDELESS.get(target, target)
    tensors = [argument.type.kind() == "TensorType" for argument in target._schema.arguments]
    if any(wanted and isinstance(value, (int, float)) for wanted, value in zip(tensors, arguments, strict=True)):
        # A Python number in place of a tensor: dtypes are promoted as for numbers.
        overload = target._overloadname.replace("Tensor", "Scalar").replace("default", "Scalar")
        if not hasattr(target.overloadpacket, overload):
            raise NotImplementedError(_REFUSED.format(f"{target} of a number"))
        target = getattr(target.overloadpacket, overload)
    return Call(target, arguments)


def call_with_schema(target: torch._ops.OpOverload, arguments: list[Any]) -> Any:
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


def _is_image(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Node) and len(value.shape) == 4 and value.dtype == dtype


def _pair(value: Any) -> tuple[int, int]:
    value = list(value) if isinstance(value, (list, tuple)) else [value]
    return (value[0], value[-1])


# What a node of our own operations needs to know, from the arguments of an ATen operator in the order of its schema;
# None where the operation does not fit, which leaves the call to ATen.


def _conv2d(lowering, target, x, weight, bias, stride, padding, dilation, groups):
    if len(x.shape) != 4 or not _are_weights(lowering, weight, bias, 4):
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


def _are_weights(lowering: _Lowering, weight: Any, bias: Any, dim: int) -> bool:
    """Whether a kernel takes them: known, of as many dimensions, of some channels in and out, and a number of bias for
    each of these.
    """
    if not isinstance(weight, Constant) or isinstance(bias, Node):
        return False
    shape = lowering.constants[weight.name].shape
    if len(shape) != dim or 0 in shape:
        return False
    return bias is None or lowering.constants[bias.name].shape == shape[:1]


def _linear(lowering, target, x, weight, bias):
    if len(x.shape) not in (2, 3) or not _are_weights(lowering, weight, bias, 2):
        return None
    return {"weights": Weights(weight.name, _name(bias))}


def _batch_norm(lowering, target, x, weight, bias, mean, var, training, momentum, eps, cudnn):
    if training or isinstance(weight, Node) or isinstance(bias, Node):
        return None
    if not isinstance(mean, Constant) or not isinstance(var, Constant):
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
    if len(x.shape) != 4:
        return None
    if _pair(size) == (1, 1):
        return {"op": "global_avg_pool"}
    return {"op": "mul_scalar", "value": 1.0} if tuple(_pair(size)) == x.shape[2:] else None


def _avg_pool2d(lowering, target, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    if len(x.shape) != 4 or (divisor or 1) < 1:
        return None
    covers = all(k == size or (k > size and ceil_mode) for k, size in zip(_pair(kernel), x.shape[2:], strict=True))
    if covers and _pair(padding) == (0, 0) and divisor is None:
        return {"op": "global_avg_pool"}
    window = _window(kernel, stride, padding, 1)
    return {"op": "pool2d", **window, "mean": True, "count_padding": count_include_pad, "divisor": divisor or 0}


def _max_pool2d(lowering, target, x, kernel, stride, padding, dilation, ceil_mode):
    if len(x.shape) != 4:
        return None
    window = _window(kernel, stride, padding, dilation)
    (top, _, left, _), numbers = window["padding"], (window["kernel"], window["stride"], window["dilation"])
    for size, pad, k, s, d in zip(x.shape[2:], (top, left), *numbers, strict=True):
        starts = range(-pad, size if ceil_mode else size + pad - d * (k - 1), s)
        if not all(any(0 <= start + i * d < size for i in range(k)) for start in starts):
            return None  # all of a dilated window lies in the padding
    return {**window, "mean": False, "count_padding": False, "divisor": 0}


def _window(kernel, stride, padding, dilation):
    (top, left), kernel = _pair(padding), _pair(kernel)
    stride = _pair(stride) if stride else kernel
    return {"kernel": kernel, "stride": stride, "padding": (top, top, left, left), "dilation": _pair(dilation)}


def _cat(lowering, target, tensors, dim):
    return {} if dim in (1, -3) and all(_is_image(t, lowering.dtype) for t in tensors) else None


def _slice(lowering, target, x, dim=0, start=None, end=None, step=1):
    if len(x.shape) != 4 or dim not in (1, -3) or step != 1:
        return None
    start = start or 0
    return {"start": min(max(start + x.shape[1] if start < 0 else start, 0), x.shape[1])}


def _pad(lowering, target, x, pads, mode="constant", value=None):
    if target is aten.constant_pad_nd.default:
        mode, value = "constant", mode
    if mode != "constant" or (value or 0) != 0 or len(x.shape) != 4 or len(pads) > 4 or min(pads, default=-1) < 0:
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
    ({aten.adaptive_avg_pool2d.default}, None, _adaptive_avg_pool2d),
    ({aten.avg_pool2d.default}, None, _avg_pool2d),
    ({aten.max_pool2d.default}, "pool2d", _max_pool2d),
    ({aten.cat.default}, "cat", _cat),
    ({aten.slice.Tensor}, "channels", _slice),
    ({aten.pad.default, aten.constant_pad_nd.default}, "pad", _pad),
    ({aten.expand.default, aten.expand_as.default}, "expand", _always),
    (_RESHAPES, "reshape", _always),
]
