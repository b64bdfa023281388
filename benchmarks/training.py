"""``python -m benchmarks.training``: a training step of whole networks, eager and compiled PyTorch and this package.

A step is forward, cross entropy, backward and SGD with momentum. All peers run in this process in turn, so that a
change in the machine's speed meets all of them alike; peak memory is that of a process that does two steps of one peer
and nothing else, less what it held before. Writes a CSV. With ``--depthwise``, the gradients of each depthwise layer of
the networks alone, ours and PyTorch's in both of its layouts.
"""

import argparse
import copy
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import report, third_party
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
PEERS = ("eager", "eager channels_last", "torch.compile channels_last", "replace_layers channels_last")


def stock(name: str) -> torch.nn.Module:
    package, original, _ = NETWORKS[name]
    torch.manual_seed(0)
    if package == "timm":
        return third_party.timm().create_model(original)
    return getattr(third_party.torchvision_models(), original)(weights=None)


def step_of(peer: str, model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor):
    """A function that does one step with a copy of the model."""
    layout = torch.channels_last if "channels_last" in peer else torch.contiguous_format
    model, x = copy.deepcopy(model).to(memory_format=layout).train(), x.contiguous(memory_format=layout)
    if peer.startswith("torch.compile"):
        model = torch.compile(model)
    elif peer.startswith("replace_layers"):
        import mobilenet_fast

        model = mobilenet_fast.replace_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def data(name: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = NETWORKS[name][2]
    return torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))


def peak_mib(name: str, peer: str, batch: int, threads: int) -> float:
    """Of two steps, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", "--peak", json.dumps([name, peer, batch, threads])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure_peak(name: str, peer: str, batch: int, threads: int) -> float:
    torch.set_num_threads(threads)
    step = step_of(peer, stock(name), *data(name, batch))
    before = status_kib("VmRSS")
    step()
    step()
    return (status_kib("VmHWM") - before) / 2**10


def status_kib(name: str) -> int:
    """Of this process; resource.getrusage would count the parent's memory too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(name: str, peers: list[str], batch: int, rounds: int, threads: int) -> list[dict]:
    model, (x, labels) = stock(name), data(name, batch)
    steps = {peer: step_of(peer, model, x, labels) for peer in peers}
    first = {peer: step() for peer, step in steps.items()}
    times = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer, step in steps.items():
            start = time.perf_counter()
            step()
            times[peer].append((time.perf_counter() - start) * 1e3)
    rows = []
    for peer in peers:
        quartiles = statistics.quantiles(times[peer], n=4) if rounds > 1 else [times[peer][0]] * 3
        row = {"network": name, "peer": peer, "batch": batch, "threads": threads, "first_loss": first[peer]}
        row |= {"median_ms": statistics.median(times[peer]), "q1_ms": quartiles[0], "q3_ms": quartiles[2]}
        rows.append(row | {"peak_mib": peak_mib(name, peer, batch, threads)})
    return rows


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
            model(data(name, 1)[0])
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


def main(arguments=None):
    parser = argparse.ArgumentParser("benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batch", type=positive, help="default: 16, 8 for xception")
    parser.add_argument("--threads", type=thread_count, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "training.csv")
    parser.add_argument("--depthwise", action="store_true", help="time depthwise layers' gradients instead")
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        print(measure_peak(*options.peak))
        return 0
    torch.set_num_threads(options.threads)
    if options.depthwise:
        compare_depthwise(options.case, options.batch or 16, options.rounds)
        return 0
    facts = report.conditions()
    rows = []
    for name in options.case:
        batch = options.batch or (8 if name == "xception" else 16)
        found = measure(name, options.peer, batch, options.rounds, options.threads)
        table = [["", "median ms", "quartiles", "× this package", "peak MiB"]]
        ours = found[-1]["median_ms"]
        for row in found:
            quartiles = f"{row['q1_ms']:.0f}–{row['q3_ms']:.0f}"
            ratio = f"{row['median_ms'] / ours:.2f}"
            table.append([row["peer"], f"{row['median_ms']:.0f}", quartiles, ratio, f"{row['peak_mib']:.0f}"])
        print(f"{name}, batch {batch}, {options.threads} threads", report.text_table(table), "", sep="\n", flush=True)
        rows += found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="") as file:
        known = {"cpu": facts["cpu"], "isa": facts["isa"], "torch": facts["versions"]["torch"]}
        known |= {"commit": facts["commit"], "date": facts["date"]}
        writer = csv.DictWriter(file, [*rows[0], *known])
        writer.writeheader()
        writer.writerows(row | known for row in rows)
    print("written:", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
