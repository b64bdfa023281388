"""``python -m benchmarks.training``: a training step of whole networks, eager and compiled PyTorch and this package.

A step is forward, cross entropy, backward and SGD with momentum, in 16 bits under autocast (float16 with a GradScaler).
All peers run in this process in turn, so that a change in the machine's speed meets all of them alike; peak memory is
that of a process that does two steps of one peer and nothing else, less what it held before. Writes a CSV. With
``--depthwise``, the gradients of each depthwise layer of the networks alone, ours and PyTorch's in both of its layouts.
"""

import argparse
import copy
import csv
import functools
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import report, third_party
from benchmarks.cases import DTYPES
from benchmarks.device import CpuDevice, CudaDevice
from benchmarks.gauges import ROOT
from mobilenet_fast.cli import positive, thread_count

# The stock network, in torchvision or timm, and the size of its pictures.
NETWORKS = {
    "mobilenet_v1": ("timm", "mobilenetv1_100", 224),
    "mobilenet_v2": ("torchvision", "mobilenet_v2", 224),
    "mobilenet_v3_large": ("torchvision", "mobilenet_v3_large", 224),
    "efficientnet_b0": ("torchvision", "efficientnet_b0", 224),
    "xception": ("timm", "legacy_xception", 299),
}
PEERS = {
    "cpu": ("eager", "eager channels_last", "torch.compile channels_last", "replace_layers channels_last"),
    # With "graph", forward and backward are a CUDA graph, which the optimizer's kernels follow.
    "cuda": (
        *("eager", "eager channels_last", "eager channels_last graph", "torch.compile channels_last"),
        *("torch.compile max-autotune channels_last", "replace_layers channels_last"),
        "replace_layers channels_last graph",
    ),
}
BATCHES = {"cpu": (16, 8), "cuda": (256, 32)}  # the second for xception, whose pictures are larger


def stock(name: str) -> torch.nn.Module:
    package, original, _ = NETWORKS[name]
    torch.manual_seed(0)
    if package == "timm":
        return third_party.timm().create_model(original)
    return getattr(third_party.torchvision_models(), original)(weights=None)


