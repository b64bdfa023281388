"""How long a network takes, from the measured times of its parts: see `LatencyTable`."""

from __future__ import annotations

import copy
import itertools
import json
import math
import numbers
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _C
from ..accelerate import accelerate
from ..messages import first_line
from ..models.mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from ..nn import ConvNormAct, FusedSequential, InvertedResidual, SqueezeExcitation
from ..nn.dispatch import ACTIVATION_LAYERS, activation_name
from ..nn.fusion import Chained
from ..progress import with_progress
from .space import Architecture, SearchSpace, Skip

KINDS = ("conv2d", "depthwise_conv2d", "inverted_residual", "global_avg_pool", "linear", "call")


@dataclass(frozen=True)
class Part:
    """What `accelerate` never fuses with its neighbours: the unit of a table.

    ``kind``: "conv2d", a dense or pointwise convolution; "depthwise_conv2d"; "inverted_residual", a depthwise and a 1x1
    convolution, behind another 1x1 convolution unless ``expanded_channels`` equals ``in_channels``; "global_avg_pool";
    "linear"; or "call", what a call takes beyond its steps. ``height`` and ``width`` are the input's,
    ``squeeze_channels`` are 0 without squeeze-and-excitation, ``activation`` is that behind all convolutions but an
    inverted residual's last, which has ``out_activation``, and ``skip`` is "identity" or "pool" where the input or its
    3x3 means are added.
    """

    kind: str
    in_channels: int = 0
    out_channels: int = 0
    height: int = 1
    width: int = 1
    expanded_channels: int = 0
    kernel_size: int = 1
    stride: int = 1
    squeeze_channels: int = 0
    activation: str = "none"
    out_activation: str = "none"
    skip: str = "none"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"LatencyTable: there is no part {self.kind!r}; there are {', '.join(KINDS)}")

    def __str__(self) -> str:
        channels = (self.in_channels, self.expanded_channels, self.out_channels)
        if self.kind == "call":
            return "call"
        said = [self.kind, "→".join(str(c) for c in channels if c)]
        if self.kind in ("conv2d", "depthwise_conv2d", "inverted_residual"):
            said += [f"on {self.height}×{self.width}", f"kernel {self.kernel_size}", f"stride {self.stride}"]
        said += [f"squeeze {self.squeeze_channels}"] if self.squeeze_channels else []
        said += [name for name in (self.activation, self.out_activation) if name != "none"]
        said += [f"+ {self.skip}"] if self.skip != "none" else []
        return " ".join(said)

    def build(self) -> nn.Module:
        """A module of this part alone."""
        c, k, act = self.in_channels, self.out_channels, ACTIVATION_LAYERS[self.activation]
        squeeze = self.squeeze_channels or None
        if self.kind == "linear":
            return nn.Sequential(nn.Linear(c, k), act())
        if self.kind == "global_avg_pool":
            return nn.AdaptiveAvgPool2d(1)
        if self.kind == "inverted_residual":
            layer = InvertedResidual(
                c, self.expanded_channels, k, self.kernel_size, self.stride, 1, squeeze, self.activation
            )
            layer.use_res_connect = self.skip == "identity"
            if self.out_activation != "none":
                layer = nn.Sequential(layer, ACTIVATION_LAYERS[self.out_activation]())
        else:
            groups = c if self.kind == "depthwise_conv2d" else 1
            layer = ConvNormAct(c, k, self.kernel_size, self.stride, groups=groups, activation_layer=act)
            if squeeze:
                layer = FusedSequential(layer, SqueezeExcitation(k, squeeze, nn.ReLU, nn.Hardsigmoid))
        if self.skip == "pool" or (self.skip == "identity" and self.kind != "inverted_residual"):
            layer = Skip(layer, pool=self.skip == "pool")
        return layer


@dataclass
class _Unit:
    """A layer with the activation behind it, as a forward pass met it."""

    kind: str  # conv2d, pointwise, depthwise_conv2d, squeeze, global_avg_pool, linear
    name: str
    module: nn.Module
    shape: tuple[int, ...]
    result: tuple[int, ...]
    within: tuple[nn.Module, ...]  # the modules around it that add their input
    activation: str = "none"


