"""``python -m benchmarks search``: controller, evolution and random search, on the same budget and real pictures.

Networks of the small space are trained for some steps on the digits of `mobilenet_fast.search.digits`; a table that is
kept predicts their latency. The same command goes on with what was interrupted.
"""

import argparse
import csv
import os
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.gauges import ROOT
from mobilenet_fast.cli import command_line, not_negative, positive, positive_number, thread_count
from mobilenet_fast.search import LatencyTable, SearchResult, digits, digits_space, platform_aware_search
from mobilenet_fast.search.controller import METHODS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks search", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target-ms", type=positive_number, default=0.1, help="(%(default)s)")
    parser.add_argument("--trials", type=positive, default=60, help="of each method (%(default)s)")
    parser.add_argument("--steps", type=positive, default=40, help="of a network's training (%(default)s)")
    parser.add_argument("--size", type=positive, default=64, help="height and width of a picture (%(default)s)")
    parser.add_argument("--seed", type=not_negative, default=0)
    parser.add_argument("--threads", type=thread_count, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--only", choices=tuple(METHODS), help="one method, without tables and plot")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "search", help="folder of table and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of search.csv and .png (%(default)s)")
    return parser.parse_args(arguments)


def write_csv(found: dict[str, SearchResult], file: Path) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(("method", "trial", "accuracy", "latency_ms", "reward", "network"))
        for method, result in found.items():
            for t in result.trials:
                facts = f"{t.accuracy:.4f}", f"{t.latency_ms:.4f}", f"{t.reward:.4f}"
                writer.writerow((method, t.number, *facts, t.architecture))


@command_line
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if why := digits.why_missing():
        sys.exit(f"benchmarks: {why}")
    torch.set_num_threads(options.threads)
    for folder in (options.results, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        table = LatencyTable(options.results / "latency.json", size=options.size)
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")
    if table.speed is None:
        table.calibrate()
    found = {}
    for method in [options.only] if options.only else METHODS:
        try:
            found[method] = platform_aware_search(
                digits_space(),
                partial(digits.train_on_digits, size=options.size, steps=options.steps),
                table,
                options.target_ms,
                options.trials,
                method=method,
                log=options.results / f"{method}.csv",
                note={"evaluate": "digits", "steps": options.steps, "size": options.size},
                seed=options.seed,
            )
        except ValueError as error:
            sys.exit(f"benchmarks: {error}")
        result = found[method]
        last = statistics.fmean(trial.reward for trial in result.trials[-16:])
        best = result.best
        print(
            f"{method}: best reward {best.reward:.4f} (accuracy {best.accuracy:.3f}, {best.latency_ms:.3f} ms, "
            f"trial {best.number}), mean of the last 16 {last:.4f}"
        )
    if options.only:
        return 0
    files = [options.out / "search.csv", options.out / "search.png"]
    write_csv(found, files[0])
    try:
        from benchmarks import plots
    except ImportError:
        files.pop()
        print("benchmarks: no plot without matplotlib: pip install matplotlib", file=sys.stderr)
    else:
        plots.searches(found, options.target_ms, report.conditions(), files[1])
    print("written:", *files)
    return 0
