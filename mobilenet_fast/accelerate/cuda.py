"""The runner on CUDA: the same graph as on CPU, its nodes calls of Triton kernels, recorded in one CUDA graph.

Images are channels_last throughout. What a node computes lies in a tensor that PyTorch's allocator gives while the CUDA
graph is recorded, and that goes back to it after its last reader, so that the graph's pool is the network's arena. In
Triton's interpreter the same steps run on CPU tensors, without a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import cuda as operations
from ..messages import first_line
from .blocks import fuse_blocks
from .capture import call_with_schema
from .graph import Call, Constant, Graph, Node, Slot, Weights
from .outputs import Structure
from .passes import is_affine, is_depthwise, is_pointwise, is_sum
from .plan import Report, Row, describe_operation, fold, is_channels_last, is_native, macs_of, makes_sums, why_aten
from .roofline import Limits, Work, limits_of, work_of

KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # the first is the default
CALL_FIRST = "accelerate: inputs of these shapes must be passed once before such a call is captured in a CUDA graph"
Values = dict[Hashable, Tensor]


@dataclass(eq=False)
class _Packed:
    """A layer's weights in the kernels' layout."""

    weight: Tensor
    bias: Tensor


class CudaWeights:
    """What plans share: weights with batch norm folded in, each packed once and dropped with the last plan that uses
    it, and the memory of their CUDA graphs, in which one at a time can run.
    """

    def __init__(self) -> None:
        self._packed: WeakValueDictionary[tuple, _Packed] = WeakValueDictionary()
        self.lock = threading.Lock()
        self.pool: Any = None
        self.done: Any = None
        """Recorded after the last run of a graph, which may have been on another stream."""

    def get(self, weights: Weights, constants: dict[str, Tensor], kind: str, dtype: torch.dtype) -> _Packed:
        key = (weights, kind, dtype)
        packed = self._packed.get(key)
        if packed is None:
            weight, bias = fold(weights, constants)
            self._packed[key] = packed = _pack(weight, bias, kind, dtype)
        return packed

    def __len__(self) -> int:
        return len(self._packed)


def _pack(weight: Tensor, bias: Tensor | None, kind: str, dtype: torch.dtype) -> _Packed:
    """Bias and depthwise filters stay in the type that kernels sum in: they are small, and exact for nothing."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = weight.new_zeros(weight.shape[0], dtype=wide) if bias is None else bias.to(wide).contiguous()
    if kind == "depthwise_conv2d":  # (kH, kW, C): neighbouring channels are read together
        weight = weight.to(wide).permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    elif kind == "pointwise_conv2d":
        weight = _in_whole_vectors(weight.to(dtype).flatten(1))[:, :, None, None]
    elif kind == "conv2d":
        from ..triton_kernels import pack_conv2d

        weight = pack_conv2d(weight.to(dtype))
    else:  # for PyTorch
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        bias = bias.to(dtype)
    return _Packed(weight, bias)


