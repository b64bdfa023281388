"""``python -m benchmarks netadapt``: MobileNetV3-Small made faster by NetAdapt, beside the uniform width multiplier.

For each seed a network is trained on real pictures (benchmarks/pictures.py), and NetAdapt takes a share of its measured
latency away. Beside it, with as many steps of training, both from scratch: the network of the uniform width multiplier
whose latency is nearest to what NetAdapt reached, and NetAdapt's widths. What is done is kept in --out: the same
command goes on, also after a kill.
"""

import argparse
import csv
import json
import os
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cases.registry import version
from benchmarks.gauges import ROOT
from benchmarks.small_training import BATCH, SmallData, prepared
from benchmarks.train_run import RATE
from mobilenet_fast import cost, models
from mobilenet_fast.cli import command_line, fraction, positive, thread_count
from mobilenet_fast.progress import with_progress
from mobilenet_fast.search import channel_groups, netadapt, with_widths
from mobilenet_fast.search.digits import CLASSES, why_missing
from mobilenet_fast.search.netadapt import MeasuredLatency, NetAdapted, latencies_in_turn

METHODS = {
    "first": "MobileNetV3-Small",
    "netadapt": "NetAdapt",
    "scratch": "NetAdapt's widths from scratch",
    "uniform": "uniform width multiplier",
}
WIDTHS = [percent / 100 for percent in range(30, 100)]
ROUNDS = 150
TRIES = 5


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks netadapt", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--cut", type=fraction, default=0.3, help="share of the latency to take away (%(default)s)")
    parser.add_argument("--delta", type=fraction, default=0.05, help="the share that a step takes away (%(default)s)")
    parser.add_argument("--size", type=positive, default=64, help="side of the pictures (%(default)s)")
    parser.add_argument("--pictures", type=positive, default=1000, help="to train with (%(default)s)")
    parser.add_argument("--first-steps", type=positive, default=600, help="of the first network (%(default)s)")
    parser.add_argument("--steps", type=positive, default=40, help="of each proposal (%(default)s)")
    parser.add_argument("--final-steps", type=positive, default=300, help="at the end (%(default)s)")
    parser.add_argument("--threads", type=thread_count, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "netadapt", help="folder")
    return parser.parse_args(arguments)


def network(width: float = 1.0) -> torch.nn.Module:
    return prepared(models.mobilenet_v3_small(num_classes=CLASSES, width_mult=width)).eval()


class Kept:
    """What was measured and trained, by name, in a file that is written whenever something is added."""

    def __init__(self, path: Path, wanted: dict) -> None:
        self.path, self.values = path, {"options": wanted}
        if path.exists():
            self.values = json.loads(path.read_text())
            if self.values["options"] != wanted:
                raise SystemExit(f"benchmarks: {path} was made with other options; give another --out, or remove it")

    def get(self, name: str, make):
        if name not in self.values:
            self.values[name] = make()
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.values, indent=1))
            new.replace(self.path)
        return self.values[name]


