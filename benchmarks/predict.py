"""What each step of the family's networks should take on a GPU: ``python -m benchmarks.predict``.

Writes docs/gpu_predictions.md, and .csv with every step. The steps are those of `accelerate`'s plan, layer by layer;
the times come from one pure function, `times_us`, of a step's operation, bytes and multiply-adds. What a GPU took has a
column of its own, which is empty as long as nothing was measured: the prediction is there to be compared with, and to
say beforehand which steps deserve work.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from unittest import mock

import torch

from benchmarks.gauges import ROOT

# Of an H100 SXM with clocks as under load.
COPY_BYTES_US = 3.0e6  # a device-to-device copy, reads and writes together: 3.0 TB/s
L2_BYTES_US = 5.5e6  # what multiprocessors draw from the L2 cache: 5.5 TB/s
L2_BYTES = 50 * 2**20
MATRIX_MACS_US = 350e6  # 700 TFLOP/s of dense fp16 products reached in large ones, two operations a multiply-add
FMA_US = 30e6  # 60 TFLOP/s of fp32
# Of a depthwise tap: one for its product, and a share of those for addresses, borders and conversion.
DEPTHWISE_INSTRUCTIONS = 1.6
# From one kernel of a CUDA graph to the next, with an empty kernel in between.
LAUNCH_US = 2.0
# Of the L2 cache, what a step's input and output may take together for the first to still be there: lines are kept
# twice where both of the cache's partitions read them, and weights take some.
L2_SHARE = 0.6

BATCHES = (1, 32, 256)
HALF_BYTES = 2
MODELS = {
    "mobilenet_v1": 224,
    "mobilenet_v2": 224,
    "mobilenet_v3_large": 224,
    "mobilenet_v3_small": 224,
    "mnasnet_a1": 224,
    "efficientnet_b0": 224,
    "xception": 299,
    "googlenet": 224,
    "inception_v3": 299,
}


def times_us(operation: str, bytes: float, macs: float, fits_l2: bool) -> dict[str, float]:
    """What each of the things that a step needs would take alone; the step takes as long as the longest.

    Args:
        operation: as a plan's row has it, such as "depthwise_conv2d + batch_norm + relu".
        bytes: that the step moves: inputs, weights and outputs, once each.
        macs: its multiply-adds: on tensor cores, but for depthwise convolutions, which have none to fill them.
        fits_l2: whether the step before left its output in the L2 cache.
    """
    depthwise = operation.startswith("depthwise")
    return {
        "launch": LAUNCH_US,
        "memory": bytes / (L2_BYTES_US if fits_l2 else COPY_BYTES_US),
        "fp32": DEPTHWISE_INSTRUCTIONS * macs / FMA_US if depthwise else 0.0,
        "tensor cores": 0.0 if depthwise else macs / MATRIX_MACS_US,
    }


def predicted_us(operation: str, bytes: float, macs: float, fits_l2: bool) -> float:
    return max(times_us(operation, bytes, macs, fits_l2).values())


@dataclass(frozen=True)
class Step:
    """A step of a network for a batch, in half precision."""

    model: str
    batch: int
    name: str
    operation: str
    shape: tuple[int, ...]
    bytes: int
    macs: int
    fits_l2: bool

    @property
    def predicted_us(self) -> float:
        return predicted_us(self.operation, self.bytes, self.macs, self.fits_l2)

    @property
    def bound(self) -> str:
        times = times_us(self.operation, self.bytes, self.macs, self.fits_l2)
        return max(times, key=times.get)


@torch.no_grad()
def plans(model: str, size: int) -> list[tuple]:
    """The rows of the plans of one image and of two, in float32, without what the CPU's caches decide: fused blocks,
    parts of the batch, and Winograd's convolutions, whose weights take more."""
    import mobilenet_fast

    options = {"aux_logits": False} if model in ("googlenet", "inception_v3") else {}
    network = mobilenet_fast.models.create_model(model, **options).eval()
    module = "mobilenet_fast.accelerate.plan"
    with contextlib.ExitStack() as stack:
        for choice in ("fuse_blocks", "split_batch", "winograd_is_faster"):
            stack.enter_context(mock.patch(f"{module}.{choice}", return_value=False))
        images = [torch.zeros(n, 3, size, size) for n in (1, 2)]
        return [mobilenet_fast.accelerate(network, (x,)).explain().rows for x in images]