def step_of(
    peer: str, model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, device: CudaDevice
) -> Callable[..., torch.Tensor]:
    """A function that does one step with a copy of the model, and gives the loss."""
    layout = torch.channels_last if "channels_last" in peer else torch.contiguous_format
    model = copy.deepcopy(model).to(x.device, memory_format=layout).train()
    x = x.contiguous(memory_format=layout)
    if peer.startswith("torch.compile"):
        model = torch.compile(model, mode="max-autotune" if "max-autotune" in peer else None)
    elif peer.startswith("replace_layers"):
        import mobilenet_fast

        model = mobilenet_fast.replace_layers(model)
    kind = x.device.type
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=kind == "cuda" or None)
    # A first step that overflows would leave the fused optimizer with momentum that nobody wrote.
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**10, enabled=dtype == torch.float16)

    def gradients(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        return loss.detach()

    @functools.cache
    def captured() -> Callable[[torch.Tensor], torch.Tensor]:
        return device.capture(gradients, [x])

    def step(_=None) -> torch.Tensor:
        loss = (captured() if peer.endswith("graph") else gradients)(x)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def data(name: str, batch: int, device: CudaDevice) -> tuple[torch.Tensor, torch.Tensor]:
    size = NETWORKS[name][2]
    return torch.randn(batch, 3, size, size).to(device.name), torch.randint(0, 1000, (batch,)).to(device.name)


def peak_mib(*run: object) -> float:
    """Of two steps, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", "--peak", json.dumps(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return float(done.stdout.splitlines()[-1])


def measure_peak(name: str, peer: str, batch: int, threads: int, kind: str, dtype: str) -> float:
    torch.set_num_threads(threads)
    device = device_of(kind)
    step = step_of(peer, stock(name), *data(name, batch, device), DTYPES[dtype], device)
    return device.peak_growth_mib(lambda: (step(), step()))


def device_of(kind: str) -> CudaDevice | CpuDevice:
    return CudaDevice(cold=False) if kind == "cuda" else CpuDevice()


def measure(
    name: str, peers: list[str], batch: int, rounds: int, threads: int, kind: str, dtype: str, seconds: float
) -> list[dict]:
    """A row a peer; of one that fails, why."""
    device = device_of(kind)
    model, (x, labels) = stock(name), data(name, batch, device)
    rows, steps = {}, {}
    for peer in peers:
        rows[peer] = {"network": name, "peer": peer, "device": kind, "dtype": dtype, "batch": batch, "threads": threads}
        rows[peer] |= dict.fromkeys(("first_loss", "median_ms", "q1_ms", "q3_ms", "peak_mib", "failed"))
        with noting_failure(rows[peer]):
            step = step_of(peer, model, x, labels, DTYPES[dtype], device)
            rows[peer]["first_loss"] = step().item()
            steps[peer] = step
    times = {peer: [] for peer in steps}
    for _ in range(rounds):
        for peer, step in steps.items():
            if not rows[peer]["failed"]:
                with noting_failure(rows[peer]):
                    times[peer] += device.time_calls(step, itertools.repeat(x), seconds)
    for peer, step in steps.items():
        with noting_failure(rows[peer]):
            if not math.isfinite(loss := step().item()):
                raise ArithmeticError(f"the loss is {loss}")
    times = {peer: taken for peer, taken in times.items() if not rows[peer]["failed"]}
    for peer, taken in times.items():
        quartiles = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        rows[peer] |= dict(zip(("q1_ms", "median_ms", "q3_ms"), quartiles, strict=True))
    del step, steps
    if kind == "cuda":
        torch.compiler.reset()  # graphs of compiled networks have memory of their own
        gc.collect()
    device.trim()
    for peer in times:
        with noting_failure(rows[peer]):
            rows[peer]["peak_mib"] = peak_mib(name, peer, batch, threads, kind, dtype)
    return list(rows.values())


@contextmanager
def noting_failure(row: dict) -> Iterator[None]:
    try:
        yield
    except Exception as failure:
        row["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0]


def table(rows: list[dict]) -> str:
    """Ratios are to the last peer."""
    lines = [["", "median ms", "quartiles", "× this package", "peak MiB"]]
    ours = rows[-1]["median_ms"]
    for row in rows:
        if row["median_ms"] is None:
            lines.append([row["peer"], "failed", row["failed"], "", ""])
            continue
        digits = 0 if row["device"] == "cpu" else 2
        quartiles = f"{row['q1_ms']:.{digits}f}–{row['q3_ms']:.{digits}f}"
        ratio = report.number(ours and row["median_ms"] / ours, "{:.2f}")
        peak = row["failed"] or report.number(row["peak_mib"], "{:.0f}")
        lines.append([row["peer"], f"{row['median_ms']:.{digits}f}", quartiles, ratio, peak])
    return report.text_table(lines)


def depthwise_layers(names: list[str]) -> list[tuple[int, ...]]:
    """Channels, map size, kernel, stride and padding of each depthwise layer, without repetitions."""
    found: dict[tuple[int, ...], None] = {}

    def note(conv, inputs, output):
        found[(conv.in_channels, inputs[0].size(2), conv.kernel_size[0], conv.stride[0], conv.padding[0])] = None

    for name in names:
        model = stock(name).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.groups == module.in_channels > 1:
                module.register_forward_hook(note)
        with torch.no_grad():
            model(data(name, 1, CpuDevice())[0])
    return sorted(found, key=lambda layer: (layer[2], layer[3], -layer[1], layer[0]))


def measure_depthwise(layer: tuple[int, ...], batch: int, rounds: int) -> dict[str, float]:
    """Median ms of both gradients of one layer, and the largest difference relative to float64's largest value."""
    channels, size, kernel, stride, padding = layer
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, kernel, kernel)
    grad = torch.randn_like(F.conv2d(x, weight, None, stride, padding, 1, channels))
    window = (stride, stride), (padding, padding), (1, 1)

    def pytorch(grad, x, weight):
        last = ([True, True, False],)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *window, False, [0, 0], channels, *last)[:2]

    def ours(grad, x, weight):
        at_y = grad, None, None, "none", None, None, None
        operator = torch.ops.mobilenet_fast.depthwise_conv2d_gradients
        return operator(*at_y, x, None, "none", None, weight, *window, True, True)[:2]

    plain = grad.contiguous(), x.contiguous(), weight
    # Operands of their own: nobody finds them in cache because the one before has read them.
    calls = {"here": (ours, (grad, x, weight)), "channels_last": (pytorch, (grad.clone(), x.clone(), weight))}
    calls["contiguous"] = pytorch, plain
    exact = pytorch(*(operand.double() for operand in plain))
    for found, value in zip(ours(grad, x, weight), exact, strict=True):
        error = ((found - value).abs().max() / value.abs().max()).item()
        assert error < 1e-4, f"{layer}: the gradients differ by {error:.1e} of the largest"
    times = {peer: [] for peer in calls}
    for _ in range(rounds + 1):
        for peer, (call, operands) in calls.items():
            start = time.perf_counter()
            call(*operands)
            times[peer].append((time.perf_counter() - start) * 1e3)
    return {peer: statistics.median(values[1:]) for peer, values in times.items()}


