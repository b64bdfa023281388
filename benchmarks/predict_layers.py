"""What a GPU should take for single layers and for training, by counting, as `benchmarks.predict` does for networks.

A direction of a layer is some kernels, and a kernel reads and writes images. What a kernel of the same call has touched
before, and is less than half of the L2 cache, comes from there; everything else from memory, as the suite empties the
caches first. Of training, layer by layer, PyTorch's passes are counted as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.cases import layers
from benchmarks.cases.layers import BatchNorm, Convolution, Layer, SqueezeExcite
from mobilenet_fast.accelerate.roofline import EPILOGUE, TAP, Limits, Work
from mobilenet_fast.triton_kernels import tiles

BATCHES = (1, 32, 256)
DTYPES = {torch.float16: "fp16", torch.float32: "fp32"}  # by the suite's names
# Instructions for each tap of our backward kernel, beside an epilogue's for each input, as compiled in float16 for
# stride 1: 42 in all for 3×3, 90 for 5×5. One gradient's multiply-add is one of them.
BACKWARD_TAP = 3.2


@dataclass(frozen=True)
class Kernel:
    images: dict[str, float]
    """Elements that it reads or writes, by name."""
    macs: float = 0
    instructions: float = 0
    """Of threads; where none are given, an epilogue's for each element of the largest image."""


@dataclass
class Call:
    """Kernels one after another."""

    dtype: torch.dtype
    limits: Limits
    touched: set[str] = field(default_factory=set)
    works: list[Work] = field(default_factory=list)

    def add(self, kernels: list[Kernel]) -> Call:
        for kernel in kernels:
            sizes = {name: count * self.dtype.itemsize for name, count in kernel.images.items()}
            cached = sum(
                size for name, size in sizes.items() if name in self.touched and size <= self.limits.l2_bytes // 2
            )
            instructions = kernel.instructions or EPILOGUE * max(kernel.images.values())
            memory = sum(sizes.values()) - cached
            self.works.append(Work(memory, cached, kernel.macs, instructions, dtype=self.dtype))
            self.touched |= sizes.keys()
        return self

    @property
    def seconds(self) -> float:
        return sum(work.seconds(self.limits) for work in self.works)

    @property
    def bytes(self) -> float:
        return sum(work.memory_bytes + work.cached_bytes for work in self.works)

    @property
    def macs(self) -> float:
        return sum(work.macs for work in self.works)

    @property
    def bound(self) -> str:
        return max(self.works, key=lambda work: work.seconds(self.limits)).bound(self.limits)


def kernels_of(layer: Layer, direction: str, batch: int, dtype: torch.dtype, ours: bool = True) -> list[Kernel]:
    """Of a direction that the suite times: forward, that and some gradients ("forward+input"), or for batch norm both
    in training. PyTorch's where not ``ours``.
    """
    backward = direction.partition("+")[2]
    if isinstance(layer, Convolution):
        return _convolution(layer, batch, dtype, backward in ("input", "both"), backward in ("weight", "both"), ours)
    x = batch * layer.channels * layer.size**2
    if isinstance(layer, BatchNorm):
        return _batch_norm(x, layer.channels, layer.activation != "none", direction == "training", ours)
    assert isinstance(layer, SqueezeExcite)
    return _squeeze_excite(x, batch * layer.channels, backward == "both", ours)


def _convolution(
    layer: Convolution, batch: int, dtype: torch.dtype, of_input: bool, of_weight: bool, ours: bool
) -> list[Kernel]:
    out_height, out_width = (
        (size + 2 * pad - kernel) // layer.stride + 1
        for size, pad, kernel in zip((layer.height, layer.width), layer.padding, layer.kernel, strict=True)
    )
    x = batch * layer.channels * layer.height * layer.width
    y = batch * layer.out_channels * out_height * out_width
    taps = math.prod(layer.kernel)
    if layer.depthwise:
        forward = Kernel({"x": x, "y": y}, instructions=y * (TAP * taps + EPILOGUE))
        if not of_input and not of_weight:
            return [forward]
        needed = ["grad y", *(["x"] if of_weight else []), *(["grad x"] if of_input else [])]
        sizes = {"grad y": y, "x": x, "grad x": x}
        # Both gradients in one pass; PyTorch computes one after the other, at the forward kernel's instructions here.
        if not ours:
            one = y * TAP * taps + x * EPILOGUE
            images = [*([["grad y", "grad x"]] if of_input else []), *([["grad y", "x"]] if of_weight else [])]
            return [forward, *(Kernel({name: sizes[name] for name in each}, instructions=one) for each in images)]
        a_tap = BACKWARD_TAP - (not (of_input and of_weight))
        images = {name: sizes[name] for name in needed}
        if not of_weight:
            return [forward, Kernel(images, instructions=y * taps * a_tap + x * EPILOGUE)]
        sums = {"partial sums": _parts(layer, batch, dtype) * layer.channels * taps * 4 / dtype.itemsize}
        small = Kernel({"weight": layer.channels * taps})
        backward = Kernel(images | sums, instructions=y * taps * a_tap + x * EPILOGUE)
        # Their sum, and the weight's gradient in its own order and dtype.
        return [forward, backward, Kernel(sums), *[small] * (1 if dtype == torch.float32 else 2)]
    macs = y * layer.channels * taps
    weight = layer.channels * layer.out_channels * taps
    found = [Kernel({"x": x, "y": y, "weight": weight}, macs, y * EPILOGUE)]
    if of_input:
        found.append(Kernel({"grad y": y, "grad x": x, "weight": weight}, macs, x * EPILOGUE))
    if of_weight:
        found.append(Kernel({"grad y": y, "x": x, "grad weight": weight}, macs, (x + y) * EPILOGUE / 2))
    return found


