"""``python -m benchmarks ablations``: what the papers say of their design, on this machine and on small data.

Each claim is a row of networks that differ in one thing. Multiply-accumulates and latency are of the papers' input
sizes, latencies of a claim's networks in turn; accuracy is that of short trainings on real pictures
(benchmarks/pictures.py), scaled to a small size. A network's row is kept in --out when it is done: the same command
goes on, also after a kill.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import report
from benchmarks.gauges import ROOT
from benchmarks.small_training import BATCH, SmallData, prepared
from mobilenet_fast import accelerate, cost, models
from mobilenet_fast.cli import command_line, positive, thread_count
from mobilenet_fast.nn import ConvNormAct, FusedSequential, SeparableConv2d
from mobilenet_fast.progress import with_progress
from mobilenet_fast.search.digits import CLASSES, why_missing
from mobilenet_fast.search.netadapt import latencies_in_turn

SEEDS = 3


@dataclass(frozen=True)
class Variant:
    """``resolution`` is the share of the sides, the paper's and the small pictures'."""

    name: str
    build: partial[nn.Module]
    resolution: float = 1.0


@dataclass(frozen=True)
class Claim:
    """Networks that differ in one thing. ``small_side`` is that of the pictures that they are trained with."""

    name: str
    source: str
    says: str
    variants: tuple[Variant, ...]
    side: int = 224
    small_side: int = 64
    share: float = 1.0  # of the steps: larger networks get fewer


SEPARABLES = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), *[(256, 1)] * 5, (512, 2), (512, 1))


def separable(num_classes: int, order: str) -> nn.Module:
    """MobileNetV1 of half its width, with a norm and ReLU behind each pair of convolutions and none between."""
    layers, channels = [ConvNormAct(3, 16, stride=2)], 16
    for out_channels, stride in SEPARABLES:
        conv = SeparableConv2d(channels, out_channels, 3, stride, 1, order=order)
        layers.append(FusedSequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)))
        channels = out_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


xception = partial(partial, models.xception)
v1 = partial(partial, models.mobilenet_v1, activation="relu")
v3 = partial(partial, models.mobilenet_v3_small)

CLAIMS = (
    Claim(
        "between depthwise and pointwise",
        "Xception, section 4.7",
        "none is better than ReLU or ELU",
        (
            Variant("none", xception()),
            Variant("ReLU", xception(activation_between="relu")),
            Variant("ELU", xception(activation_between="elu")),
        ),
        299,
        48,
        1 / 4,
    ),
    Claim(
        "residuals",
        "Xception, section 4.6",
        "they are essential",
        (Variant("on", xception()), Variant("off", xception(residual=False))),
        299,
        48,
        1 / 4,
    ),
    Claim(
        "order of a separable convolution",
        "Xception, section 2",
        "it does not matter in a stack",
        (
            Variant("depthwise first", partial(separable, order="depthwise_first")),
            Variant("pointwise first", partial(separable, order="pointwise_first")),
        ),
    ),
    Claim(
        "filters of the stem",
        "MobileNetV3, section 5.1",
        "16 with h-swish are as good as 32 with ReLU, and faster",
        (Variant("16, h-swish", v3()), Variant("32, ReLU", v3(stem_channels=32))),
    ),
    Claim(
        "last stage",
        "MobileNetV3, section 5.1",
        "the efficient one is as good, and faster",
        (Variant("efficient", v3()), Variant("original", v3(efficient_last_stage=False))),
    ),
    Claim(
        "h-swish",
        "MobileNetV3, section 5.2",
        "in the deep half it costs least and gives most",
        (
            Variant("everywhere", v3(hardswish_from=16)),
            Variant("in the deep half", v3()),
            Variant("nowhere", v3(hardswish_from=math.inf)),
        ),
    ),
    Claim(
        "squeeze-and-excitation",
        "MobileNetV3, section 5.3",
        "more accuracy at a small cost",
        (Variant("on", v3()), Variant("off", v3(squeeze_excite=False))),
    ),
    Claim(
        "width multiplier α",
        "MobileNetV1, section 3.3",
        "multiply-accumulates fall with α², accuracy smoothly",
        tuple(Variant(f"{a:g}", v1(width_mult=a)) for a in (1.0, 0.75, 0.5, 0.25)),
        share=1 / 2,
    ),
    Claim(
        "resolution multiplier ρ",
        "MobileNetV1, section 3.4",
        "multiply-accumulates fall with ρ², accuracy smoothly",
        tuple(Variant(f"{rho:g}", v1(), rho) for rho in (1.0, 6 / 7, 5 / 7, 4 / 7)),
        share=1 / 2,
    ),
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks ablations", description=__doc__.split("\n\n")[0])
    parser.add_argument("--claim", nargs="+", metavar="WORD", help="only claims whose name contains a word")
    parser.add_argument(
        "--steps",
        type=positive,
        default=200,
        help="of a training; large networks take fewer (%(default)s)",
    )
    parser.add_argument("--pictures", type=positive, default=1000, help="to train with (%(default)s)")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="trainings of a network (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=40, help="turns of a network when it is timed (%(default)s)")
    parser.add_argument("--threads", type=thread_count, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "ablations.csv", help="the file; the table goes to .md beside it"
    )
    options = parser.parse_args(arguments)
    words = options.claim or [""]
    options.claims = [claim for claim in CLAIMS if any(word.lower() in claim.name.lower() for word in words)]
    if not options.claims:
        parser.error(f"no claim matches {', '.join(words)}; there are: {', '.join(claim.name for claim in CLAIMS)}")
    return options


def side_of(claim: Claim, variant: Variant, small: bool = False) -> int:
    return round((claim.small_side if small else claim.side) * variant.resolution)


def times_of(claim: Claim, rounds: int) -> dict[str, float]:
    """Of resolutions that differ, each network is called with pictures of its own size."""
    calls = {}
    for variant in claim.variants:
        x = torch.randn(1, 3, side_of(claim, variant), side_of(claim, variant))
        fast = accelerate(variant.build(num_classes=1000).eval(), (x,))
        calls[variant.name] = lambda _, fast=fast, x=x: fast(x)
    return dict(zip(calls, latencies_in_turn([*calls.values()], torch.empty(0), rounds), strict=True))


def key(claim: Claim, variant: Variant, seed: int) -> str:
    """Of a training: the same network is part of several claims."""
    build = variant.build
    return f"{build.func.__name__} {build.keywords} {side_of(claim, variant, small=True)} {claim.share:g} {seed}"


class Ablations:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.data = options, {}
        names = ("steps", "pictures", "seeds", "rounds", "threads")
        self.wanted = {name: vars(options)[name] for name in names}
        self.path = options.out.with_suffix(".json")
        self.kept: dict = {"options": self.wanted, "ms": {}, "accuracy": {}}
        if self.path.exists():
            self.kept = json.loads(self.path.read_text())
            if self.kept["options"] != self.wanted:
                raise SystemExit(f"benchmarks: {self.path} was made with other options; give another --out")

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.kept, indent=1))
        new.replace(self.path)

    def accuracy(self, claim: Claim, variant: Variant, seed: int) -> float:
        side = side_of(claim, variant, small=True)
        if side not in self.data:
            self.data[side] = SmallData(self.options.pictures, side)
        torch.manual_seed(seed)
        model = prepared(variant.build(num_classes=CLASSES))
        self.data[side].fit(model, round(self.options.steps * claim.share), seed)
        return self.data[side].accuracy(model)

    def work(self, job: tuple[Claim, Variant | None, int]) -> None:
        claim, variant, seed = job
        if variant is None:
            self.kept["ms"][claim.name] = times_of(claim, self.options.rounds)
        else:
            self.kept["accuracy"][key(claim, variant, seed)] = self.accuracy(claim, variant, seed)
        self.save()

    def jobs(self) -> list[tuple[Claim, Variant | None, int]]:
        """What is not done yet: the times of each claim, and each training."""
        todo: list = [(claim, None, 0) for claim in self.options.claims if claim.name not in self.kept["ms"]]
        trainings = {
            key(claim, variant, seed): (claim, variant, seed)
            for claim in self.options.claims
            for variant in claim.variants
            for seed in range(self.options.seeds)
        }
        todo += [job for name, job in trainings.items() if name not in self.kept["accuracy"]]
        return todo

    def rows(self) -> list[dict]:
        rows = []
        for claim in self.options.claims:
            for variant in claim.variants:
                with torch.device("meta"):
                    model = variant.build(num_classes=1000)
                side = side_of(claim, variant)
                counted = cost.count(model, (1, 3, side, side))
                accuracies = [self.kept["accuracy"][key(claim, variant, n)] for n in range(self.options.seeds)]
                rows.append(
                    {
                        "claim": claim.name,
                        "variant": variant.name,
                        "side": side,
                        "million_macs": counted.macs / 1e6,
                        "parameters": counted.parameters,
                        "latency_ms": self.kept["ms"][claim.name][variant.name],
                        "small_side": side_of(claim, variant, small=True),
                        "steps": round(self.options.steps * claim.share),
                        "accuracy": statistics.mean(accuracies),
                        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                        **{f"seed_{seed}": accuracy for seed, accuracy in enumerate(accuracies)},
                    }
                )
        return rows


def markdown(claims: list[Claim], rows: list[dict], options: argparse.Namespace, facts: dict) -> str:
    command = f"python -m benchmarks ablations --steps {options.steps} --pictures {options.pictures}"
    lines = [
        "# What the papers claim of their design, on this machine",
        "",
        f"`{command}` wrote this page. {report.machine(facts)}, {options.threads} thread(s), batch 1, torch "
        f"{torch.__version__}, commit {facts['commit']}. Multiply-accumulates, parameters (1000 classes) and latency "
        f"under `accelerate` (the networks of a claim in turn, medians) are at the paper's size. Accuracy is on 1,000 "
        f"of MNIST's digits after short trainings from scratch on {options.pictures} others, {BATCH} a step, at small "
        f"sizes: mean and standard deviation of {options.seeds} seeds, in %. Such data can't confirm what a paper "
        "found on ImageNet; differences of the size of the deviations say nothing.",
    ]
    for claim in claims:
        mine = [row for row in rows if row["claim"] == claim.name]
        steps, small = mine[0]["steps"], claim.small_side
        lines += [
            "",
            f"## {claim.name[0].upper() + claim.name[1:]}",
            "",
            f"{claim.source}: {claim.says}. {steps} steps at {small}².",
            "",
            "| | size | million MACs | parameters | ms | accuracy |",
            "|---|---|---|---|---|---|",
        ]
        for row in mine:
            lines.append(
                f"| {row['variant']} | {row['side']}² | {row['million_macs']:,.1f} | {row['parameters']:,} | "
                f"{row['latency_ms']:.3g} | {row['accuracy']:.1f} ± {row['spread']:.1f} |"
            )
    return "\n".join(lines) + "\n"


@command_line
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if why := why_missing():
        raise SystemExit(f"benchmarks: {why}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    ablations = Ablations(options)
    for _ in with_progress(ablations.work, ablations.jobs(), "ablations "):
        pass
    rows, facts = ablations.rows(), report.conditions()
    with options.out.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    page = options.out.with_suffix(".md")
    page.write_text(markdown(options.claims, rows, options, facts))
    print(page.read_text())
    print("written:", options.out, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
