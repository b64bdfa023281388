"""From a graph to a plan: which kernel runs each node, where each tensor lies, in what order. The plan is a table that
the C++ engine executes and :meth:`Report.__str__` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils import _pytree as pytree

from .. import _C
from .batch import split_batch
from .blocks import by_cache, fuse_blocks
from .graph import BatchNorm, Call, Constant, Graph, Node, Slot, Weights
from .outputs import Structure
from .passes import has_kernel, is_affine, is_alias, is_dense, is_depthwise, is_pointwise, is_sum

_ALIGNMENT = 64


class PackedWeights:
    """Weights with batch norm folded in, in the kernels' layout; each packed once, whatever input shapes use it, and
    dropped with the last plan that does. The memory to run in is shared by those plans as well.
    """

    def __init__(self) -> None:
        self.arenas = _C.Arenas()
        self._packed: WeakValueDictionary[tuple, torch.Tensor] = WeakValueDictionary()
        self._memory = _C.NetworkWeights()

    def get(self, weights: Weights, constants: dict[str, torch.Tensor], kind: str, isa: str) -> torch.Tensor:
        """``kind`` is what reads them: conv2d, depthwise_conv2d or winograd."""
        key = (weights, kind, isa)
        packed = self._packed.get(key)
        if packed is None:
            weight, bias = fold(weights, constants)
            dtype = constants[weights.weight].dtype
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            self._packed[key] = packed = getattr(_C, f"pack_{kind}")(weight, bias, isa, self._memory)
        return packed

    def __len__(self) -> int:
        return len(self._packed)


def fold(weights: Weights, constants: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(K, C, kH, kW) weight and (K,) bias with what follows folded in, in float64 if anything does."""

    def get(name: str | None, default: float) -> torch.Tensor | float:
        return default if name is None else constants[name].detach().double()

    with torch.no_grad():
        weight = constants[weights.weight].detach()
        bias = None if weights.bias is None else constants[weights.bias].detach()
        for norm in weights.folded:
            if isinstance(norm, float):
                weight, bias = weight.double() * norm, None if bias is None else bias.double() * norm
                continue
            scale = get(norm.weight, 1.0) / torch.sqrt(get(norm.var, 1.0) + norm.eps)
            weight = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
            bias = (0.0 if bias is None else bias.double()) - get(norm.mean, 0.0)
            bias = bias * scale + get(norm.bias, 0.0)
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        return weight, bias


@dataclass(frozen=True)
class Row:
    """One step of a plan as :meth:`AcceleratedModule.explain` shows it."""

    name: str
    operation: str
    shape: tuple[int, ...]
    kernel: str
    """After "8 ×": what runs for each of eight parts of the batch."""
    fallback: str
    """Why no kernel of ours runs it; empty where one does."""
    macs: int
    """Multiply-adds of convolutions and linear layers, as the layers state them, whatever algorithm runs."""
    bytes: int
    """Inputs, weights and outputs, each counted once."""


@dataclass(frozen=True)
class Report:
    """What a plan runs. ``str(report)`` is the table; ``fallbacks`` are the rows that run through ATen."""

    rows: tuple[Row, ...]
    isa: str
    whole_bytes: int
    part_bytes: int
    parts: int
    """``whole_bytes`` of the arena are one for all threads, ``part_bytes`` one for each of the ``parts`` under way."""
    why_not_recorded: str = ""
    """Why the steps run one by one on CUDA, rather than as a CUDA graph."""

    @property
    def arena_bytes(self) -> int:
        """Memory between the layers, on torch's current number of threads."""
        return self.whole_bytes + min(torch.get_num_threads(), self.parts) * self.part_bytes

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.fallback)

    def __str__(self) -> str:
        head = ("step", "operation", "output", "kernel")
        lines = [head]
        for index, row in enumerate(self.rows):
            kernel = f"ATen: {row.fallback}" if row.fallback else row.kernel
            lines.append((f"{index} {row.name}", row.operation, "×".join(map(str, row.shape)), kernel))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True)), line[3]])
            for line in lines
        )
        native = sum(not row.fallback and not row.kernel.startswith("cuDNN") for row in self.rows)
        total = f"{native} of {len(self.rows)} steps on {self.isa} kernels, arena {self.arena_bytes / 2**20:.1f} MiB"
        if self.why_not_recorded:
            total += f", no CUDA graph: {self.why_not_recorded}"
        return f"{table}\n{total}"