def _parts(layer: Convolution, batch: int, dtype: torch.dtype) -> int:
    """That our backward kernel cuts images into."""
    shape = batch, layer.channels, layer.height, layer.width
    tile = tiles.depthwise_backward_tile(
        *(tiles.H100, True, dtype.itemsize, shape, layer.kernel, 1, (layer.stride, layer.stride))
    )
    return tiles.depthwise_backward_parts(tiles.H100, tile, batch, layer.channels)


def _batch_norm(x: float, vector: float, activation: bool, training: bool, ours: bool) -> list[Kernel]:
    if not training:
        return [Kernel({"x": x, "y": x})]
    statistics, norm = Kernel({"x": x}), Kernel({"x": x, "y": x})
    if ours or not activation:
        backward = [Kernel({"grad y": x, "x": x}), Kernel({"grad y": x, "x": x, "grad x": x})]
        small = [Kernel({"vector": vector})] if ours else []  # merges the parts' statistics, and sums
        return [statistics, *small, norm, backward[0], *small, backward[1]]
    return [
        *(statistics, norm, Kernel({"y": x, "z": x})),
        *(Kernel({"grad z": x, "y": x, "grad y": x}), Kernel({"grad y": x, "x": x})),
        Kernel({"grad y": x, "x": x, "grad x": x}),
    ]


def _squeeze_excite(x: float, vectors: float, backward: bool, ours: bool) -> list[Kernel]:
    small = Kernel({"vectors": vectors})
    forward = [Kernel({"x": x}), *[small] * (2 if ours else 5), Kernel({"x": x, "y": x})]
    if not backward:
        return forward
    # The layers' gradients are PyTorch's in both, of vectors.
    if ours:
        return [*forward, Kernel({"x": x, "grad y": x}), *[small] * 16, Kernel({"grad y": x, "grad x": x})]
    products = [Kernel({"grad y": x, "gated": x}), Kernel({"grad y": x, "x": x, "product": x}), Kernel({"product": x})]
    return [*forward, *products, *[small] * 12, Kernel({"mean": x}), Kernel({"gated": x, "mean": x, "grad x": x})]


def layer_rows(chip: str, limits: Limits) -> Iterator[dict]:
    """One for each of the suite's layers on a GPU, with batch, dtype and direction."""
    for case in layers.cases():
        if "cuda" not in case.devices:
            continue
        layer = layers.parse(case.name)
        for dtype, label in DTYPES.items():
            if case.dtypes and label not in case.dtypes:
                continue
            for batch in case.batches or BATCHES:
                for direction in case.directions:
                    call = Call(dtype, limits).add(kernels_of(layer, direction, batch, dtype))
                    yield {
                        "chip": chip,
                        "case": case.name,
                        "dtype": label,
                        "batch": batch,
                        "direction": direction,
                        "kernels": len(call.works),
                        "bytes": round(call.bytes),
                        "macs": round(call.macs),
                        "bound": call.bound,
                        "predicted_us": f"{1e6 * call.seconds:.2f}",
                    }


def training_seconds(limits: Limits, name: str, batch: int, dtype: torch.dtype, ours: bool) -> float:
    """Of forward and backward of a network's convolutions, batch norms with their activations, and squeeze-excites.
    Residuals, pooling, the classifier, the loss and the optimizer are left out.
    """
    total = 0.0
    for layer in layers.found(name):
        direction = "training" if isinstance(layer, BatchNorm) else "forward+both"
        total += Call(dtype, limits).add(kernels_of(layer, direction, batch, dtype, ours)).seconds
    return total