def _in_whole_vectors(matrix: Tensor) -> Tensor:
    """The same matrix with its rows a multiple of 16 elements apart, which the compiler takes for aligned."""
    rows, columns = matrix.shape
    wide = matrix.new_zeros(rows, -(-columns // 16) * 16)
    wide[:, :columns] = matrix
    return wide[:, :columns]


@dataclass
class _Step:
    """A node, what computes it, and which values nobody reads after it."""

    node: Node
    run: Callable[[Values], None]
    kernel: str
    reads: list[Hashable]
    writes: list[Hashable]
    work: Work
    frees: list[Hashable] = field(default_factory=list)


class CudaPlan:
    """An executable plan for one set of input shapes on one device."""

    run_usual = None  # there is no way past Python

    def __init__(
        self,
        steps: list[_Step],
        graph: Graph,
        weights: CudaWeights,
        packed: list[_Packed],
        report: Report,
        device: torch.device,
    ):
        self.steps, self.weights, self.report, self.device = steps, weights, report, device
        self.packed = packed  # keeps them in CudaWeights
        self.inputs = list(graph.inputs)
        self.outputs = [output for output in graph.outputs if isinstance(output, Node)]
        self.leaves = [None if isinstance(output, Node) else output for output in graph.outputs]
        self.positions = [i for i, output in enumerate(graph.outputs) if isinstance(output, Node)]
        self.out_spec: pytree.TreeSpec | Structure = graph.out_spec
        self.recorded: _Recorded | None = None
        self.why_not_recorded = ""

    def run(self, tensors: list[Tensor]) -> Any:
        """The model's outputs. Images among them are channels_last where one of the inputs is."""
        memory_format = torch.channels_last if any(map(is_channels_last, tensors)) else torch.contiguous_format
        with torch.no_grad(), _current(self.device):
            results = self._results(tensors, memory_format)
        if self.out_spec.is_leaf() and self.positions == [0]:
            return results[0]
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        for position, result in zip(self.positions, results, strict=True):
            leaves[position] = result
        return self.out_spec.unflatten(leaves)

    def _results(self, tensors: list[Tensor], memory_format: torch.memory_format) -> list[Tensor]:
        # A caller's own CUDA graph takes in the steps one by one; an empty batch launches nothing.
        apart = self.device.type != "cuda" or not all(tensor.numel() for tensor in tensors)
        if not apart and (apart := torch.cuda.is_current_stream_capturing()) and not self.has_run:
            raise RuntimeError(CALL_FIRST)
        if apart or not self._is_recorded(tensors):
            return [_owned(result, memory_format) for result in self.execute(tensors)]
        shared, stream = self.weights, torch.cuda.current_stream()
        with shared.lock:
            stream.wait_event(shared.done)
            for mine, given in zip(self.recorded.inputs, tensors, strict=True):
                mine.copy_(given)
            self.recorded.graph.replay()
            results = [_owned(output, memory_format) for output in self.recorded.outputs]
            shared.done.record(stream)
        return results

    @property
    def has_run(self) -> bool:
        """Whether its kernels are compiled."""
        return self.recorded is not None or bool(self.why_not_recorded)

    def _is_recorded(self, tensors: list[Tensor]) -> bool:
        if not self.has_run:
            with self.weights.lock:
                if not self.has_run:
                    try:
                        with _one_at_a_time, torch.inference_mode(False), torch.no_grad():
                            self.recorded = _Recorded(self, tensors)
                    except torch.cuda.OutOfMemoryError:
                        raise
                    except RuntimeError as error:  # a step that PyTorch can't record: it waits for the GPU, say
                        self.why_not_recorded = first_line(error)
                        self.report = replace(self.report, why_not_recorded=self.why_not_recorded)
        return self.recorded is not None

    def execute(self, tensors: list[Tensor], after_row: Callable[[], None] | None = None) -> list[Tensor]:
        """Runs the steps one after another; ``after_row`` is called after each that is a row of the report."""
        from ..triton_kernels.common import dependent_launches

        values: Values = {}
        for node, tensor in zip(self.inputs, tensors, strict=True):
            values[node] = tensor if tensor.dtype == node.dtype else tensor.to(node.dtype)
        with dependent_launches(self.device):
            for step in self.steps:
                step.run(values)
                if after_row is not None and step.kernel:
                    after_row()
                for dead in step.frees:
                    del values[dead]
        return [values[output] for output in self.outputs]


_one_at_a_time = threading.Lock()
"""PyTorch records one CUDA graph at a time in a process."""


class _Recorded:
    """A plan's CUDA graph, with the tensors that it reads and writes: memory of the graphs' own, so that nobody
    else gets it while a graph that was dropped still runs.
    """

    def __init__(self, plan: CudaPlan, tensors: list[Tensor]):
        shared = plan.weights
        shared.pool = shared.pool or torch.cuda.graph_pool_handle()
        shared.done = shared.done or torch.cuda.Event()
        side = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        options = {"pool": shared.pool, "stream": side, "capture_error_mode": "thread_local"}
        benchmark, current = torch.backends.cudnn.benchmark, torch.cuda.current_stream()
        torch.backends.cudnn.benchmark = True
        try:
            # Once as usual, on a stream of its own as PyTorch asks: kernels are compiled, cuDNN chooses its own.
            side.wait_stream(current)
            with torch.cuda.stream(side):
                plan.execute(tensors)
            current.wait_stream(side)
            pairs = list(zip(plan.inputs, tensors, strict=True))
            with torch.cuda.graph(self.graph, **options), _nothing_filled():
                self.inputs = [torch.empty_like(tensor, dtype=node.dtype) for node, tensor in pairs]
                self.outputs = plan.execute(self.inputs)
        except Exception:
            # PyTorch leaves a failed recording on its stream, and its pool as one that is being recorded to.
            torch.cuda.set_stream(current)
            shared.pool = None
            raise
        finally:
            torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _nothing_filled() -> Iterator[None]:
    """PyTorch's deterministic mode fills new tensors: recorded, that would write over the inputs at each replay. (The
    setting is that of all threads.)
    """
    settings = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


def _owned(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy for the caller to keep."""
    return tensor.clone(memory_format=memory_format if tensor.dim() == 4 else torch.contiguous_format)


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def why_unavailable(device: torch.device) -> str | None:
    """What keeps the kernels from running on this device, in words; None if they run."""
    if device.type == "cpu" and not operations.INTERPRETED:
        return "backend 'triton' takes models on CUDA, and on the CPU only in Triton's interpreter, got one on the CPU"
    missing = operations.missing(device.index or 0)
    return missing and f"the Triton kernels don't run: {missing}"


def build(graph: Graph, weights: CudaWeights, device: torch.device, limits: Limits | None = None) -> CudaPlan:
    limits = limits or limits_of(device)
    fuse_blocks(graph, lambda *layers: _fastest(graph, limits, *layers))
    plan = _Builder(graph, weights, device, limits).build()
    if device.type == "cuda":  # weights were packed on this thread's stream
        torch.cuda.current_stream(device).synchronize()
    return plan


# Of a product within a fused block: all of these channels are in registers at once.
_MOST_BLOCK_CHANNELS = 64


def _fastest(
    graph: Graph, limits: Limits, expand: Node | None, depthwise: Node, project: Node | None
) -> tuple[Node | None, Node | None]:
    """Which of a block's layers run as one, by a count of what each way takes. Of float64 none: registers don't do."""
    if depthwise.dtype == torch.float64:
        return None, None
    if expand is not None and expand.inputs[0].shape[1] > _MOST_BLOCK_CHANNELS:
        expand = None
    if project is not None and project.shape[1] > _MOST_BLOCK_CHANNELS:
        project = None

    def seconds(first: Node | None, last: Node | None) -> float:
        layers = [node for node in (expand, depthwise, project) if node is not None]
        if first is None and last is None:
            return sum(work_of(n, _elements(n, graph.constants), limits).seconds(limits) for n in layers)
        fused = {first, depthwise, last}
        apart = [node for node in layers if node not in fused]
        end = last or depthwise
        inputs = [(first or depthwise).inputs[0], *(last.inputs[1:] if last is not None else [])]
        attrs = {"expand": first, "project": last, "hidden": depthwise.shape[1]}
        attrs |= {name: depthwise.attrs[name] for name in ("kernel", "stride")}
        block = Node("inverted_residual", inputs, end.shape, end.dtype, attrs)
        elements = sum(_elements(n, graph.constants) for n in fused if n is not None)
        total = work_of(block, elements, limits).seconds(limits)
        return total + sum(work_of(n, _elements(n, graph.constants), limits).seconds(limits) for n in apart)

    ways = {(first, last) for first in (None, expand) for last in (None, project)}
    return min(ways, key=lambda way: (seconds(*way), sum(node is not None for node in way)))


def _elements(node: Node, constants: dict[str, Tensor]) -> int:
    names = ("weights", "weights1", "weights2", "expand", "depthwise", "project")
    wanted = [node.attrs[name] for name in names if isinstance(node.attrs.get(name), Weights)]
    return sum(constants[weights.weight].numel() for weights in wanted)


class _Builder:
    def __init__(self, graph: Graph, weights: CudaWeights, device: torch.device, limits: Limits):
        self.graph, self.weights, self.device, self.limits = graph, weights, device, limits
        self.users = graph.users()
        self.outputs = graph.output_nodes()
        self.packed: list[_Packed] = []
        averaged = {n.inputs[0] for n in graph.nodes if n.op in ("global_avg_pool", "squeeze_excite")}
        self.summed = {node for node in averaged if makes_sums(node)}
        self.places = self._places()

    def build(self) -> CudaPlan:
        steps = [self.step(node) for node in self.graph.nodes if node.op != "input"]
        last: dict[Hashable, _Step] = {}
        for step in steps:
            for key in (*step.writes, *step.reads):
                last[key] = step
        kept = self.outputs | set(self.graph.inputs)
        for key, step in last.items():
            if key not in kept:
                step.frees.append(key)
        rows = tuple(
            Row(
                step.node.name,
                describe_operation(step.node),
                step.node.shape,
                step.kernel,
                "" if self.is_native(step.node) else why_aten(step.node),
                macs_of(step.node, self.graph.constants),
                round(step.work.memory_bytes + step.work.cached_bytes),
            )
            for step in steps
            if step.kernel
        )
        report = Report(rows, "triton", self._arena_bytes(steps), 0, 1)
        return CudaPlan(steps, self.graph, self.weights, self.packed, report, self.device)

    def _arena_bytes(self, steps: list[_Step]) -> int:
        """The most that lies between the layers at a time."""
        alive: dict[Hashable, int] = {}
        most = 0
        for step in steps:
            for key in step.writes:
                if isinstance(key, Node) and key not in self.places and step.kernel:
                    alive[key] = torch.Size(key.shape).numel() * key.dtype.itemsize
            most = max(most, sum(alive.values()))
            for key in step.frees:
                alive.pop(key, None)
        return most

    def _places(self) -> dict[Node, tuple[Node, int]]:
        """Of what is written straight into a concatenation: that, and its first channel there."""
        places = {}
        for cat in self.graph.nodes:
            if cat.op != "cat":
                continue
            start = 0
            for source in cat.inputs:
                alone = len(self.users[source]) == 1 and source not in self.outputs
                if alone and (source.op == "cat" or self.takes_out(source)):
                    places[source] = cat, start
                start += source.shape[1]
        return places

    def is_native(self, node: Node) -> bool:
        return is_native(node) or node.op in ("reshape", "result") or _is_multiplied(node)

    def takes_out(self, node: Node) -> bool:
        """Whether the kernel can write into some of the channels of a larger tensor."""
        images = ("inverted_residual", "pool2d", "gate", "activation", "global_avg_pool")
        return len(node.shape) == 4 and (
            node.op in images or is_sum(node) or (node.op == "conv2d" and self.is_native(node))
        )

    def out(self, node: Node, values: Values) -> Tensor:
        """Where the node's result goes: memory of its own, or a place in a concatenation."""
        if node in values:
            return values[node]
        if node in self.places:
            cat, start = self.places[node]
            values[node] = self.out(cat, values)[:, start : start + node.shape[1]]
        else:
            memory_format = torch.channels_last if len(node.shape) == 4 else torch.contiguous_format
            values[node] = torch.empty(node.shape, dtype=node.dtype, device=self.device, memory_format=memory_format)
        return values[node]

    def step(self, node: Node) -> _Step:
        run, kernel = self.native(node) if self.is_native(node) else (self.aten(node), "ATen")
        averages = node.op in ("global_avg_pool", "squeeze_excite") and node.inputs[0] in self.summed
        reads: list[Hashable] = [("sums", node.inputs[0]), *node.inputs[1:]] if averages else list(node.inputs)
        writes: list[Hashable] = [node, *([("sums", node)] if node in self.summed else [])]
        inner: Node | None = node
        while inner in self.places:  # a concatenation is there from the first of its parts on
            inner = self.places[inner][0]
            writes.append(inner)
        tensors = [key for key in reads if isinstance(key, Node)]
        work = work_of(node, _elements(node, self.graph.constants), self.limits, tensors)
        return _Step(node, run, kernel, reads, writes, work)

    def pack(self, weights: Weights, kind: str) -> _Packed:
        packed = self.weights.get(weights, self.graph.constants, kind, self.graph.dtype)
        self.packed.append(packed)
        return packed

    def native(self, node: Node) -> tuple[Callable[[Values], None], str]:
        """What computes the node into ``values``, and what it is called in the report; empty if it only looks."""
        from .. import triton_kernels as kernels

        attrs, activation = node.attrs, node.activation
        x = node.inputs[0]
        padding = attrs["padding"][::2] if "padding" in attrs else None

        if is_pointwise(node) or node.op == "linear":
            packed = self.pack(attrs["weights"], "pointwise_conv2d")
            residual = node.inputs[1] if attrs.get("residual") else None
            gate = node.inputs[-1] if attrs.get("gate") else None

            def pointwise(values: Values) -> None:
                kernels.pointwise_conv2d(
                    _image(values[x]),
                    packed.weight,
                    packed.bias,
                    activation,
                    None if gate is None else values[gate],
                    None if residual is None else _image(values[residual]),
                    out=_image(self.out(node, values)),
                )

            return pointwise, "Triton pointwise_conv2d"
        if is_depthwise(node) or _is_multiplied(node):
            packed = self.pack(attrs["weights"], "depthwise_conv2d")
            with_sums = node in self.summed

            def depthwise(values: Values) -> None:
                result = kernels.depthwise_conv2d(
                    values[x],
                    packed.weight,
                    packed.bias,
                    attrs["stride"],
                    padding,
                    attrs["dilation"],
                    activation,
                    out=self.out(node, values),
                    with_sums=with_sums,
                )
                if with_sums:
                    values["sums", node] = result[1]

            return depthwise, "Triton depthwise_conv2d" + (" + sums" if with_sums else "")
        if node.op == "conv2d":
            return self.dense(node)
        if node.op == "inverted_residual":
            layers = [
                attrs[name] and self.pack(attrs[name], f"{kind}_conv2d")
                for name, kind in (("expand", "pointwise"), ("depthwise", "depthwise"), ("project", "pointwise"))
            ]
            expand, middle, project = (layer and (layer.weight, layer.bias) for layer in layers)
            with_sums = node in self.summed

            def block(values: Values) -> None:
                result = kernels.inverted_residual(
                    values[x],
                    expand,
                    middle,
                    project,
                    attrs["stride"],
                    padding,
                    attrs["dilation"],
                    attrs["activations"],
                    values[node.inputs[1]] if len(node.inputs) > 1 else None,
                    out=self.out(node, values),
                    with_sums=with_sums,
                )
                if with_sums:
                    values["sums", node] = result[1]

            names = [name for name in ("expand", "depthwise", "project") if attrs[name]]
            return block, "Triton " + " + ".join(names) + (" + sums" if with_sums else "")
        if node.op == "squeeze_excite":
            first, second = (self.pack(attrs[name], "linear") for name in ("weights1", "weights2"))
            summed, pixels = x in self.summed, x.shape[2] * x.shape[3]

            def squeeze_excite(values: Values) -> None:
                values[node] = kernels.squeeze_excite_gate(
                    values["sums", x] if summed else kernels.sum_pixels(values[x]),
                    pixels,
                    first.weight,
                    first.bias,
                    second.weight,
                    second.bias,
                    attrs["squeeze_activation"],
                    attrs["gate_activation"],
                )

            return squeeze_excite, "Triton squeeze_excite" + ("" if summed else " + sums")
        if node.op == "global_avg_pool":
            if x in self.summed:
                pixels = x.shape[2] * x.shape[3]
                return (
                    lambda values: kernels.mean_of_sums(values["sums", x], pixels, out=self.out(node, values)),
                    "Triton mean_of_sums",
                )
            return (
                lambda values: kernels.global_avg_pool(values[x], out=self.out(node, values)),
                "Triton global_avg_pool",
            )
        if node.op == "pool2d":
            window = [attrs[name] for name in ("kernel", "stride")] + [padding, attrs["dilation"]]
            rest = [attrs[name] for name in ("mean", "count_padding", "divisor")]
            return (
                lambda values: kernels.pool2d(values[x], *window, *rest, out=self.out(node, values)),
                "Triton pool2d",
            )
        if node.op == "channels":

            def channels(values: Values) -> None:
                values[node] = values[x][:, attrs["start"] : attrs["start"] + node.shape[1]]

            return channels, ""
        if node.op == "cat":

            def cat(values: Values) -> None:
                start, target = 0, self.out(node, values)
                for source in node.inputs:
                    if source not in self.places:
                        target[:, start : start + source.shape[1]] = values[source]
                    start += source.shape[1]

            copies = [source for source in node.inputs if source not in self.places]
            return cat, "copy into cat" if copies else ""
        if node.op in ("reshape", "result"):
            return self.aten(node), ""
        if is_affine(node):
            norm = attrs["batch_norm"]
            wide = torch.float64 if node.dtype == torch.float64 else torch.float32
            tensors = [
                None if name is None else self.graph.constants[name].detach().to(wide).contiguous()
                for name in (norm.mean, norm.var, norm.weight, norm.bias)
            ]

            def affine(values: Values) -> None:
                values[node] = kernels.batch_norm_act(values[x], *tensors, norm.eps, activation)

            return affine, "Triton batch_norm_act"
        # activation, sum, gate
        residual = node.inputs[1] if is_sum(node) else None
        gate = node.inputs[1] if node.op == "gate" else None

        def epilogue(values: Values) -> None:
            kernels.epilogue(
                _image(values[x]),
                None,
                None if residual is None else _image(values[residual]),
                None if gate is None else values[gate],
                activation,
                out=_image(self.out(node, values)),
            )

        return epilogue, "Triton epilogue"

    def dense(self, node: Node) -> tuple[Callable[[Values], None], str]:
        """A stem of few channels runs on a kernel of ours, which reads the image as it lies; others on cuDNN, with bias
        and ReLU in its own epilogue where it has one, in a pass of ours elsewhere.
        """
        from .. import triton_kernels as kernels

        attrs, activation, x = node.attrs, node.activation, node.inputs[0]
        top, bottom, left, right = attrs["padding"]
        residual = node.inputs[1] if attrs.get("residual") else None
        if x.shape[1] < 16:
            packed = self.pack(attrs["weights"], "conv2d")

            def stem(values: Values) -> None:
                kernels.conv2d(
                    values[x],
                    packed.weight,
                    packed.bias,
                    attrs["kernel"],
                    attrs["stride"],
                    (top, left),
                    attrs["dilation"],
                    activation,
                    None if residual is None else values[residual],
                    out=self.out(node, values),
                )

            return stem, "Triton conv2d"
        packed = self.pack(attrs["weights"], "cudnn")
        symmetric = top == bottom and left == right
        geometry = attrs["stride"], (top, left) if symmetric else (0, 0), attrs["dilation"]
        has_relu = activation == "relu" and self.device.type == "cuda" and node.dtype != torch.float64

        def with_relu(image: Tensor, values: Values) -> Tensor | None:
            """None where this cuDNN has no such kernel, which the run before the recording shows."""
            nonlocal has_relu
            try:
                if residual is None:
                    return torch.cudnn_convolution_relu(image, packed.weight, packed.bias, *geometry, 1)
                z = values[residual].contiguous(memory_format=torch.channels_last)
                return torch.cudnn_convolution_add_relu(image, packed.weight, z, 1.0, packed.bias, *geometry, 1)
            except RuntimeError:
                has_relu = False
                return None

        def cudnn(values: Values) -> None:
            image = values[x].contiguous(memory_format=torch.channels_last)
            if not symmetric:
                image = torch.nn.functional.pad(image, (left, right, top, bottom))
            y = with_relu(image, values) if has_relu else None
            if y is None:
                y = torch.nn.functional.conv2d(image, packed.weight, None, *geometry)
                target = self.out(node, values) if node in self.places else y
                rest = None if residual is None else values[residual]
                values[node] = kernels.epilogue(y, packed.bias, rest, None, activation, out=target)
            elif node in self.places:
                self.out(node, values).copy_(y)
            else:
                values[node] = y

        return cudnn, "cuDNN" if has_relu else "cuDNN, Triton epilogue"

    def aten(self, node: Node) -> Callable[[Values], None]:
        if node.op == "result":
            return lambda values: values.__setitem__(node, values[node.inputs[0]][node.attrs["index"]])
        if node.op == "reshape":
            return lambda values: values.__setitem__(node, values[node.inputs[0]].reshape(node.shape))
        call: Call = node.attrs["call"]
        arguments = [
            argument.of(self.graph.constants).detach() if isinstance(argument, Constant) else argument
            for argument in call.arguments
        ]

        def given(value: Any, values: Values) -> Any:
            if isinstance(value, Slot):
                return values[node.inputs[value.index]]
            return [given(each, values) for each in value] if isinstance(value, list) else value

        def run(values: Values) -> None:
            from ..triton_kernels.common import dependent_launches

            with dependent_launches(None):  # an operator of ours may have been given computed weights
                values[node] = call_with_schema(call.target, [given(value, values) for value in arguments])

        return run


def _is_multiplied(node: Node) -> bool:
    """Whether this is a depthwise convolution with several filters a channel."""
    return node.op == "conv2d" and node.attrs["groups"] == node.inputs[0].shape[1] > 1


def _image(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension are channels as an image of one pixel each, channels_last; images as they are."""
    if tensor.dim() == 4:
        return tensor
    channels = tensor.shape[-1] if tensor.dim() else 1
    rows = tensor.contiguous().view(-1, channels) if tensor.numel() else tensor.new_empty((0, channels))
    return rows.as_strided((rows.shape[0], channels, 1, 1), (channels, 1, channels, channels))