@dataclass
class Plan:
    """An executable plan for one set of input shapes."""

    engine: _C.Plan
    leaves: list[Any]
    """The outputs, None in place of those that the engine computes."""
    positions: list[int]
    """Which of ``leaves`` the engine's results are."""
    images: list[int]
    """Which of the engine's results have four dimensions."""
    out_spec: pytree.TreeSpec | Structure
    weights: list[torch.Tensor]
    """Keeps them in :class:`PackedWeights`."""
    report: Report

    def __post_init__(self) -> None:
        self._single = self.out_spec.is_leaf() and self.positions == [0]
        self.run_usual = self.engine.run_usual if self._single and not self.images else None
        """Runs the usual call, one tensor in and one out, and gives None for any other."""

    def run(self, inputs: list[torch.Tensor]) -> Any:
        """The model's outputs. Images among them are channels_last where one of the inputs is."""
        results = self.engine.run(inputs)
        if self.images:
            memory_format = torch.channels_last if any(map(is_channels_last, inputs)) else torch.contiguous_format
            for i in self.images:
                results[i] = results[i].contiguous(memory_format=memory_format)
        if self._single:
            return results[0]
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        for position, result in zip(self.positions, results, strict=True):
            leaves[position] = result
        return self.out_spec.unflatten(leaves)


