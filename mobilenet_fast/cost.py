"""What networks cost: multiply-accumulates, parameters and bytes of activations, counted without running them.

The formulas are those of MobileNetV1 (Howard et al., 2017, arXiv:1704.04861), section 3.1: for a K × K kernel over M
input and N output channels with P output pixels, a standard convolution takes K² · M · N · P multiply-accumulates, a
depthwise one K² · M · P, a pointwise one M · N · P, and the last two together 1 / N + 1 / K² of the standard one.
"""

from __future__ import annotations

import copy
import csv
import io
import numbers
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from . import models
from .accelerate import accelerate
from .messages import first_line


def standard_macs(kernel_size: int, in_channels: int, out_channels: int, pixels: int) -> int:
    """Multiply-accumulates of a dense convolution with ``pixels`` output pixels."""
    return kernel_size**2 * in_channels * out_channels * pixels


def depthwise_macs(kernel_size: int, channels: int, pixels: int) -> int:
    """Multiply-accumulates of a depthwise convolution with ``pixels`` output pixels."""
    return kernel_size**2 * channels * pixels


def pointwise_macs(in_channels: int, out_channels: int, pixels: int) -> int:
    """Multiply-accumulates of a 1x1 convolution."""
    return in_channels * out_channels * pixels


def separable_macs(kernel_size: int, in_channels: int, out_channels: int, pixels: int) -> int:
    """Multiply-accumulates of a depthwise convolution and the 1x1 convolution behind it."""
    return depthwise_macs(kernel_size, in_channels, pixels) + pointwise_macs(in_channels, out_channels, pixels)


def separable_ratio(kernel_size: int, out_channels: int) -> float:
    """`separable_macs` over `standard_macs`, whatever the input channels and pixels."""
    return 1 / out_channels + 1 / kernel_size**2


@dataclass(frozen=True)
class Layer:
    """A module that computes something itself, or what a module computes between its children.

    ``macs`` are the multiply-accumulates of convolutions and matrix products for the whole batch, ``parameters`` the
    elements of its own parameters, ``shape`` and ``activation_bytes`` its output's; 0 bytes where the output is an
    input's memory.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    parameters: int
    activation_bytes: int


@dataclass(frozen=True)
class Cost:
    """The layers of a network in the order of their first use. ``str(cost)`` is a table."""

    layers: tuple[Layer, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Elements of the parameters of all modules that a call goes through, and of those that it reads elsewhere; one
        that several modules share counts once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all layers' outputs, which training keeps and inference reuses."""
        return sum(layer.activation_bytes for layer in self.layers)

    def _rows(self) -> list[tuple]:
        return [
            (x.name, x.kind, "×".join(map(str, x.shape)), x.macs, x.parameters, x.activation_bytes) for x in self.layers
        ]

    def to_csv(self) -> str:
        """A line for each layer: name, kind, output, macs, parameters, activation_bytes."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([_COLUMNS, *self._rows()])
        return out.getvalue()

    def __str__(self) -> str:
        total = ("total", "", "", self.macs, self.parameters, self.activation_bytes)
        table = [_COLUMNS, *([*row[:3], *(f"{n:,}" for n in row[3:])] for row in [*self._rows(), total])]
        widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
        lines = []
        for row in table:
            cells = [
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


_COLUMNS = ("layer", "kind", "output", "macs", "parameters", "activation_bytes")


def count(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Counts what a call of ``model`` costs, on the meta device: nothing is computed, and ``model`` is left as it is.

    Args:
        model: any module that takes one tensor; it is counted in eval mode.
        input_size: of that tensor, the batch first: (N, C, H, W) for these networks.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``input_size`` is no shape, or the model does not take it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"count: model must be a module, got {type(model).__name__}")
    size = tuple(input_size) if isinstance(input_size, Iterable) else ()
    if not size or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size):
        raise ValueError(f"count: input_size must be positive integers, batch first, got {input_size}")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    model = _on_meta(model).eval()
    x = torch.empty(size, dtype=dtype, device="meta")
    order: dict[nn.Module, tuple[int, ...]] = {}
    made: dict[nn.Module, int] = {}
    seen = [x]  # kept, so that no later tensor gets the storage of one that is gone
    storages = {_storage(x)}

    running: list[nn.Module] = []
    reads = _Reads(running)

    def keep(module: nn.Module, values) -> list[torch.Tensor]:
        tensors = [y for y in tree_leaves(values) if isinstance(y, torch.Tensor)]
        for y in tensors:
            if _storage(y) not in storages:
                storages.add(_storage(y))
                seen.append(y)
                made[module] = made.get(module, 0) + y.numel() * y.element_size()
        return tensors

    def before(module, args):
        if running:  # what it is given was made by the module that calls it, if by none before
            keep(running[-1], args)
        running.append(module)
        order.setdefault(module, ())

    def after(module, args, output):
        running.pop()
        tensors = keep(module, output)
        order[module] = tuple(tensors[0].shape) if tensors else ()

    for module in model.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter, reads:
            model(x)
    except Exception as error:
        raise ValueError(f"count: the model does not take an input of {size}: {first_line(error)}") from error

    # The counter's numbers of a module are those of all modules in it, two operations a multiply-accumulate.
    counted, root = counter.get_flop_counts(), type(model).__name__

    def macs(name: str) -> int:
        return sum(counted.get(f"{root}.{name}" if name else root, {}).values()) // 2

    def called(module: nn.Module) -> Iterator[nn.Module]:
        """Its children, and in the place of those that are only kept in it, such as lists, theirs."""
        for child in module.children():
            yield from (child,) if child in order else called(child)

    layers, owned = [], set()
    called_own = {id(p) for module in order for p in module.parameters(recurse=False)}
    names = {module: name for name, module in model.named_modules()}
    for module, shape in order.items():
        name = names[module]
        children = [macs(names[child]) for child in called(module)]
        read = [p for p in reads.by_module.get(module, ()) if id(p) not in called_own]
        own = [p for p in (*module.parameters(recurse=False), *read) if id(p) not in owned]
        owned.update(map(id, own))
        layer = Layer(
            name=name or root,
            kind=type(module).__name__,
            shape=shape,
            macs=macs(name) - sum(children),
            parameters=sum(p.numel() for p in own),
            activation_bytes=made.get(module, 0),
        )
        if layer.macs or layer.parameters or layer.activation_bytes:
            layers.append(layer)
    return Cost(tuple(layers))


class _Reads(TorchDispatchMode):
    """Which parameters operations read while which module runs: some belong to modules that are never called."""

    def __init__(self, running: list[nn.Module]) -> None:
        super().__init__()
        self.running = running
        self.by_module: dict[nn.Module, dict[nn.Parameter, None]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, nn.Parameter) and self.running:
                self.by_module.setdefault(self.running[-1], {})[value] = None
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy with tensors that are nowhere, in which what was shared is."""
    copies = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, copies).to("meta")


