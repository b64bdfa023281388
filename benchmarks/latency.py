"""``python -m benchmarks latency``: how well `mobilenet_fast.search.LatencyTable` predicts networks.

All parts of the MobileNetV3 space are measured first (some minutes, once: the table is kept), and the table is
calibrated: by one number for the machine's speed, from MobileNetV3-Large. Then networks are drawn at random whose
predictions lie within a factor of 1.9 of each other, and timed end to end in turns. Results are given without that
number as well. The multiply-accumulates of each, times the factor that suits them best, are there to compare with.
"""

import argparse
import csv
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import mobilenet_fast
from benchmarks import report
from benchmarks.gauges import ROOT
from mobilenet_fast import cost
from mobilenet_fast.cli import command_line, positive, thread_count
from mobilenet_fast.progress import with_progress
from mobilenet_fast.search.latency import LatencyTable
from mobilenet_fast.search.space import Architecture, mobilenet_v3_space

SIZE = 224
SPREAD = 1.9  # between the largest and the least prediction
COLUMNS = ("table_ms", "predicted_ms", "measured_ms", "error_percent", "macs", "network")


@dataclass
class Drawn:
    """A network, what the table says that it takes, calibrated and not, and what it took."""

    architecture: Architecture
    predicted_ms: float
    table_ms: float
    macs: int
    measured_ms: float = 0.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks latency", description=__doc__.split("\n\n")[0])
    parser.add_argument("--networks", type=positive, default=50, help="how many to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    parser.add_argument("--threads", type=thread_count, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--rounds", type=positive, default=10, help="turns of each network (%(default)s)")
    parser.add_argument("--table", type=Path, default=ROOT / "build" / "latency.json", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of latency.csv and .png (%(default)s)")
    parser.add_argument("--table-only", action="store_true", help="measure parts, and no network")
    parser.add_argument("--again", action="store_true", help="measure known parts again, keep the lesser time of each")
    options = parser.parse_args(arguments)
    if options.networks < 2:
        parser.error("--networks must be at least 2")
    return options


def draw(table: LatencyTable, count: int, seed: int) -> list[Drawn]:
    """Networks whose predictions are around the median of the space's."""
    space, generator = mobilenet_v3_space(), random.Random(seed)

    def predicted() -> tuple[float, Architecture]:
        architecture = space.architecture(space.sample(generator))
        return table.predict(architecture), architecture

    middle = statistics.median(predicted()[0] for _ in range(100))
    found = []
    while len(found) < count:
        ms, architecture = predicted()
        if middle / SPREAD**0.5 <= ms <= middle * SPREAD**0.5:
            with torch.device("meta"):
                macs = cost.count(architecture.build(), (1, 3, SIZE, SIZE)).macs
            found.append(Drawn(architecture, ms, ms / table.speed, macs))
    return found


def time_networks(drawn: list[Drawn], rounds: int) -> None:
    """Fills in the median of the calls of all rounds; in each the networks take turns of 50 ms, in another order."""
    pictures = [torch.randn(1, 3, SIZE, SIZE) for _ in range(4)]

    def prepare(one: Drawn):
        return mobilenet_fast.accelerate(one.architecture.build().eval(), (pictures[0],))

    networks = list(with_progress(prepare, drawn, "networks "))
    times: list[list[float]] = [[] for _ in networks]

    def turn(number: int) -> None:
        order = list(range(len(networks)))
        random.Random(number).shuffle(order)
        for i in order:
            end = time.perf_counter() + 0.05
            while (start := time.perf_counter()) < end:
                networks[i](pictures[len(times[i]) % len(pictures)])
                times[i].append(1e3 * (time.perf_counter() - start))

    with torch.no_grad():
        list(with_progress(turn, range(rounds), "rounds "))
    for one, calls in zip(drawn, times, strict=True):
        one.measured_ms = statistics.median(calls)


def spearman(a: list[float], b: list[float]) -> float:
    """Pearson's correlation of the ranks."""

    def ranks(values: list[float]) -> list[float]:
        order = sorted(values)
        return [order.index(value) + (order.count(value) - 1) / 2 for value in values]

    return statistics.correlation(ranks(a), ranks(b))


def median_error(predicted: list[float], measured: list[float]) -> float:
    return statistics.median(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))


def scaled_macs(drawn: list[Drawn]) -> list[float]:
    """Milliseconds by multiply-accumulates alone, at the speed that suits the networks best."""
    factor = statistics.median(one.measured_ms / one.macs for one in drawn)
    return [factor * one.macs for one in drawn]


def summary(drawn: list[Drawn]) -> list[str]:
    measured = [one.measured_ms for one in drawn]
    lines = [f"{len(drawn)} networks, {min(measured):.2f} to {max(measured):.2f} ms"]
    guesses = {
        "table": [one.predicted_ms for one in drawn],
        f"table / {drawn[0].predicted_ms / drawn[0].table_ms:.3f}, not calibrated": [one.table_ms for one in drawn],
        "multiply-adds": scaled_macs(drawn),
    }
    for name, guess in guesses.items():
        worst = max(abs(p / m - 1) for p, m in zip(guess, measured, strict=True))
        facts = f"median error {100 * median_error(guess, measured):.1f} %, largest {100 * worst:.1f} %"
        lines.append(f"{name}: {facts}, Spearman {spearman(guess, measured):.3f}")
    return lines


def write_csv(drawn: list[Drawn], file: Path) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in drawn:
            times = one.table_ms, one.predicted_ms, one.measured_ms
            error = 100 * (one.predicted_ms / one.measured_ms - 1)
            writer.writerow([*(f"{ms:.4f}" for ms in times), f"{error:.2f}", one.macs, one.architecture])


@command_line
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    for folder in (options.table.parent, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        table = LatencyTable(options.table, size=SIZE, threads=options.threads)
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")
    known, start = len(table.times), time.monotonic()
    table.fill(mobilenet_v3_space(), again=options.again)
    print(f"{known} parts were known, {len(table.times)} are, after {time.monotonic() - start:.0f} s")
    if options.table_only:
        return 0
    table.calibrate()
    table.measures = False
    drawn = draw(table, options.networks, options.seed)
    time_networks(drawn, options.rounds)
    lines, facts = summary(drawn), report.conditions()
    print(*lines, f"{report.machine(facts)} · commit {facts['commit']}", sep="\n")
    files = [options.out / "latency.csv", options.out / "latency.png"]
    write_csv(drawn, files[0])
    try:
        from benchmarks import plots
    except ImportError:
        files.pop()
        print("benchmarks: no plot without matplotlib: pip install matplotlib", file=sys.stderr)
    else:
        points = [(d.predicted_ms, ms, d.measured_ms) for d, ms in zip(drawn, scaled_macs(drawn), strict=True)]
        plots.latencies(points, lines, facts, files[1])
    print("written:", *files)
    return 0