def parts_of(network: nn.Module | Architecture, shape: tuple[int, ...]) -> list[Part]:
    """The parts of a network in the order of use, found by a forward pass on the meta device.

    Args:
        network: a chain of convolutions, blocks that add their input and linear layers.
        shape: (N, C, H, W) of its input.

    Raises:
        ValueError: it has a layer that is no part, or is no chain.
    """
    if isinstance(network, Architecture):
        with torch.device("meta"):
            network = network.build()
    elif isinstance(network, nn.Module):
        network = copy.deepcopy(network).to("meta").float()
    else:
        raise TypeError(f"LatencyTable: network must be a module or an Architecture, got {type(network).__name__}")
    return _parts(_units(network.eval(), shape))


def _units(network: nn.Module, shape: tuple[int, ...]) -> list[_Unit]:
    units: list[_Unit] = []
    within: list[nn.Module] = []
    handles = []

    def enter(module: nn.Module, _) -> None:
        within.append(module)

    def leave(module: nn.Module, *_) -> None:
        within.pop()

    def met(name: str, kind: str, activation: str | None) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if kind == "activation":
                if units and units[-1].activation == "none":
                    units[-1].activation = activation
            else:
                units.append(_Unit(kind, name, module, tuple(inputs[0].shape), tuple(output.shape), tuple(within)))

        return hook

    def walk(module: nn.Module, name: str) -> None:
        if _adds_input(module):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        children = list(module.named_children())
        if not children or _is_squeeze(module):
            if kind := _kind(module, name):  # which a hook would change
                handles.append(module.register_forward_hook(met(name, kind, activation_name(module))))
            if kind in ("activation", "squeeze") or isinstance(module, nn.BatchNorm2d):
                module.forward = _same  # on the meta device these take most of the time
            return
        for child_name, child in children:
            walk(child, f"{name}.{child_name}" if name else child_name)

    walk(network, "")
    try:
        with torch.no_grad():
            network(torch.empty(shape, device="meta"))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"LatencyTable: the network does not take {shape}: {first_line(error)}") from None
    finally:
        for handle in handles:
            handle.remove()
    return units


def _same(x: Tensor) -> Tensor:
    return x


# Whether a block adds its input, as this package's and torchvision's, torchvision's MnasNet, and timm's have it.
_SKIP_FLAGS = ("use_res_connect", "apply_residual", "has_skip")
_DROPS = ("StochasticDepth", "DropPath")  # of this package and torchvision, and of timm; in evaluation their input


def _adds_input(module: nn.Module) -> bool:
    if isinstance(module, Skip):
        return True
    if isinstance(module, Chained):
        links = module.links()
        return links is not None and links.adds_input
    return any(getattr(module, name, False) for name in _SKIP_FLAGS)


def _is_squeeze(module: nn.Module) -> bool:
    return _squeeze_layer(module) is not None


def _squeeze_layer(module: nn.Module) -> nn.Conv2d | None:
    """The first convolution of torchvision's squeeze-and-excitation, ours among them, or of timm's."""
    for first, second in (("fc1", "fc2"), ("conv_reduce", "conv_expand")):
        if hasattr(module, first) and hasattr(module, second):
            return getattr(module, first)
    return None


def _kind(module: nn.Module, name: str) -> str | None:
    """None for a layer that takes no time."""
    if _is_squeeze(module):
        return "squeeze"
    if activation_name(module) not in (None, "none"):
        return "activation"
    if isinstance(module, nn.Conv2d):
        k, s, d = module.kernel_size, module.stride, module.dilation
        square = k[0] == k[1] and s[0] == s[1] and d == (1, 1) and k[0] % 2 == 1
        depthwise = module.groups == module.in_channels == module.out_channels > 1
        if square and (module.groups == 1 or depthwise):
            return "depthwise_conv2d" if depthwise else "pointwise" if (*k, *s) == (1, 1, 1, 1) else "conv2d"
    elif isinstance(module, nn.Linear):
        return "linear"
    elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return "global_avg_pool"
    elif isinstance(module, (nn.BatchNorm2d, nn.Dropout, nn.Identity, nn.Flatten)) or type(module).__name__ in _DROPS:
        return None
    elif isinstance(module, nn.AvgPool2d) and name.split(".")[-1] == "skip":
        return None
    raise ValueError(f"LatencyTable: no part is like {name or 'the network'}, {module}")