def scale_to_budget(
    *, macs: float | None = None, params: float | None = None, latency_ms: float | None = None, threads: int = 1
) -> tuple[float, float, int]:
    """Width, depth and resolution of the largest EfficientNet within a budget, by the paper's compound scaling.

    Depth 1.2^φ, width 1.1^φ and resolution 224 · 1.15^φ, φ from -4 to 8 in steps of a hundredth; resolutions are
    rounded to multiples of 8. `mobilenet_fast.models.efficientnet` takes the three.

    Args:
        macs: multiply-accumulates of a picture, such as 4e8.
        params: parameters of the network with 1000 classes.
        latency_ms: of the accelerated network at batch 1 on this machine, in milliseconds: the median of several calls.
        threads: for the latency.

    Raises:
        TypeError: a budget is no number.
        ValueError: not exactly one budget is given, or it is not positive or less than what φ = -4 takes; ``threads``
            is less than 1.

    EfficientNet (Tan and Le, 2019, arXiv:1905.11946), section 3.3.
    """
    budgets = {"macs": macs, "params": params, "latency_ms": latency_ms}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"scale_to_budget: one of macs, params and latency_ms must be given, got {len(given)}")
    ((name, budget),) = given.items()
    if not isinstance(budget, numbers.Real):
        raise TypeError(f"scale_to_budget: {name} must be a number, got {type(budget).__name__}")
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"scale_to_budget: threads must be an integer of at least 1, got {threads}")
    if not budget > 0:
        raise ValueError(f"scale_to_budget: {name} must be positive, got {budget}")

    def fits(hundredths: int) -> bool:
        width, depth, resolution = compound_scaling(hundredths / 100)
        if name == "latency_ms":
            return _latency_ms(width, depth, resolution, threads) <= budget
        with torch.device("meta"):
            network = models.efficientnet(width, depth, resolution)
        found = count(network, (1, 3, resolution, resolution))
        return (found.macs if name == "macs" else found.parameters) <= budget

    low, high = -400, 800
    if not fits(low):
        raise ValueError(f"scale_to_budget: {name}={budget:g} is less than the smallest network (φ = -4) takes")
    if name != "latency_ms" and fits(high):
        return compound_scaling(high / 100)
    while high - low > 1:  # the smallest network fits, one of φ = 8 is taken not to
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return compound_scaling(low / 100)


def compound_scaling(phi: float) -> tuple[float, float, int]:
    """Width, depth and resolution of EfficientNet for a compound coefficient φ; B0 is φ = 0."""
    return 1.1**phi, 1.2**phi, max(32, 8 * round(224 * 1.15**phi / 8))


def _latency_ms(width: float, depth: float, resolution: int, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(1, 3, resolution, resolution)
        fast = accelerate(models.efficientnet(width, depth, resolution).eval(), (x,))
        times = []
        for _ in range(15):
            start = time.perf_counter()
            fast(x)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    finally:
        torch.set_num_threads(before)


def plot_scaling(path: str | os.PathLike) -> None:
    """Draws what scaling costs as a PNG: MobileNetV1 by width α and by resolution ρ, EfficientNet by φ.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_scaling: matplotlib is not installed; run: pip install matplotlib") from error

    def costs(build: Callable[..., nn.Module], size: int, *arguments, **kwargs) -> Cost:
        with torch.device("meta"):
            return count(build(*arguments, **kwargs), (1, 3, size, size))

    widths = [0.25, 0.5, 0.75, 1.0, 1.25]
    sizes = [128, 160, 192, 224, 256]
    coefficients = [-2, -1, 0, 1, 2, 3, 4]
    scalings = [(phi, compound_scaling(phi)) for phi in coefficients]
    series = {
        "MobileNetV1, α": (widths, [costs(models.mobilenet_v1, 224, width_mult=a) for a in widths]),
        "MobileNetV1, ρ": ([s / 224 for s in sizes], [costs(models.mobilenet_v1, s) for s in sizes]),
        "EfficientNet, φ": (coefficients, [costs(models.efficientnet, s[2], *s) for _, s in scalings]),
    }
    figure = Figure((12, 3.6), layout="constrained")
    for axes, (title, (x, found)) in zip(figure.subplots(1, 3), series.items(), strict=True):
        axes.plot(x, [c.macs / 1e6 for c in found], "o-", label="multiply-accumulates, millions")
        axes.plot(x, [c.parameters / 1e6 for c in found], "s-", label="parameters, millions")
        axes.plot(x, [c.activation_bytes / 2**20 for c in found], "^-", label="activations, MiB")
        axes.set(title=title, yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)