def steps_of(model: str, batch: int, rows_of_one: tuple, rows_of_two: tuple) -> list[Step]:
    """The steps that a batch takes: weights are read once, all else is so many times what it is for an image."""
    steps: list[Step] = []
    for row, twice in zip(rows_of_one, rows_of_two, strict=True):
        # Not what the CPU's packed weights take, which are padded.
        is_gate = row.operation.startswith("squeeze_excite")
        weights = HALF_BYTES * row.macs // (1 if is_gate else prod(row.shape[2:]))
        images = (twice.bytes - row.bytes) * HALF_BYTES // 4
        if is_gate and prod(row.shape[2:]) == 1:
            images = 2 * HALF_BYTES * prod(row.shape)  # the map's sums come from the step before
        # The picture comes from memory.
        held = HALF_BYTES * batch * (prod(steps[-1].shape[1:]) + prod(row.shape[1:])) if steps else L2_BYTES
        fits = held <= L2_SHARE * L2_BYTES
        shape = (batch, *row.shape[1:])
        steps.append(
            Step(model, batch, row.name, row.operation, shape, weights + batch * images, batch * row.macs, fits)
        )
    return steps


COLUMNS = ("model", "batch", "step", "name", "operation", "output", "bytes", "macs", "fits_l2", "bound", "predicted_us")


def write_csv(networks: dict[tuple[str, int], list[Step]], file: Path) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow([*COLUMNS, "measured_us"])
        for steps in networks.values():
            for i, s in enumerate(steps):
                output = "×".join(map(str, s.shape))
                known = s.model, s.batch, i, s.name, s.operation, output, s.bytes, s.macs, int(s.fits_l2), s.bound
                writer.writerow([*known, f"{s.predicted_us:.2f}", ""])


def table(heading: tuple[str, ...], rows: list[tuple]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (heading, *rows)]
    return "\n".join([lines[0], "|---" * len(heading) + "|", *lines[1:]])


def summary(networks: dict[tuple[str, int], list[Step]]) -> str:
    rows = []
    for (model, batch), steps in networks.items():
        us, bounds = sum(s.predicted_us for s in steps), Counter()
        for s in steps:
            bounds[s.bound] += s.predicted_us
        shares = ", ".join(f"{bound} {100 * value / us:.0f} %" for bound, value in bounds.most_common())
        megabytes = sum(s.bytes for s in steps) / 1e6 / batch
        speed = f"{1e6 * batch / us:,.0f}"
        rows.append((model, batch, len(steps), f"{megabytes:.1f}", f"{us / 1e3:.3f}", speed, shares, ""))
    heading = ("model", "batch", "steps", "MB an image", "predicted ms", "images/s", "of it bound by", "measured ms")
    return table(heading, rows)


def details(networks: dict[tuple[str, int], list[Step]], model: str) -> str:
    columns = [networks[model, batch] for batch in BATCHES]
    rows = []
    for i, steps in enumerate(zip(*columns, strict=True)):
        last = steps[-1]
        output = "×".join(map(str, last.shape[1:]))
        rows.append((i, last.operation, output, *(f"{s.predicted_us:.1f}" for s in steps), last.bound, ""))
    heading = ("step", "operation", "output of an image", *(f"batch {b}, µs" for b in BATCHES))
    return table((*heading, "at the last bound by", "measured µs"), rows)


HEAD = """# What an H100 should take

**Predictions, no measurements**: no GPU has run these networks yet. Made by `python -m benchmarks.predict`; every step
with its bytes and multiply-adds is in [gpu_predictions.csv](gpu_predictions.csv).

Half precision, every layer with its batch norm, activation, gate and residual as one kernel, all of them in a CUDA
graph. A step takes the longest of these:

- {launch:.0f} µs, from one kernel to the next;
- its bytes (inputs, weights and outputs once) at {copy:.1f} TB/s, or at {l2:.1f} TB/s where its input, taken to be the
  output of the step before, and its output together fit into {share:.0f} % of the L2 cache;
- its multiply-adds at {matrix:.0f} TFLOP/s on tensor cores, or for depthwise ones at {fma:.0f} TFLOP/s in fp32, with
  {instructions} instructions each.
"""


def page(networks: dict[tuple[str, int], list[Step]]) -> str:
    head = HEAD.format(
        launch=LAUNCH_US,
        copy=COPY_BYTES_US / 1e6,
        l2=L2_BYTES_US / 1e6,
        share=100 * L2_SHARE,
        matrix=2 * MATRIX_MACS_US / 1e6,
        fma=2 * FMA_US / 1e6,
        instructions=DEPTHWISE_INSTRUCTIONS,
    )
    sections = [
        f"## {model}\n\n{details(networks, model)}\n" for model in dict.fromkeys(model for model, _ in networks)
    ]
    return "\n".join([head, summary(networks) + "\n", *sections])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu_predictions.md")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args(arguments)
    networks = {}
    for model in options.model:
        rows = plans(model, MODELS[model])
        networks |= {(model, batch): steps_of(model, batch, *rows) for batch in BATCHES}
    options.out.write_text(page(networks), encoding="utf-8")
    write_csv(networks, options.out.with_suffix(".csv"))
    print(summary(networks))
    print("written:", options.out, options.out.with_suffix(".csv"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