def compare_depthwise(names: list[str], batch: int, rounds: int) -> None:
    table = [["channels", "map", "kernel", "stride", "here ms", "GB/s", "channels_last", "contiguous", "× the faster"]]
    ratios = {"channels_last": [], "contiguous": [], "the faster": []}
    for layer in depthwise_layers(names):
        channels, size, kernel, stride, _ = layer
        ms = measure_depthwise(layer, batch, rounds)
        ms["the faster"] = min(ms["channels_last"], ms["contiguous"])
        values = batch * channels * size**2 * (2 + 1 / stride**2)  # input read, its gradient written, the output's read
        for peer, found in ratios.items():
            found.append(ms[peer] / ms["here"])
        numbers = [
            ms["here"],
            values * 4e-6 / ms["here"],
            ms["channels_last"],
            ms["contiguous"],
            ratios["the faster"][-1],
        ]
        table.append([*map(str, (channels, size, kernel, stride)), *(f"{number:.2f}" for number in numbers)])
    print(report.text_table(table))
    for peer, found in ratios.items():
        print(f"{len(found)} layers, × {peer}: mean {statistics.geometric_mean(found):.2f}, least {min(found):.2f}")


def write_csv(rows: list[dict], facts: dict, out: Path) -> None:
    known = {name: facts.get(name, "") for name in ("gpu", "driver", "cpu", "isa")}
    known |= {"torch": facts["versions"]["torch"], "commit": facts["commit"], "date": facts["date"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *known])
        writer.writeheader()
        writer.writerows(row | known for row in rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", choices=tuple(PEERS), default="cpu")
    parser.add_argument("--peer", nargs="+", metavar="PEER", help="default: all that the device has")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32; fp16 on cuda")
    parser.add_argument("--batch", type=positive, help="default: 16, 256 on cuda; xception 8, 32")
    parser.add_argument("--threads", type=thread_count, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "training.csv")
    parser.add_argument("--depthwise", action="store_true", help="time depthwise layers' gradients instead, on the CPU")
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.peer = options.peer or PEERS[options.device]
    for peer in options.peer:
        if peer not in PEERS[options.device]:
            parser.error(f"no peer {peer!r} on {options.device}; there are: {', '.join(PEERS[options.device])}")
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "fp16")
    if options.depthwise and (options.device, options.dtype) != ("cpu", "fp32"):
        parser.error("--depthwise is of fp32 on the CPU; python -m benchmarks layers --device cuda times a GPU's")
    return options


def main(arguments=None):
    options = parse(arguments)
    if options.peak:
        print(measure_peak(*options.peak))
        return 0
    torch.set_num_threads(options.threads)
    if options.depthwise:
        compare_depthwise(options.case, options.batch or 16, options.rounds)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.training: --device cuda needs a GPU, torch sees none")
    facts = report.conditions(options.device)
    rows = []
    for name in options.case:
        batch = options.batch or BATCHES[options.device][name == "xception"]
        setting = options.threads, options.device, options.dtype
        # On the CPU a turn is one step; on a GPU, as many as fill half a second.
        seconds = 0 if options.device == "cpu" else 0.5
        found = measure(name, options.peer, batch, options.rounds, *setting, seconds)
        where = f"{options.threads} threads" if options.device == "cpu" else facts["gpu"]
        print(f"{name}, {options.dtype}, batch {batch}, {where}", table(found), "", sep="\n", flush=True)
        rows += found
        write_csv(rows, facts, options.out)
    print("written:", options.out)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