def _parts(units: list[_Unit]) -> list[Part]:
    parts: list[Part] = []
    i = 0
    while i < len(units):
        used = _length([unit.kind for unit in units[i : i + 4]])
        taken = units[i : i + used]
        beside = [unit for unit in (*units[max(0, i - 1) : i], *units[i + used : i + used + 1])]
        for module in taken[0].within + taken[-1].within:
            if any(module in unit.within for unit in beside) or any(module not in unit.within for unit in taken):
                raise ValueError(f"LatencyTable: no part is like the block around {taken[0].name}")
        part = _part(taken)
        if parts:
            before = units[i - 1].result
            if part.kind == "linear" and math.prod(before[2:]) > 1:  # a mean that is no module
                parts.append(Part("global_avg_pool", before[1], before[1], *before[2:]))
                before = before[:2]
            if (part.in_channels, part.height * part.width) != (before[1], math.prod(before[2:])):
                here, there = taken[0].name, units[i - 1].name
                raise ValueError(f"LatencyTable: networks must be chains, and {here} does not take what {there} gives")
        parts.append(part)
        i += used
    return parts


def _length(kinds: list[str]) -> int:
    """How many of the next units are one part."""
    for pattern in (
        ("pointwise", "depthwise_conv2d", "squeeze", "pointwise"),
        ("pointwise", "depthwise_conv2d", "pointwise"),
        ("depthwise_conv2d", "squeeze", "pointwise"),
        ("depthwise_conv2d", "pointwise"),
        ("depthwise_conv2d", "squeeze"),
        ("conv2d", "squeeze"),
        ("pointwise", "squeeze"),
    ):
        if tuple(kinds[: len(pattern)]) == pattern:
            return len(pattern)
    return 1


def _part(units: list[_Unit]) -> Part:
    first, last = units[0], units[-1]
    kind = "conv2d" if first.kind == "pointwise" else first.kind
    if kind == "squeeze":
        raise ValueError(f"LatencyTable: no part is like {first.name}, squeeze-and-excitation without a convolution")
    geometry: dict = {}
    depthwise = next((unit for unit in units if unit.kind == "depthwise_conv2d"), None)
    squeeze = next((_squeeze_layer(unit.module).out_channels for unit in units if unit.kind == "squeeze"), 0)
    filters = depthwise or first
    if isinstance(filters.module, nn.Conv2d):
        geometry = {"kernel_size": filters.module.kernel_size[0], "stride": filters.module.stride[0]}
        skips = [module for module in first.within if isinstance(module, Skip)]
        pools = any(isinstance(module.skip, nn.AvgPool2d) for module in skips)
        geometry["skip"] = "pool" if pools else "identity" if first.within else "none"
        geometry["squeeze_channels"] = squeeze
    if last.kind == "pointwise" and depthwise is not None:
        kind = "inverted_residual"
        geometry |= {"expanded_channels": depthwise.shape[1], "out_activation": last.activation}
    return Part(kind, first.shape[1], last.result[1], *first.shape[2:4], activation=filters.activation, **geometry)


@dataclass(frozen=True)
class Conditions:
    """What the times of a table hold for. ``device`` is the CPU's or GPU's model, ``kernels`` the instruction set or
    "triton", ``threads`` 0 on a GPU."""

    device: str
    kernels: str
    threads: int
    batch: int
    dtype: str
    torch: str
    mobilenet_fast: str

    @classmethod
    def here(cls, device: torch.device, threads: int, batch: int, dtype: torch.dtype) -> Conditions:
        on_gpu = device.type == "cuda"
        try:
            package = version("mobilenet_fast")
        except PackageNotFoundError:  # a checkout that was never installed
            package = "not installed"
        return cls(
            torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
            "triton" if on_gpu else _C.cpu_isa(),
            0 if on_gpu else threads,
            batch,
            str(dtype).removeprefix("torch."),
            str(torch.__version__),  # a class of its own, which checkpoints do not hold
            package,
        )


def cpu_model() -> str:
    """As /proc/cpuinfo has it. Hosts hide names, so that family and model go with it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said = dict(reversed([[word.strip() for word in line.split(":", 1)] for line in lines if ":" in line]))
    name = said.get("model name", platform.machine())
    numbers = ("cpu family", "model", "CPU implementer", "CPU part")
    return ", ".join([name, *(f"{number} {said[number]}" for number in numbers if number in said)])


Timer = Callable[[Sequence[Part]], list[float]]
"""Takes parts, gives each one's milliseconds."""


