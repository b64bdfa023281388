"""Which tiles and which fused blocks are fastest on this GPU: ``python -m benchmarks.gpu_tune mobilenet_v3_large``.

Each step of the network's plan is timed on its own inputs, with the tile that `tiles.py` chooses and with its
neighbours; then every block of the network in each way of fusing it; with ``--ways gradients`` both gradients of each
of its depthwise layers. Kernels are compiled first, by as many processes
as there are cores, for which no GPU is asked (``--compile`` stops there).
"""

from __future__ import annotations

import argparse
import csv
import functools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver

from benchmarks import predict_layers
from benchmarks.cases import DTYPES, layers
from benchmarks.cases.layers import Convolution
from benchmarks.gauges import ROOT
from benchmarks.predict import MODELS
from benchmarks.triton_offline import Launch, record
from mobilenet_fast import models
from mobilenet_fast.accelerate import cuda, roofline
from mobilenet_fast.accelerate.capture import Capture
from mobilenet_fast.accelerate.passes import optimise
from mobilenet_fast.triton_kernels import (
    common,
    conv2d,
    depthwise_conv2d,
    depthwise_conv2d_backward,
    inverted_residual,
    pointwise_conv2d,
    squeeze_excite,
    tiles,
)

Nodes = tuple[Any, Any]
# How blocks are fused: as planned, or all in one way where it exists.
WAYS: dict[str, Callable[..., Nodes] | None] = {
    "planned": None,
    "apart": lambda graph, limits, expand, depthwise, project: (None, None),
    "expand": lambda graph, limits, expand, depthwise, project: (_narrow(expand), None),
    "project": lambda graph, limits, expand, depthwise, project: (None, _narrow(project)),
    "all": lambda graph, limits, expand, depthwise, project: (_narrow(expand), _narrow(project)),
}


def _narrow(node: Any) -> Any:
    """A layer that fits a fused block."""
    if node is None or min(node.inputs[0].shape[1], node.shape[1]) > cuda._MOST_BLOCK_CHANNELS:
        return None
    return node


@functools.lru_cache(1)
def captured(model: str, dtype: torch.dtype, device: str) -> tuple[Capture, dict[str, torch.Tensor]]:
    """And its weights."""
    options = {"aux_logits": False} if model in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    network = models.create_model(model, **options).eval().requires_grad_(False).to(device, dtype)
    image = torch.zeros(2, 3, MODELS[model], MODELS[model], dtype=dtype, device=device)
    return Capture(network, (image,), {}, None), network.state_dict()


def plan_of(
    model: str, batch: int, dtype: torch.dtype, device: str, way: str = "planned", chip: str | None = None
) -> cuda.CudaPlan:
    """``chip``: whose limits decide what is fused; None is the device's own."""
    capture, weights = captured(model, dtype, device)
    image = torch.empty(batch, 3, MODELS[model], MODELS[model], dtype=dtype, device=device)
    graph = optimise(capture.lower([image], weights, cuda.KERNEL_DTYPES))
    with ExitStack() as stack:
        if WAYS[way] is not None:
            stack.enter_context(mock.patch.object(cuda, "_fastest", WAYS[way]))
        limits = chip and getattr(roofline, chip)
        return cuda.build(graph, cuda.CudaWeights(), torch.device(device), limits or None)