class Comparison:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.x = torch.zeros(1, 3, options.size, options.size)
        self.data = SmallData(options.pictures, options.size)
        names = ("cut", "delta", "size", "pictures", "first_steps", "steps", "final_steps", "threads")
        self.kept = Kept(self.out / "kept.json", {name: vars(options)[name] for name in names})
        self.plain = network()
        self.groups = channel_groups(self.plain, self.x)
        self.measured = None
        self.first_ms = self.kept.get("first ms", lambda: self.measure(self.plain))

    def measure(self, model: torch.nn.Module) -> float:
        """In ms. The first network is called in turn with each, so that a change in the machine's speed meets both."""
        if self.measured is None:
            self.measured = MeasuredLatency(self.plain, self.x, self.kept.values.get("first ms"))
        return self.measured(model)

    def trained(self, name: str, model: torch.nn.Module, steps: int, seed: int) -> torch.nn.Module:
        path = self.out / f"{name} {seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        print(f"{name}, seed {seed}: {steps} steps", file=sys.stderr)
        self.data.fit(model, steps, seed)
        new = path.with_suffix(".new")
        torch.save(model.state_dict(), new)
        new.replace(path)
        return model

    def made(self, seed: int, width: float = 1.0) -> torch.nn.Module:
        torch.manual_seed(seed)
        return network(width)

    def adapted(self, seed: int) -> NetAdapted:
        options = self.options
        first = self.trained("first", self.made(seed), options.first_steps, seed)

        def finetune(model: torch.nn.Module, steps: int) -> None:
            last = steps == options.final_steps
            self.data.fit(model, steps, torch.initial_seed(), RATE / 2 if last else RATE / 5, decays=last)

        def progress(work, places):
            yield from with_progress(work, places, f"seed {seed} ", len(self.groups) - len(places))

        return netadapt(
            first,
            finetune,
            lambda model: self.data.accuracy(model, "validation"),
            (1 - options.cut) * self.first_ms,
            example_input=self.x,
            delta=options.delta,
            steps=options.steps,
            final_steps=options.final_steps,
            latency=self.measure,
            keep="largest norm",
            seed=seed,
            log=self.out / f"netadapt_{seed}.csv",
            checkpoint=self.out / f"netadapt_{seed}.pt",
            progress=progress,
        )

    def uniform_width(self, adapted: list[torch.nn.Module]) -> float:
        """The multiplier whose network's latency is nearest to the mean of the adapted ones', all called in turn."""
        shape = tuple(self.x.shape)
        uniform = {cost.count(model, shape).parameters: (width, model) for width in WIDTHS if (model := network(width))}
        fast = [self.measured_module(model) for model in adapted + [model for _, model in uniform.values()]]
        times = quickest(fast, self.x)
        reached = statistics.mean(times[: len(adapted)])
        rest = zip(times[len(adapted) :], uniform.values(), strict=True)
        return min((abs(ms - reached), width) for ms, (width, _) in rest)[1]

    def networks(self, seed: int, adapted: NetAdapted, width: float) -> dict[str, tuple[torch.nn.Module, int]]:
        """Of each method, with the steps that its weights have been through."""
        adapted.plot(self.out / f"netadapt_{seed}.png") if version("matplotlib") else None
        options = self.options
        way = options.first_steps + options.final_steps
        way += options.steps * sum(row["chosen"] for row in adapted.proposals)
        scratch = with_widths(self.made(seed), self.groups, adapted.widths)
        return {
            "first": (self.trained("first", self.made(seed), options.first_steps, seed), options.first_steps),
            "netadapt": (adapted.model.eval(), way),
            "scratch": (self.trained("scratch", scratch, way, seed), way),
            "uniform": (self.trained("uniform", self.made(seed, width), way, seed), way),
        }

    def rows(self) -> list[dict]:
        adapted = {seed: self.adapted(seed) for seed in self.options.seeds}
        models = [result.model.eval() for result in adapted.values()]
        name = f"uniform width beside seeds {list(adapted)}"
        width = self.kept.get(name, lambda: self.uniform_width(models))
        found = {seed: self.networks(seed, result, width) for seed, result in adapted.items()}
        fast = {(seed, name): net for seed, nets in found.items() for name, (net, _) in nets.items()}
        fast = {key: self.measured_module(model) for key, model in fast.items()}
        times = dict(zip(fast, quickest(list(fast.values()), self.x), strict=True))
        rows = []
        for seed, nets in found.items():
            for name, (model, steps) in nets.items():
                counted = cost.count(model, tuple(self.x.shape))
                rows.append(
                    {
                        "method": METHODS[name] + (f" {width:g}" if name == "uniform" else ""),
                        "seed": seed,
                        "accuracy": self.data.accuracy(model),
                        "latency_ms": times[seed, name],
                        "million_macs": counted.macs / 1e6,
                        "parameters": counted.parameters,
                        "steps": steps,
                    }
                )
        return rows

    def measured_module(self, model: torch.nn.Module) -> torch.nn.Module:
        if self.measured is None:
            self.measure(self.plain)
        return self.measured.accelerated(model)


def quickest(models: list[torch.nn.Module], x: torch.Tensor) -> list[float]:
    """`latencies_in_turn` of one of several rounds of turns: that in which the threads met soonest, all in all."""
    return min((latencies_in_turn(models, x, ROUNDS) for _ in range(TRIES)), key=sum)


def table(rows: list[dict]) -> str:
    lines = [["", "test: % right", "by seed", "ms", "× first", "million MACs", "parameters", "steps of the weights"]]
    first_ms = statistics.mean(row["latency_ms"] for row in rows if row["method"] == METHODS["first"])
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        accuracies = [row["accuracy"] for row in mine]
        ms = [row["latency_ms"] for row in mine]
        steps = [row["steps"] for row in mine]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0
        lines.append(
            [
                method,
                f"{statistics.mean(accuracies):.2f} ± {spread:.2f}",
                ", ".join(f"{a:.1f}" for a in accuracies),
                f"{statistics.mean(ms):.4f}",
                f"{statistics.mean(ms) / first_ms:.2f}",
                f"{statistics.mean(row['million_macs'] for row in mine):.2f}",
                f"{statistics.mean(row['parameters'] for row in mine):,.0f}",
                "–".join(map(str, sorted({min(steps), max(steps)}))),
            ]
        )
    return report.text_table(lines)


def plot(rows: list[dict], facts: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((7, 5), layout="constrained")
    axes = figure.subplots()
    colours = ("#555555", "#c1121f", "#e09f3e", "#3a7ca5")
    for method, colour in zip(dict.fromkeys(row["method"] for row in rows), colours, strict=True):
        mine = [row for row in rows if row["method"] == method]
        ms, accuracies = [row["latency_ms"] for row in mine], [row["accuracy"] for row in mine]
        axes.plot(ms, accuracies, "o", color=colour, alpha=0.5, markersize=5)
        axes.plot(statistics.mean(ms), statistics.mean(accuracies), "D", color=colour, markersize=9, label=method)
    axes.set(xlabel="latency (ms)", ylabel="% of the test's pictures right; diamonds are means")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(report.machine(facts), fontsize=9)
    figure.savefig(path, dpi=120)


@command_line
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if why := why_missing():
        raise SystemExit(f"benchmarks: {why}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    rows = Comparison(options).rows()
    facts = report.conditions()
    known = {"threads": options.threads, "batch": BATCH, "size": options.size, "pictures": options.pictures}
    known |= {"cpu": facts["cpu"], "commit": facts["commit"], "date": facts["date"]}
    files = [options.out / "netadapt.csv"]
    with files[0].open("w", newline="") as opened:
        writer = csv.DictWriter(opened, [*rows[0], *known])
        writer.writeheader()
        writer.writerows(row | known for row in rows)
    if version("matplotlib"):
        files.append(options.out / "netadapt.png")
        plot(rows, facts, files[-1])
    print(table(rows))
    print("written:", *files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