def is_channels_last(tensor: torch.Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


@dataclass
class _Value:
    """A tensor of the plan: what the engine's Value becomes."""

    storage: str  # arena, part, input, output, aten or slice
    shape: tuple[int, ...]
    itemsize: int = 4
    position: int = 0  # of an input or output; of a slice, the value that it is part of
    channel: int = 0  # of a slice, the first
    offset: int = 0  # in the arena, or in the memory of a part
    any_strides: bool = False
    first: int = -1  # step that writes it first
    last: int = 0  # last step that reads it
    root: _Value | None = None  # it lies in that value's memory


def build(graph: Graph, packed: PackedWeights, isa: str) -> Plan:
    cache = _C.l2_cache_bytes()
    fuse_blocks(graph, by_cache(cache, 3 * cache // 4))
    split_batch(graph, runs_here, cache, torch.get_num_threads())
    return _Builder(graph, packed, isa).build()


class _Builder:
    def __init__(self, graph: Graph, packed: PackedWeights, isa: str):
        self.graph, self.packed, self.isa = graph, packed, isa
        self.values: list[_Value] = []
        self.ids: dict[Node, int] = {}
        self.sums: dict[Node, int] = {}  # of depthwise convolutions whose output is averaged
        self.steps: list[Callable[[_C.Plan], None]] = []
        self.rows: list[tuple[Node, str, str, int]] = []  # node, operation, fallback, bytes
        self.users = graph.users()
        self.weights: list[torch.Tensor] = []
        self.weights_of_step: list[torch.Tensor] = []

    def build(self) -> Plan:
        outputs = self.graph.output_nodes()
        averaged = {n.inputs[0] for n in self.graph.nodes if n.op in ("global_avg_pool", "squeeze_excite")}
        for position, node in enumerate(self.graph.inputs):
            strided = all(
                self.reads_any_strides(reader, source)
                for source in (node, *(user for user in self.users[node] if user.op == "part"))
                for reader in self.users[source]
                if reader.op != "part"
            )
            self.define(node, "input", position=position, any_strides=strided)
        for node in self.graph.nodes:
            if node.op == "cat":
                self.cat(node)
                continue
            if node in self.ids:
                continue  # an input, or computed already as what it reshapes
            if node.op in ("part", "whole"):
                self.ids[node] = self.ids[node.inputs[0]]
                continue
            if is_alias(node) and self.values[self.ids[node.inputs[0]]].storage in ("arena", "part"):
                root = self.values[self.ids[node.inputs[0]]]
                shape = node.shape if root.storage == "part" else node.whole_shape
                self.ids[node] = self.new_value(root.storage, shape, root=root.root or root)
                continue
            if not is_native(node) or (
                node.op == "channels" and self.values[self.ids[node.inputs[0]]].storage == "aten"
            ):
                self.aten(node)
                continue
            if node.op == "channels" and self.reads_in_place(node):
                root = self.ids[node.inputs[0]]
                value = self.values[root]
                slice_of = {"root": value.root or value, "position": root, "channel": node.attrs["start"]}
                self.ids[node] = self.new_value("slice", node.shape, **slice_of)
                continue
            if node in averaged and makes_sums(node):
                n, c, h, _ = node.shape
                self.sums[node] = self.new_value("part" if node.parts > 1 else "arena", (n, h, c))
            emit = self.native(node)
            # What only a reshape reads is computed as that reshape.
            users = self.users[node]
            result = users[0] if node not in outputs and len(users) == 1 and is_alias(users[0]) else node
            if len(result.shape) == 4 and result.shape[1] != _image(node.shape)[1]:
                result = node  # its channels would not lie as this step's
            if takes_slice(node) and len(users) == 1 and users[0].op == "cat" and node not in outputs:
                self.ids[node] = self.slice(node, users[0])
            else:
                self.ids[node] = self.define(result, self.storage(result))
            reads = [self.ids[source] for source in node.inputs]
            writes = [self.ids[node], *([self.sums[node]] if node in self.sums else [])]
            reads += [self.sums[source] for source in node.inputs[:1] if source in self.sums]
            self.step(node, describe_operation(node), "", reads, writes, emit)
        results = [self.result(output) for output in self.graph.outputs if isinstance(output, Node)]
        self.widen_lifetimes()
        arena_bytes, part_bytes = self.place("arena"), self.place("part")
        engine = _C.Plan(
            dtype=str(self.graph.dtype).removeprefix("torch."),
            values=[
                (
                    v.storage,
                    (v.root or v).offset if v.storage in ("arena", "part") else v.position,
                    v.shape,
                    v.any_strides,
                    v.channel,
                )
                for v in self.values
            ],
            outputs=results,
            arena_bytes=arena_bytes,
            part_bytes=part_bytes,
            arenas=self.packed.arenas,
        )
        for emit, (node, *_) in zip(self.steps, self.rows, strict=True):
            engine.parts = node.parts
            emit(engine)
        rows = tuple(
            Row(node.name, operation, node.whole_shape, kernel, fallback, macs_of(node, self.graph.constants), size)
            for (node, operation, fallback, size), kernel in zip(self.rows, engine.describe(), strict=True)
        )
        parts = max((node.parts for node, *_ in self.rows), default=1)
        graph_outputs = self.graph.outputs
        positions = [i for i, output in enumerate(graph_outputs) if isinstance(output, Node)]
        return Plan(
            engine,
            leaves=[None if isinstance(output, Node) else output for output in graph_outputs],
            positions=positions,
            images=[i for i, position in enumerate(positions) if len(graph_outputs[position].shape) == 4],
            out_spec=self.graph.out_spec,
            weights=self.weights,
            report=Report(rows, self.isa, arena_bytes, part_bytes, parts),
        )

    # Values

    def new_value(self, storage: str, shape: tuple[int, ...], **fields: Any) -> int:
        self.values.append(_Value(storage, shape, self.graph.dtype.itemsize, **fields))
        return len(self.values) - 1

    def define(self, node: Node, storage: str, **fields: Any) -> int:
        shape = node.shape if storage == "part" else node.whole_shape
        self.ids[node] = self.new_value(storage, shape, **fields)
        return self.ids[node]

    def storage(self, node: Node) -> str:
        """Where a result of ours lies: what is returned, and in no other shape, in a tensor of its own; what is read
        only within its part of the batch in the memory of that.
        """
        if node in self.graph.output_nodes() and not any(map(is_alias, self.readers(node))):
            return "output"
        return "part" if self.is_local(node) else "arena"

    def readers(self, node: Node) -> list[Node]:
        """Those of the whole batch among them."""
        bridges = [user for user in self.users[node] if user.op in ("part", "whole")]
        return [user for user in self.users[node] if user not in bridges] + [r for b in bridges for r in self.users[b]]

    def is_local(self, node: Node) -> bool:
        if node.parts == 1 or node in self.graph.output_nodes():
            return False
        return all(
            user.op not in ("part", "whole") and (not (is_alias(user) or user.op == "channels") or self.is_local(user))
            for user in self.users[node]
        )

    def reads_in_place(self, node: Node) -> bool:
        """Whether some of a value's channels can be read where they lie: by all their readers, at all times."""
        source = self.values[self.ids[node.inputs[0]]]
        if source.any_strides or node in self.graph.output_nodes():
            return False
        return all(reads_slice(user) and node not in user.inputs[1:] for user in self.users[node])

    def slice(self, node: Node, cat: Node) -> int:
        """The value of a node that is written straight into its place in a concatenation."""
        if cat not in self.ids:
            self.define(cat, self.storage(cat))
        root = self.values[self.ids[cat]]
        index = cat.inputs.index(node)
        channel = sum(source.shape[1] for source in cat.inputs[:index])
        return self.new_value("slice", node.shape, root=root, position=self.ids[cat], channel=channel)

    def cat(self, node: Node) -> None:
        """What could not be written into its place is copied there."""
        channel = 0
        if node not in self.ids:
            self.define(node, self.storage(node))
        root = self.ids[node]
        for source in node.inputs:
            x = self.values[self.ids[source]]
            if x.storage != "slice" or x.position != root:
                target = self.new_value("slice", source.shape, root=self.values[root], position=root, channel=channel)
                emit = self.copy(source.shape, self.ids[source], target)
                copied = Node("copy", [source], source.shape, source.dtype, name=source.name, parts=source.parts)
                self.step(copied, "copy into cat", "", [self.ids[source]], [target], emit)
            channel += source.shape[1]

    def copy(self, shape: tuple[int, ...], x: int, y: int) -> Callable[[_C.Plan], None]:
        plain = {"isa": self.isa, "folded": None, "gate": -1, "activation": "none"}
        return partial(_C.Plan.add_scale_shift_act, shape=shape, x=x, y=y, **plain)

    def step(self, node, operation, fallback, reads, writes, emit) -> None:
        index = len(self.steps)
        for value in (self.values[i].root or self.values[i] for i in writes):
            value.first = index if value.first < 0 else value.first
            value.last = index
        for value in (self.values[i].root or self.values[i] for i in reads):
            value.last = index
        self.steps.append(emit)
        values = [self.values[i] for i in {*reads, *writes}]
        size = sum(_bytes(v) * (node.parts if v.storage in ("part", "slice") else 1) for v in values)
        size += sum(t.nbytes for t in self.weights_of_step)
        self.weights_of_step = []
        self.rows.append((node, operation, fallback, size))

    def result(self, output: Node) -> int:
        """The value that an output is returned from."""
        value = self.values[self.ids[output]]
        if value.storage != "arena":
            return self.ids[output]
        # Memory of the arena leaves it as a copy.
        copied = self.new_value("aten", output.whole_shape)
        source, target = self.ids[output], torch.ops.aten.clone.default

        def emit(engine: _C.Plan) -> None:
            engine.add_aten(
                target._schema.name, target._schema.overload_name, [_C.ValueRef(source), None], [copied], False
            )

        copy = Node("copy", [output], output.shape, output.dtype, name=output.name, parts=output.parts)
        self.step(copy, "copy", "an output that is also read in another shape", [source], [copied], emit)
        return copied

    def widen_lifetimes(self) -> None:
        """A run of steps goes over the parts of a batch in any order: what it touches of the arena lives as long."""
        begin = 0
        while begin < len(self.rows):
            end = begin + 1
            while self.rows[begin][0].parts > 1 and end < len(self.rows) and self.rows[end][0].parts > 1:
                end += 1
            for value in self.values:
                if value.storage == "arena" and value.root is None:
                    value.first = begin if begin <= value.first < end else value.first
                    value.last = end - 1 if begin <= value.last < end else value.last
            begin = end

    def place(self, storage: str) -> int:
        """Offsets in the arena, or in the memory of a part: values that live at the same time do not overlap. Largest
        first, lowest fit.
        """
        placed: list[tuple[int, int, _Value]] = []
        roots = [v for v in self.values if v.storage == storage and v.root is None]
        size = {id(v): _bytes(v) for v in roots}
        for value in sorted(roots, key=lambda v: (-size[id(v)], v.first)):
            offset = 0
            for begin, end, other in sorted(placed, key=lambda p: p[0]):
                if other.last < value.first or value.last < other.first:
                    continue
                if offset + size[id(value)] <= begin:
                    break
                offset = max(offset, end)
            value.offset = offset
            placed.append((offset, offset + size[id(value)], value))
        return max((end for _, end, _ in placed), default=0)

    # Steps

    def reads_any_strides(self, node: Node, source: Node) -> bool:
        """Whether a step reads this input of it, and reads it nowhere else, however it lies in memory."""
        strided = is_dense(node) and not is_pointwise(node) and not winograd_serves(node)
        return strided and node.inputs[0] is source and source not in node.inputs[1:]

    def pack(self, weights: Weights, kind: str = "conv2d") -> torch.Tensor:
        packed = self.packed.get(weights, self.graph.constants, kind, self.isa)
        self.weights.append(packed)
        self.weights_of_step.append(packed)
        return packed

    def native(self, node: Node) -> Callable[[_C.Plan], None]:
        """A function that adds a native node to the engine's plan."""
        ids, isa, attrs = self.ids, self.isa, node.attrs
        x = node.inputs[0] if node.inputs else None

        if is_pointwise(node) or node.op == "linear":
            rows = _image(x.shape)
            packed = self.pack(attrs["weights"])
            residual = node.inputs[1] if attrs.get("residual") else None
            gate = node.inputs[-1] if attrs.get("gate") else None
            return lambda engine: engine.add_pointwise_conv2d(
                isa=isa,
                x_shape=rows,
                out_channels=node.shape[1] if node.op == "conv2d" else node.shape[-1],
                packed=packed,
                activation=node.activation,
                x=ids[x],
                y=ids[node],
                gate=-1 if gate is None else ids[gate],
                residual=-1 if residual is None else ids[residual],
            )
        if winograd_serves(node) and winograd_is_faster(x.shape, node.shape, _C.l2_cache_bytes()):
            top, _, left, _ = attrs["padding"]
            packed = self.pack(attrs["weights"], "winograd")
            return lambda engine: engine.add_winograd(
                isa=isa,
                x_shape=x.shape,
                y_shape=node.shape,
                packed=packed,
                pad_top=top,
                pad_left=left,
                activation=node.activation,
                x=ids[x],
                y=ids[node],
                residual=ids[node.inputs[1]] if attrs.get("residual") else -1,
            )
        if is_dense(node) or is_depthwise(node):
            top, _, left, _ = attrs["padding"]
            shared = {
                "isa": isa,
                "x_shape": x.shape,
                "y_shape": node.shape,
                "packed": self.pack(attrs["weights"], "depthwise_conv2d" if is_depthwise(node) else "conv2d"),
                "window": (*attrs["kernel"], *attrs["stride"], top, left, *attrs["dilation"]),
                "activation": node.activation,
                "x": ids[x],
            }
            if is_depthwise(node):
                return lambda engine: engine.add_depthwise_conv2d(**shared, y=ids[node], sums=self.sums.get(node, -1))
            residual = node.inputs[1] if attrs.get("residual") else None
            return lambda engine: engine.add_conv2d(
                **shared, y=ids[node], residual=-1 if residual is None else ids[residual]
            )
        if node.op == "inverted_residual":
            top, _, left, _ = attrs["padding"]
            expand = attrs["expand"] and self.pack(attrs["expand"])
            depthwise = self.pack(attrs["depthwise"], "depthwise_conv2d")
            project = attrs["project"] and self.pack(attrs["project"])
            return lambda engine: engine.add_inverted_residual(
                isa=isa,
                x_shape=x.shape,
                y_shape=node.shape,
                hidden_channels=attrs["hidden"],
                expand=expand,
                depthwise=depthwise,
                project=project,
                activations=attrs["activations"],
                window=(*attrs["kernel"], *attrs["stride"], top, left, *attrs["dilation"]),
                x=ids[x],
                y=ids[node],
                sums=self.sums.get(node, -1),
                residual=ids[node.inputs[1]] if len(node.inputs) > 1 else -1,
            )
        if node.op in ("squeeze_excite", "global_avg_pool"):
            sums = self.sums.get(x, -1)
            source = {"x": ids[x], "sums": sums, "parts": x.shape[2] if sums >= 0 else 0}
            if node.op == "global_avg_pool":
                return lambda engine: engine.add_global_avg_pool(isa=isa, x_shape=x.shape, **source, y=ids[node])
            packed1, packed2 = (self.pack(attrs[w]) for w in ("weights1", "weights2"))
            squeeze_channels = self.graph.constants[attrs["weights1"].weight].shape[0]
            return lambda engine: engine.add_squeeze_excite(
                isa=isa,
                x_shape=x.shape,
                squeeze_channels=squeeze_channels,
                packed1=packed1,
                packed2=packed2,
                squeeze_activation=attrs["squeeze_activation"],
                gate_activation=attrs["gate_activation"],
                **source,
                gate=ids[node],
            )
        if node.op == "pool2d":
            top, _, left, _ = attrs["padding"]
            return lambda engine: engine.add_pool2d(
                isa=isa,
                x_shape=x.shape,
                y_shape=node.shape,
                window=(*attrs["kernel"], *attrs["stride"], top, left, *attrs["dilation"]),
                **{k: attrs[k] for k in ("mean", "count_padding", "divisor")},
                x=ids[x],
                y=ids[node],
            )
        if node.op == "channels":
            source = self.ids[x]
            start = {"root": self.values[source].root or self.values[source], "channel": attrs["start"]}
            part = self.new_value("slice", node.shape, position=source, **start)
            return lambda engine: self.copy(node.shape, part, ids[node])(engine)  # whose number is known by then
        if node.op in ("gate", "activation") or is_affine(node):
            folded = None
            if is_affine(node):
                norm = attrs["batch_norm"]
                tensors = (norm.mean, norm.var, norm.weight, norm.bias)
                mean, var, weight, bias = (None if t is None else self.graph.constants[t].detach() for t in tensors)
                folded = _C.fold_batch_norm(mean, var, weight, bias, norm.eps)
            return lambda engine: engine.add_scale_shift_act(
                isa=isa,
                shape=_image(node.shape),
                folded=folded,
                gate=ids[node.inputs[1]] if node.op == "gate" else -1,
                activation=node.activation,
                x=ids[x],
                y=ids[node],
            )
        elements = torch.Size(node.shape).numel()
        return lambda engine: engine.add_add_act(
            isa=isa,
            elements=elements,
            activation=node.activation,
            a=ids[node.inputs[0]],
            b=ids[node.inputs[1]],
            y=ids[node],
        )

    def aten(self, node: Node) -> None:
        if node.op == "result":
            return  # defined with its call
        call: Call = node.attrs["call"]
        results = [user for user in self.users[node] if user.op == "result"]
        if results:
            outputs = [-1] * (1 + max(r.attrs["index"] for r in results))
            for result in results:
                outputs[result.attrs["index"]] = self.define(result, "aten")
        else:
            outputs = [self.define(node, "aten")]
        reads = [self.ids[source] for source in node.inputs]
        returned = not any(self.users[result] for result in results or [node])

        def argument(value: Any) -> Any:
            if isinstance(value, Slot):
                return _C.ValueRef(self.ids[node.inputs[value.index]])
            if isinstance(value, Constant):
                return value.of(self.graph.constants).detach()
            return [argument(each) for each in value] if isinstance(value, list) else value

        def emit(engine: _C.Plan) -> None:
            arguments = [argument(value) for value in call.arguments]
            engine.add_aten(call.target._schema.name, call.target._schema.overload_name, arguments, outputs, returned)

        self.step(node, describe_operation(node), why_aten(node), reads, [o for o in outputs if o >= 0], emit)


_NATIVE = ("inverted_residual", "squeeze_excite", "global_avg_pool", "pool2d", "gate", "activation", "cat", "channels")


def is_native(node: Node) -> bool:
    """Whether a kernel of ours runs the node."""
    return node.op in _NATIVE or has_kernel(node) or is_affine(node) or is_sum(node)


def runs_here(node: Node) -> bool:
    """Whether the node is no step through ATen, as are channels of what such a step gives."""
    source = node.inputs[0] if node.op == "channels" else None
    return is_native(node) and (source is None or source.op == "input" or runs_here(source))


def winograd_serves(node: Node) -> bool:
    """Whether the node is a 3×3 convolution of stride 1, and no stem, which reads its image as it lies."""
    a = node.attrs
    square = is_dense(node) and a["kernel"] == (3, 3) and a["stride"] == a["dilation"] == (1, 1)
    return square and node.inputs[0].shape[1] >= 16 and node.dtype == torch.float32


def winograd_is_faster(x_shape: tuple[int, ...], y_shape: tuple[int, ...], cache_bytes: int) -> bool:
    """By a count of cycles, each of which multiplies and adds one vector of 16 lanes.

    The direct sum keeps the units busy but for 3 %. Winograd's matrix products have a row a tile of 4 × 4 outputs: of r
    rows about r / (r + 2) of the cycles count. Weights, four times as many as before, come from memory at 1.5 bytes a
    cycle (Cascade Lake gets 1.2, with two units a core; Zen 4 5), so that few tiles are not worth them, and once more
    for each further block of tiles from the L3 cache at some 16 bytes a cycle, half of it hidden. The transforms take
    130 cycles a tile and vector.
    """
    n, c, _, _ = x_shape
    _, k, h, w = y_shape
    direct = n * h * w * 9 * c * k / 16 / 0.97
    tiles = -(-h // 4) * -(-w // 4)
    block = max(1, min(tiles, cache_bytes * 5 // 8 // (36 * (c + 64) * 4)))
    products = 36 * n * tiles * c * k / 16 * (1 + 2 / block)
    weight_bytes = 36 * c * k * 4
    weights = weight_bytes / 1.5 + weight_bytes / 32 * (n * -(-tiles // block) - 1)
    transforms = 130 * n * tiles * (c + k) / 16
    return products + weights + transforms < 0.9 * direct


def takes_slice(node: Node) -> bool:
    """Whether the node's step can write its output into some of the channels of a larger tensor."""
    simple = ("pool2d", "gate", "activation", "channels")
    return is_dense(node) or is_depthwise(node) or node.op in simple or is_affine(node)


def reads_slice(node: Node) -> bool:
    """Whether the node's step can read its first input from some of the channels of a larger tensor."""
    return takes_slice(node) and not winograd_serves(node)


def makes_sums(node: Node) -> bool:
    """Whether a step can sum its output over rows while it has it in registers."""
    return is_depthwise(node) or (node.op == "inverted_residual" and node.attrs["project"] is None)


def macs_of(node: Node, constants: dict[str, torch.Tensor]) -> int:
    attrs = node.attrs

    def size(*names: str) -> int:
        return sum(constants[attrs[name].weight].numel() for name in names if attrs.get(name) is not None)

    if node.op in ("conv2d", "linear"):  # each weight meets every output pixel
        pixels = torch.Size(node.whole_shape).numel() // max(1, node.shape[1 if node.op == "conv2d" else -1])
        return size("weights") * pixels
    if node.op == "squeeze_excite":
        return size("weights1", "weights2") * node.whole_shape[0]
    if node.op == "inverted_residual":
        n, _, h, w = node.whole_shape
        _, _, in_h, in_w = node.inputs[0].shape
        return n * (in_h * in_w * size("expand") + h * w * size("depthwise", "project"))
    return 0


def _bytes(value: _Value) -> int:
    size = torch.Size(value.shape).numel() * value.itemsize
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _image(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The (N, C, H, W) whose memory order, N × H × W × C, is that of a tensor of this shape in the engine."""
    if len(shape) == 4:
        return shape
    return (torch.Size(shape[:-1]).numel(), shape[-1] if shape else 1, 1, 1)


def describe_operation(node: Node) -> str:
    if node.op == "activation":
        return node.activation
    if node.op == "conv2d":
        name = "pointwise_conv2d" if is_pointwise(node) else "depthwise_conv2d" if is_depthwise(node) else "conv2d"
    else:
        name = node.attrs["call"].target._schema.name if node.op == "aten" else node.op
    folded = node.attrs["weights"].folded if "weights" in node.attrs else ()
    parts = [name, *(["batch_norm"] if any(isinstance(each, BatchNorm) for each in folded) else [])]
    parts += [extra for extra in ("gate", "residual") if node.attrs.get(extra)]
    parts += [node.activation] if node.activation != "none" else []
    return " + ".join(parts)


def why_aten(node: Node) -> str:
    if node.op == "conv2d":
        groups = node.attrs["groups"]
        if groups == node.inputs[0].shape[1]:
            return "a depthwise convolution with a channel multiplier has no step yet"
        return f"a grouped convolution ({groups} groups) has no kernel"
    if node.op == "aten":
        return f"no kernel for {node.attrs['call'].target} on {str(node.dtype).removeprefix('torch.')}"
    return f"no kernel for {node.op} in this form"