def patch_tile(
    size: tuple[int, int], rows: int, columns: int, channels: int, warps: int, elements: int
) -> tiles.PatchTile:
    """Of a map of this size; each thread has so many elements of a patch's pixel."""
    strips, blocks = -(-size[0] // rows), -(-size[1] // columns)
    patches = max(1, min(tiles.power_of_2(strips * blocks), 32 * warps * elements // channels))
    return tiles.PatchTile(rows, columns, patches, channels, warps, -(-strips * blocks // patches))


def patch_variants(
    tile: tiles.PatchTile, size: tuple[int, int], channels: int, patches: tuple[tuple[int, int], ...]
) -> Iterator[tiles.PatchTile]:
    """Other channels and warps with the tile's patch, and other patches, of a map of this size."""
    elements = tile.patches * tile.channels // (32 * tile.warps)
    for block_c in sorted({tile.channels, 32, 64}):
        for warps in (1, 2, 4):
            for each in (elements, elements // 2):
                if each and block_c <= 2 * channels:
                    yield patch_tile(size, tile.rows, tile.columns, block_c, warps, each)
    for rows, columns in patches:
        yield patch_tile(size, min(rows, size[0]), min(columns, size[1]), tile.channels, tile.warps, elements)


def depthwise_variants(tile: tiles.PatchTile, args: tuple) -> Iterator[tiles.PatchTile]:
    _, channels_last, itemsize, (_, channels, *size), kernel, stride = args
    widest = 1 if tiles.is_large(kernel) else 2
    patches = tuple((rows, min(columns, widest)) for rows, columns in ((2, 2), (4, 1), (4, 2), (7, 1), (7, 2)))
    if channels_last:
        yield from patch_variants(tile, size, channels, patches)


def gradient_variants(tile: tiles.PatchTile, args: tuple) -> Iterator[tiles.PatchTile]:
    _, channels_last, itemsize, (_, channels, height, width), kernel, multiplier, stride = args
    size = -(-height // stride[0]), -(-width // stride[1])
    if channels_last:
        yield from patch_variants(tile, size, channels, ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (7, 1)))


def product_variants(tile: tiles.ProductTile, args: tuple) -> Iterator[tiles.ProductTile]:
    chip, itemsize, images, pixels, channels, out_channels, _ = args

    def made(m: int, n: int, k: int, warps: int, stages: int, rounds: float) -> tiles.ProductTile:
        out_blocks, blocks = -(-out_channels // n), images * -(-pixels // m)
        programs = blocks
        if channels <= k and rounds:
            programs = min(blocks, max(1, int(rounds * chip.multiprocessors) // out_blocks))
        return tiles.ProductTile(m, n, k, warps, stages, max(1, programs) * out_blocks)

    m, n, k, w = tile.pixels, tile.out_channels, tile.channels, tile.warps
    for pixels_ in (64, 128):
        for warps in (4, 8):
            if pixels_ <= 4 * m:
                yield made(pixels_, n, k, warps, 3, 4)
    for rounds in (2, 8, 0) if channels <= k else (0,):
        yield made(m, n, k, w, 3, rounds)
    yield made(m, n, k, w, 4, 4)
    if 2 * n <= min(256, tiles.power_of_2(out_channels)):
        yield made(m, 2 * n, k, 8, 3, 4)
    if n > 64:
        yield made(m, n // 2, k, w, 3, 4)
    if channels > k:
        yield made(m, n, 2 * k, w, 3, 4)
        yield made(m, n, max(16, k // 2), w, 3, 4)


def block_variants(tile: tiles.BlockTile, args: tuple) -> Iterator[tiles.BlockTile]:
    for rows, columns, warps, hidden in (
        (2, 16, 1, 16),
        (2, 32, 1, 16),
        (4, 16, 1, 16),
        (2, 16, 1, 32),
        (2, 32, 2, 16),
        (4, 64, 4, 16),
        (2, 64, 4, 16),
    ):
        yield replace(tile, rows=rows, columns=columns, warps=warps, hidden=hidden)


def linear_variants(tile: tiles.LinearTile, args: tuple) -> Iterator[tiles.LinearTile]:
    for out_channels in (16, 32, 64):
        for channels in (64, 128, 256):
            yield replace(tile, out_channels=out_channels, channels=channels, warps=4)


def dense_variants(tile: tiles.ProductTile, args: tuple) -> Iterator[tiles.ProductTile]:
    images, pixels, out_channels = args[2], args[3], args[5]

    def made(m: int, n: int, warps: int, stages: int) -> tiles.ProductTile:
        return tiles.ProductTile(m, n, tile.channels, warps, stages, images * -(-pixels // m) * -(-out_channels // n))

    for m in (64, 128):
        for warps in (2, 4, 8):
            yield made(m, tile.out_channels, warps, 1)
            yield made(m, tile.out_channels, warps, 2)


# By what its kernel is called in the report: the module, its function that chooses a tile, and what else it could be.
CHOICES = {
    "depthwise_conv2d": (depthwise_conv2d, "depthwise_tile", depthwise_variants),
    "depthwise_conv2d_backward": (depthwise_conv2d_backward, "depthwise_backward_tile", gradient_variants),
    "pointwise_conv2d": (pointwise_conv2d, "pointwise_tile", product_variants),
    "inverted_residual": (inverted_residual, "inverted_residual_tile", block_variants),
    "conv2d": (conv2d, "conv2d_tile", dense_variants),
    "squeeze_excite": (squeeze_excite, "linear_tile", linear_variants),
}
CHOICES = {name: (sys.modules[call.__module__], *rest) for name, (call, *rest) in CHOICES.items()}


def choice_of(step: Any) -> tuple | None:
    kernel = step.kernel.removeprefix("Triton ").removesuffix(" + sums")
    return CHOICES.get("inverted_residual" if getattr(step.node, "op", "") == "inverted_residual" else kernel)


@dataclass
class Timing:
    """One step with one tile. ``bytes``: inputs, weights and outputs once."""

    gpu: str
    model: str
    dtype: str
    batch: int
    way: str
    step: int
    name: str
    operation: str
    shape: str
    kernel: str
    bytes: int
    predicted_us: float
    tile: str
    is_default: bool
    us: float | None


def shorten(tile: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(tile).items())


@dataclass(frozen=True)
class Trial:
    """A step with a tile, which `tiles.py` keeps by ``keys``, one a launch, if it turns out to be the fastest."""

    row: int
    step: Any
    tile: Any
    is_default: bool
    keys: tuple[str, ...]
    call: Callable[[], Any]


@dataclass(frozen=True)
class Gradients:
    """Both gradients of a depthwise layer, with what `timings_of` asks of a plan's step and its row."""

    layer: Convolution
    call: predict_layers.Call  # as counted
    run: Callable[[], Any]
    kernel = "Triton depthwise_conv2d_backward"
    operation = "gradients"
    node = None

    @property
    def name(self) -> str:
        return str(self.layer)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.channels, self.layer.height, self.layer.width

    @property
    def bytes(self) -> float:
        return round(self.call.bytes)

    @property
    def seconds(self) -> float:
        return self.call.seconds


def tiles_of(row: int, step: Any, run: Callable[[], Any], sweep: bool, seen: set[str]) -> Iterator[Trial]:
    """First with the tile that is chosen, then, if all are to be swept, with others, unless what the rule was asked has
    been ``seen``."""
    choice, asked, default = choice_of(step), [], []
    with ExitStack() as stack:
        if choice is not None:
            module, function, variants = choice
            original = getattr(module, function)

            def noted(*args: Any) -> Any:
                asked.append(args)
                default.append(original(*args))
                return default[-1]

            stack.enter_context(mock.patch.object(module, function, noted))
        run()
    if not step.kernel:
        return
    tile = default[0] if default else None
    keys = tuple(tiles.tuned_key(function, arguments) for arguments in asked)
    yield Trial(row, step, tile, True, keys, run)
    if not sweep or choice is None or repr(asked) in seen:
        return
    seen.add(repr(asked))
    tried = {tile}
    for variant in variants(tile, asked[0]):
        if variant in tried:
            continue
        tried.add(variant)
        with mock.patch.object(module, function, lambda *args, variant=variant: variant):
            yield Trial(row, step, variant, False, keys, run)


def steps_with_tiles(plan: cuda.CudaPlan, image: torch.Tensor, sweep: bool) -> Iterator[Trial]:
    """Step by step, each with its tiles."""
    values: dict = dict(zip(plan.inputs, [image], strict=True))
    seen: set[str] = set()
    row = -1
    for step in plan.steps:
        row += bool(step.kernel)
        yield from tiles_of(row, step, lambda step=step: step.run(values), sweep, seen)


def gradients_with_tiles(model: str, batch: int, dtype: torch.dtype, device: str, sweep: bool) -> Iterator[Trial]:
    """The same of the gradients of the network's depthwise layers, each layer once."""
    found = [
        layer for layer in dict.fromkeys(layers.found(model)) if isinstance(layer, Convolution) and layer.depthwise
    ]
    seen: set[str] = set()
    for row, layer in enumerate(found):
        shape = batch, layer.channels, layer.height, layer.width
        x = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        weight = torch.randn(layer.channels, 1, *layer.kernel, dtype=dtype, device=device)
        if device == "cuda":  # on the CPU nobody reads it
            x.normal_()
        geometry = (layer.stride, layer.stride), layer.padding, (1, 1)
        y = depthwise_conv2d(x, weight, None, *geometry)
        kernels = predict_layers.kernels_of(layer, "forward+both", batch, dtype)[1:]  # without the forward pass
        call = predict_layers.Call(dtype, roofline.limits_of(torch.device(device))).add(kernels)
        step = Gradients(layer, call, lambda a=(y, x, weight, *geometry): depthwise_conv2d_backward(*a))
        yield from tiles_of(row, step, step.run, sweep, seen)


def measure_us(call: Callable[[], Any], runs: int = 5) -> float:
    """The median of a call's time within CUDA graphs of several of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        call()
        end.record(stream)
    stream.synchronize()
    count = max(2, min(20, int(1 / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / count


def timings_of(model: str, batch: int, dtype: str, way: str, sweep: bool) -> Iterator[tuple[Trial, Timing]]:
    device = torch.device("cuda")
    gpu, limits = torch.cuda.get_device_name(device), roofline.limits_of(device)
    if way == "gradients":
        trials = gradients_with_tiles(model, batch, DTYPES[dtype], "cuda", sweep)
    else:
        plan = plan_of(model, batch, DTYPES[dtype], "cuda", way)
        image = torch.randn(batch, 3, MODELS[model], MODELS[model], dtype=DTYPES[dtype], device="cuda")
        trials = steps_with_tiles(plan, image, sweep)
    with torch.no_grad(), common.dependent_launches(torch.device("cuda")):
        for trial in trials:
            step, tile = trial.step, trial.tile
            try:
                us = measure_us(trial.call)
            except Exception as failure:
                print(f"{model} {batch} {step.kernel} {tile}: {type(failure).__name__} {failure}".splitlines()[0])
                us = None
            if way == "gradients":
                line, seconds = step, step.seconds
            else:
                line, seconds = plan.report.rows[trial.row], step.work.seconds(limits)
            yield (
                trial,
                Timing(
                    gpu,
                    *(model, dtype, batch, way, trial.row, line.name, line.operation, "x".join(map(str, line.shape))),
                    *(step.kernel, line.bytes, 1e6 * seconds, "" if tile is None else shorten(tile)),
                    *(trial.is_default, us),
                ),
            )


def faster_tiles(timed: list[tuple[Trial, Timing]]) -> dict[str, Any]:
    """By key, tiles that take at least 3 % less time than those that were chosen."""
    by_keys: dict[tuple[str, ...], list[tuple[Trial, Timing]]] = {}
    for trial, timing in timed:
        if timing.us is not None:
            by_keys.setdefault(trial.keys, []).append((trial, timing))
    found = {}
    for keys, tried in by_keys.items():
        chosen = [timing.us for trial, timing in tried if trial.is_default]
        trial, timing = min(tried, key=lambda pair: pair[1].us)
        if chosen and timing.us < 0.97 * min(chosen):
            found |= dict.fromkeys(keys, trial.tile)
    return found


class FakeDriver:
    """What Triton's compiler asks of a GPU that isn't there."""

    def __init__(self, capability: int = 90):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


# Model, batch, dtype, way of fusing, and whether tiles are swept.
Job = tuple[str, int, str, str, bool]


@contextmanager
def on_cpu_tensors() -> Iterator[None]:
    """The launchers take CPU tensors, as `accelerate` does on CUDA; dense convolutions of PyTorch compute nothing."""

    def shaped(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, *rest: Any) -> torch.Tensor:
        y = dense(x.to("meta"), weight.to("meta"), None, *rest)
        return torch.empty(y.shape, dtype=y.dtype, memory_format=torch.channels_last)

    dense = torch.nn.functional.conv2d
    with (
        mock.patch.object(torch.nn.functional, "conv2d", shaped),
        mock.patch.object(cuda.operations, "INTERPRETED", True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
        common.dependent_launches(torch.device("cuda")),
        torch.no_grad(),
    ):
        yield


def compile_launch(launch: Launch) -> None:
    """Into Triton's cache, as the launch on a GPU would; with MOBILENET_FAST_LAUNCHERS what calls it as well."""
    try:
        compiled = launch.kernel.run(**launch.arguments, grid=(1,), warmup=True, **launch.options)
        if os.environ.get("MOBILENET_FAST_LAUNCHERS"):
            CudaLauncher(compiled.src, compiled.metadata)
    except Exception as failure:
        print(f"{launch.name} {launch.options}: {type(failure).__name__} {failure}".splitlines()[0], flush=True)


def trials_of(job: Job, chip: str | None) -> Iterator[Trial]:
    """On the CPU, as far as compiling needs them. The plan is made at once, by PyTorch's own operators."""
    model, batch, dtype, way, sweep = job
    if way == "gradients":
        return gradients_with_tiles(model, batch, DTYPES[dtype], "cpu", sweep)
    image = torch.empty(batch, 3, MODELS[model], MODELS[model], dtype=DTYPES[dtype])
    return steps_with_tiles(plan_of(model, batch, DTYPES[dtype], "cpu", way, chip), image, sweep)


def launches_of(trials: Iterator[Trial], capability: int = 90) -> list[Launch]:
    def run() -> None:
        for trial in trials:
            trial.call()

    with on_cpu_tensors():
        return record(run, capability)


def compile_share(jobs: list[Job], chip: str | None, index: int, count: int) -> None:
    """Compiles every ``count``-th of the kernels that the jobs will run, on CPU tensors that nobody reads."""
    torch.set_num_threads(1)
    driver.set_active(FakeDriver())
    found: dict[str, Launch] = {}
    for job in jobs:
        for launch in launches_of(trials_of(job, chip)):
            launch = launch.without_memory()
            found.setdefault(repr((launch.name, launch.arguments, launch.options)), launch)
    for launch in [*found.values()][index::count]:
        compile_launch(launch)


def compile_all(jobs: list[Job], chip: str | None, processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=compile_share, args=(jobs, chip, i, processes)) for i in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()


def summary(timings: list[Timing]) -> str:
    lines, steps = [], {}
    for t in timings:
        steps.setdefault((t.model, t.batch, t.way, t.step), []).append(t)
    totals: dict[tuple, float] = {}
    for (model, batch, way, step), tried in steps.items():
        default = next(t for t in tried if t.is_default)
        totals[model, batch, way] = totals.get((model, batch, way), 0.0) + (default.us or 0.0)
        best = min((t for t in tried if t.us), key=lambda t: t.us, default=None)
        if way not in ("planned", "gradients") or best is None or default.us is None:
            continue
        gain = f"best {best.us:7.1f} {best.tile}" if best is not default and best.us < 0.97 * default.us else ""
        speed = default.bytes / default.us / 1e3
        lines.append(
            f"{batch:4} {step:3} {default.kernel[7:34]:27} {default.shape:18} {default.us:7.1f} us"
            f" ({default.predicted_us:6.1f}) {speed:5.0f} GB/s {gain}"
        )
    lines += [f"{model} batch {batch} {way}: {total:.0f} us" for (model, batch, way), total in totals.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu_tune", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["mobilenet_v3_large"], choices=MODELS, metavar="MODEL")
    parser.add_argument("--batch", nargs="+", type=int, default=[256])
    parser.add_argument("--dtype", default="fp16", choices=DTYPES)
    parser.add_argument("--no-sweep", action="store_true", help="only the tiles that are chosen")
    parser.add_argument(
        "--ways",
        nargs="+",
        default=list(WAYS),
        choices=(*WAYS, "gradients"),
        help="of fusing blocks; or the gradients of depthwise layers",
    )
    parser.add_argument("--keep", action="store_true", help="let later programs use the tiles that were faster")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--chip", choices=("H100", "H200"), help="for which fused blocks are chosen while compiling")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=folder / "gpu_tune.csv")
    options = parser.parse_args(arguments)
    if not (options.compile or torch.cuda.is_available()):
        sys.exit("benchmarks.gpu_tune: needs a GPU, torch sees none; --compile needs none")
    # Other ways of fusing are timed with the tiles that are chosen.
    jobs = [
        (model, batch, options.dtype, way, way in ("planned", "gradients") and not options.no_sweep)
        for model in options.models
        for batch in options.batch
        for way in options.ways
    ]
    if options.processes:
        compile_all(jobs, options.chip, options.processes)
    if options.compile:
        return 0
    timed = []
    for model, batch, dtype, way, sweep in jobs:
        timed += timings_of(model, batch, dtype, way, sweep)
    if not timed:
        sys.exit(f"benchmarks.gpu_tune: {', '.join(options.models)}: nothing of {', '.join(options.ways)} to time")
    timings = [timing for _, timing in timed]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(asdict(timings[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(t) for t in timings)
    print(summary(timings))
    if options.keep:
        found = faster_tiles(timed)
        tiles.keep_tuned(found)
        print(f"{len(found)} tiles kept in {tiles.tuned_path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