class LatencyTable:
    """Predicts a network's latency as the sum of its parts', each measured once through the plan that `accelerate`
    makes of it and kept in a JSON file.

    **What is measured.** The parts (`Part`) are what plans never fuse across: a convolution, or a block with its
    squeeze-and-excitation and residual; within one, `accelerate` decides for its shape what becomes one step. Up to
    sixteen parts are put into one network, one after another; each part's time is that of its steps in the plan's
    profile, the median of 30 runs. Before each part a step reads 2 MB of weights that are no part's: alone and warm
    a part would find its weights in L2, where in a network the layers before have displaced them. Its input, though,
    is made by the step before it, and its output is read by the step behind, as in a network. On a Zen 5 the sum of
    MobileNetV3-Large's parts so came within 1 % of its latency; with 16 MB read before each part (weights from beyond
    L3) it was 20 % too high. Parts measured together are chosen at random, and each network's call takes what the
    part "call" says beyond its steps, measured once with MobileNetV3-Small. One number is for the machine's speed:
    `calibrate` times MobileNetV3-Large end to end, and predictions are multiplied by what it takes over its own. On
    machines that others use too, that changes by a quarter from hour to hour. ``python -m benchmarks latency`` holds
    predictions against networks (docs/search.md).

    **Where it fails.** Accuracy was measured over one space, around MobileNetV3-Large. Other networks may be predicted
    several percent high, MobileNetV3-Small by a fifth (docs/search.md). They must be chains (`parts_of`).

    Args:
        path: of the JSON file; it is read if it exists, and written after every sixteen parts. None keeps nothing.
        size: height and width of the pictures, unless `predict` is told another.
        batch: pictures a call.
        threads: None takes torch's current number. Measuring sets it for its time.
        device: "cpu" or "cuda".
        dtype: of the network and its input.
        measure: whether parts that are missing when they are asked for are measured.
        progress: a bar on stderr while many parts are measured.
        timer: takes the place of the measurement.

    Raises:
        ValueError: ``path`` is no table, or one of another device, instruction set, number of threads, batch, dtype or
            version; or ``device`` is another, or is not here.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        *,
        size: int = 224,
        batch: int = 1,
        threads: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        measure: bool = True,
        progress: bool = True,
        timer: Timer | None = None,
    ) -> None:
        for name, value in (("size", size), ("batch", batch), ("threads", threads)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"LatencyTable: {name} must be a positive integer, got {value!r}")
        self.path = None if path is None else Path(path)
        self.size, self.batch, self.measures, self.progress = size, batch, measure, progress
        device, threads = _known_device(device), threads or torch.get_num_threads()
        self.conditions = Conditions.here(device, threads, batch, dtype)
        self.times: dict[Part, float] = {}
        """Milliseconds."""
        self.speed: float | None = None
        """What predictions are multiplied by, once `calibrate` has found it."""
        self._networks = PartTimer(device, threads, batch, dtype)
        self._timer = timer or self._networks
        if self.path is not None and self.path.exists():
            self._read()

    def predict(self, network: nn.Module | Architecture, size: int | None = None) -> float:
        """Milliseconds of a call.

        Args:
            network: a chain of known layers; weights do not matter.
            size: height and width of the pictures; None takes the table's.

        Raises:
            ValueError: the network has a layer that is no part, or is no chain.
            KeyError: a part is not in the table, and ``measure`` is False.
        """
        size = size or self.size
        parts = [*parts_of(network, (self.batch, 3, size, size)), Part("call")]
        missing = [part for part in parts if part not in self.times]
        if missing and not self.measures:
            raise KeyError(f"LatencyTable: not measured: {missing[0]}")
        self.measure(missing)
        return (self.speed or 1.0) * sum(self.times[part] for part in parts)

    def calibrate(self, measured_ms: float | None = None) -> float:
        """Makes MobileNetV3-Large's prediction what it takes now, and all others in proportion, and writes the table.

        Args:
            measured_ms: what it takes, at the table's size; None times it.

        Returns:
            `speed`.

        Raises:
            ValueError: ``measured_ms`` is no positive number.
            KeyError: as `predict`.
        """
        network = mobilenet_v3_large().eval()
        if measured_ms is None:
            measured_ms = self._networks.network(network, (self.batch, 3, self.size, self.size))
        if not isinstance(measured_ms, numbers.Real) or not 0 < measured_ms < math.inf:
            raise ValueError(f"LatencyTable: calibrate takes a positive number of ms, got {measured_ms!r}")
        speed = float(measured_ms) * (self.speed or 1.0) / self.predict(network)
        if not 0 < speed < math.inf:
            raise ValueError(f"LatencyTable: calibrate takes a time that is possible, got {measured_ms!r} ms")
        self.speed = speed
        self._write()
        return self.speed

    def measure(self, parts: Iterable[Part], again: bool = False) -> None:
        """Measures those of the parts that the table lacks, and writes it.

        ``again`` measures all, in other company, and keeps the lesser time of each: on a machine that others use
        too, some are measured while it is slow.
        """
        missing = [part for part in dict.fromkeys(parts) if again or part not in self.times]
        order = torch.randperm(len(missing), generator=torch.Generator().manual_seed(int(again))).tolist()
        groups = [[missing[i] for i in order[start : start + _TOGETHER]] for start in range(0, len(order), _TOGETHER)]
        work = with_progress(self._timer, groups, "parts ") if self.progress else map(self._timer, groups)
        for group, times in zip(groups, work, strict=True):
            for part, ms in zip(group, times, strict=True):
                self.times[part] = min(ms, self.times.get(part, ms))
            self._write()

    def fill(self, space: SearchSpace, size: int | None = None, again: bool = False) -> None:
        """Measures all parts of a space that the table lacks, or all again, for pictures of this size."""
        self.measure([*parts_of_space(space, self.batch, size or self.size), Part("call")], again)

    def _write(self) -> None:
        if self.path is None:
            return
        rows = [{**asdict(part), "ms": ms} for part, ms in self.times.items()]
        text = ",\n".join(
            json.dumps({k: v for k, v in row.items() if k == "kind" or v != _DEFAULTS.get(k)}) for row in rows
        )
        new = self.path.with_name(self.path.name + ".new")
        facts = f'"conditions": {json.dumps(asdict(self.conditions))},\n"speed": {json.dumps(self.speed)}'
        new.write_text(f'{{{facts},\n"parts": [\n{text}\n]}}\n')
        os.replace(new, self.path)  # a process that is killed while it writes leaves the file before

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            there = Conditions(**content["conditions"])
            times = {}
            for row in content["parts"]:
                part = Part(**{k: v for k, v in row.items() if k != "ms"})
                times[part] = _number("ms", row["ms"], may_be_zero=part.kind == "call")
            speed = None if content["speed"] is None else _number("speed", content["speed"])
        except (
            AttributeError,
            KeyError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:  # others' JSON can be of any shape
            raise ValueError(f"LatencyTable: {self.path} is no table of latencies ({first_line(error)})") from None
        for name, value in asdict(there).items():
            here = getattr(self.conditions, name)
            if value != here:
                raise ValueError(f"LatencyTable: {self.path} was measured with {name} {value}, here it is {here}")
        self.times, self.speed = times, speed


def _known_device(device: str | torch.device) -> torch.device:
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError):  # which list all kinds that there are anywhere
        known = None
    if known is None or known.type not in ("cpu", "cuda"):
        raise ValueError(f'LatencyTable: device must be "cpu" or "cuda", got {str(device)!r}')
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"LatencyTable: device {device} needs a GPU, torch sees {torch.cuda.device_count() or 'none'}")
    return known


def _number(name: str, value: object, may_be_zero: bool = False) -> float:
    if not isinstance(value, (int, float)) or not (0 < value < math.inf or (may_be_zero and value == 0)):
        raise ValueError(f"{name} must be a positive number, it is {value!r}")
    return float(value)


_TOGETHER = 16
_DEFAULTS = asdict(Part("call"))


def parts_of_space(space: SearchSpace, batch: int, size: int) -> list[Part]:
    """Every part that a network of the space can have, once each."""
    found: dict[Part, None] = {}
    outs = [sorted({block.out_channels for block in space.blocks(i)}) for i in range(len(space.stages))]
    side = -(-size // 2)
    ins = [space.stem_channels]
    for i in range(len(space.stages)):
        for block, channels in itertools.product(space.blocks(i), ins):
            layers = nn.Sequential(*_on_meta(lambda block=block, c=channels: block.build(c)))
            found.update(dict.fromkeys(parts_of(layers, (batch, channels, side, side))))
        ins, side = outs[i], -(-side // space.stages[i].stride)
    some = space.architecture([0] * len(space.decisions))
    for block in {block.out_channels: block for block in space.blocks(-1)}.values():
        architecture = replace(some, blocks=(*some.blocks[:-1], block), head_channels=space.head(block))
        found.update(dict.fromkeys(parts_of(architecture, (batch, 3, size, size))))
    return list(found)


def _on_meta(build: Callable[[], list[nn.Module]]) -> list[nn.Module]:
    with torch.device("meta"):
        return build()


class PartTimer:
    """Measures parts as `LatencyTable` says."""

    def __init__(
        self, device: torch.device, threads: int, batch: int, dtype: torch.dtype, runs: int = 30, seconds: float = 10.0
    ) -> None:
        self.device, self.threads, self.batch, self.dtype = device, threads, batch, dtype
        self.runs, self.seconds = runs, seconds

    def __call__(self, parts: Sequence[Part]) -> list[float]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.random.fork_rng(), torch.no_grad():
                timed = iter(self._steps([part for part in parts if part.kind != "call"]))
                return [self._call() if part.kind == "call" else next(timed) for part in parts]
        finally:
            torch.set_num_threads(before)

    def _steps(self, parts: list[Part]) -> list[float]:
        if not parts:
            return []
        inputs = [self._input(part) for part in parts]
        vector = self._tensor(self.batch, _DISPLACING)
        network = _Row(parts).eval().to(self.device, self.dtype)
        profile = accelerate(network, (vector, inputs)).profile(vector, inputs, runs=self.runs)
        sections: list[list[float]] = []
        for row, seconds in zip(profile.rows, profile.seconds, strict=True):
            if row.shape == (self.batch, _MARK):
                sections.append([])
            else:
                sections[-1].append(1e3 * seconds)
        times = []
        for part, section in zip(parts, sections, strict=True):
            first = 0 if _reads_picture(part) else 1
            last = len(section) if _gives_vector(part) else -1
            times.append(sum(section[first:last]))
        return times

    def _call(self) -> float:
        x = self._tensor(self.batch, 3, 224, 224)
        fast = accelerate(mobilenet_v3_small().eval().to(self.device, self.dtype), (x,))
        profile = fast.profile(x, runs=10 * self.runs)
        steps, calls = sum(profile.seconds), []
        if self.device.type == "cuda":
            return 1e3 * (profile.total_seconds - steps)  # of the GPU: kernels of a graph need not wait
        for _ in range(10 * self.runs):
            start = time.perf_counter()
            fast(x)
            calls.append(time.perf_counter() - start)
        return max(0.0, 1e3 * (statistics.median(calls) - steps))

    def network(self, network: nn.Module, shape: tuple[int, ...]) -> float:
        """The median of a network's calls in the second half of ten seconds: after a rest machines are faster at first,
        by a fifth on a Zen 5, than under the load that a table is measured and networks are trained in.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.random.fork_rng(), torch.no_grad():
                x = self._tensor(*shape)
                fast, calls = accelerate(network.eval().to(self.device, self.dtype), (x,)), []
                if self.device.type == "cuda":
                    return 1e3 * fast.profile(x, runs=10 * self.runs).total_seconds
                end = time.perf_counter() + self.seconds
                while (start := time.perf_counter()) < end or len(calls) < self.runs:
                    fast(x)
                    calls.append(time.perf_counter() - start)
                return 1e3 * statistics.median(calls[len(calls) // 2 :])
        finally:
            torch.set_num_threads(before)

    def _input(self, part: Part) -> Tensor:
        if part.kind == "linear":
            return self._tensor(self.batch, part.in_channels)
        x = self._tensor(self.batch, part.in_channels, part.height, part.width)
        return x if _reads_picture(part) else x.contiguous(memory_format=torch.channels_last)

    def _tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


# A linear layer of so many inputs and outputs, 2 MB of weights; by the outputs, a prime, its steps are known again.
_DISPLACING, _MARK = 512, 1021


def _reads_picture(part: Part) -> bool:
    """Which is the caller's tensor: no step makes it."""
    return part.in_channels == 3


def _gives_vector(part: Part) -> bool:
    """Which is returned as it is."""
    return part.kind in ("linear", "global_avg_pool")


class _Row(nn.Module):
    """The parts one after another, each between a step that makes its input, before which caches are filled with other
    things, and one that reads its output."""

    def __init__(self, parts: list[Part]) -> None:
        super().__init__()
        self.displacing = nn.Linear(_DISPLACING, _MARK)
        self.layers = nn.ModuleList(part.build() for part in parts)
        self.parts = parts

    def forward(self, vector: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        results = []
        for part, layer, x in zip(self.parts, self.layers, inputs, strict=True):
            results.append(self.displacing(vector))
            y = layer(x if _reads_picture(part) else torch.relu(x))  # which nothing is fused with
            results.append(y if _gives_vector(part) else y.mean((2, 3)))
        return results
