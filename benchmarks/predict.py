"""What each step of the family's networks should take on a GPU: ``python -m benchmarks.predict``.

Writes docs/gpu_predictions.md, .csv with every step, and gpu_predictions_layers.csv with every layer of the suite
(benchmarks/predict_layers.py). The steps are those that `accelerate` plans for CUDA, the times those that it chooses
fused blocks by (mobilenet_fast/accelerate/roofline.py). What a GPU took has a column of its own, which is empty as long
as nothing was measured: the prediction is there to be compared with, and to say beforehand which steps deserve work. No
GPU is needed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

import torch

from benchmarks import predict_layers
from benchmarks.gauges import ROOT
from mobilenet_fast import models
from mobilenet_fast.accelerate import cuda
from mobilenet_fast.accelerate.capture import Capture
from mobilenet_fast.accelerate.passes import optimise
from mobilenet_fast.accelerate.roofline import H100, Work

BATCHES = (1, 32, 256)
DTYPES = (torch.float16, torch.float32)  # bfloat16 counts as float16 does
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
Steps = list[tuple[cuda.Row, Work]]
Networks = dict[tuple[str, torch.dtype], dict[int, Steps]]


def steps_of(model: str, size: int, dtype: torch.dtype = torch.float16) -> dict[int, Steps]:
    """For each batch size, the plan's rows in this dtype, and what each asks of the GPU."""
    options = {"aux_logits": False} if model in ("googlenet", "inception_v3") else {}
    network = models.create_model(model, **options).eval().requires_grad_(False).to(dtype)
    capture = Capture(network, (torch.zeros(2, 3, size, size, dtype=dtype),), {}, None)
    found = {}
    for batch in BATCHES:
        image = torch.empty(batch, 3, size, size, dtype=dtype, device="meta")
        graph = optimise(capture.lower([image], network.state_dict(), cuda.KERNEL_DTYPES))
        plan = cuda.build(graph, cuda.CudaWeights(), torch.device("cpu"), H100)
        works = [step.work for step in plan.steps if step.kernel]
        found[batch] = list(zip(plan.report.rows, works, strict=True))
    return found


COLUMNS = (
    "model",
    "dtype",
    "batch",
    "step",
    "name",
    "kernel",
    "output",
    "bytes",
    "macs",
    "bound",
    "predicted_us",
    "measured_us",
)


def measured(file: Path, *key: str) -> dict[tuple[str, ...], str]:
    """What was entered as measured, which predictions made anew leave there."""
    if not file.exists():
        return {}
    with file.open(newline="") as opened:
        return {tuple(row[name] for name in key): row["measured_us"] for row in csv.DictReader(opened)}


def write_csv(networks: Networks, file: Path) -> None:
    entered = measured(file, "model", "dtype", "batch", "step", "kernel", "output")
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (model, dtype), batches in networks.items():
            for batch, steps in batches.items():
                for i, (row, work) in enumerate(steps):
                    known = (
                        model,
                        _name(dtype),
                        batch,
                        i,
                        row.name,
                        row.kernel,
                        _shape(row.shape),
                        row.bytes,
                        row.macs,
                        work.bound(),
                    )
                    key = *map(str, known[:4]), row.kernel, _shape(row.shape)
                    writer.writerow([*known, f"{1e6 * work.seconds():.2f}", entered.get(key, "")])


def write_layers(file: Path) -> None:
    key = "case", "dtype", "batch", "direction"
    entered = measured(file, *key)
    rows = list(predict_layers.layer_rows())
    for row in rows:
        row["measured_us"] = entered.get(tuple(str(row[name]) for name in key), "")
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def training(names: list[str]) -> str:
    """Forward and backward of a network's layers, ours and by PyTorch's passes."""
    rows = []
    for name in names:
        for batch in (32, 256):
            for dtype in DTYPES:
                ours, pytorch = (predict_layers.training_seconds(name, batch, dtype, own) for own in (True, False))
                times = f"{1e3 * ours:.2f}", f"{1e3 * pytorch:.2f}", f"{pytorch / ours:.2f}"
                rows.append((name, _name(dtype), batch, *times, ""))
    return table(("model", "dtype", "batch", "predicted ms", "PyTorch's passes, ms", "ratio", "measured ms"), rows)


def table(heading: tuple[str, ...], rows: list[tuple]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (heading, *rows)]
    return "\n".join([lines[0], "|---" * len(heading) + "|", *lines[1:]])


def summary(networks: Networks) -> str:
    rows = []
    for (model, dtype), batches in networks.items():
        for batch, steps in batches.items():
            seconds, bounds = sum(work.seconds() for _, work in steps), Counter()
            for _, work in steps:
                bounds[work.bound()] += work.seconds()
            shares = ", ".join(f"{bound} {100 * value / seconds:.0f} %" for bound, value in bounds.most_common())
            megabytes = sum(row.bytes for row, _ in steps) / 1e6 / batch
            speed = f"{batch / seconds:,.0f}"
            rows.append(
                (model, _name(dtype), batch, len(steps), f"{megabytes:.1f}", f"{1e3 * seconds:.3f}", speed, shares, "")
            )
    heading = (
        "model",
        "dtype",
        "batch",
        "kernels",
        "MB an image",
        "predicted ms",
        "images/s",
        "of it bound by",
        "measured ms",
    )
    return table(heading, rows)


def details(steps: Steps) -> str:
    rows = []
    for i, (row, work) in enumerate(steps):
        cells = i, row.kernel, _shape(row.shape[1:]), f"{row.bytes / 1e6:.1f}", f"{1e6 * work.seconds():.1f}"
        rows.append((*cells, work.bound(), ""))
    return table(("step", "kernel", "output of an image", "MB", "predicted µs", "bound by", "measured µs"), rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


HEAD = f"""# What an H100 should take

**Predictions, no measurements.** Made by `python -m benchmarks.predict`; every step is in
[gpu_predictions.csv](gpu_predictions.csv). Their constants are fitted to one run of MobileNetV3-Large on an H200
([gpu.md](gpu.md)), whose memory is faster; the other networks have not been timed.

The steps that `accelerate` plans for CUDA, all of them in one CUDA graph, without the copies of inputs
and outputs. A step takes {1e6 * H100.launch_seconds:.1f} µs, and the longest of these:

- *memory*: its bytes (inputs, weights and outputs once) at {H100.copy_bytes / 1e12:.1f} TB/s; tensors of less than
  {H100.l2_bytes / 2**21:.0f} MiB, half of the L2 cache, and what a fused block reads again, at
  {H100.l2_bytes_a_second / 1e12:.1f} TB/s;
- *tensor cores*: multiply-adds of products at {2 * H100.half_macs / 1e12:.0f} TFLOP/s in float16 and bfloat16, half of
  that in float32 (as TF32);
- *instructions* of threads, as a GPU's counters had them, at {H100.instructions / 1e12:.0f} · 10¹² a second;
- *latency*: {1e6 * H100.load_seconds:.1f} µs each time that a program loads and works before it can load again.
"""


TRAINING = """## Training

Forward and backward of convolutions, batch norms with their activations and squeeze-excites, kernel by kernel, without
residuals, pooling, classifier, loss and optimizer; PyTorch's kernels at the speeds above too, where they read and write
more. So the ratio is what fewer passes alone should give; PyTorch's depthwise gradients are known to take many times
what their bytes do. The host's time is left out: this training is no CUDA graph, and at batch 32 waits for the host.
Single layers, forward and with each gradient, are in
[gpu_predictions_layers.csv](gpu_predictions_layers.csv), in channels_last and under the names that
`python -m benchmarks layers --device cuda --batch 1 32 256 --dtype fp16 fp32` gives them.
"""


def page(networks: Networks) -> str:
    names = list(dict.fromkeys(model for model, _ in networks))
    sections = [
        f"## {model}, float16, batch {BATCHES[-1]}\n\n{details(steps[BATCHES[-1]])}\n"
        for (model, dtype), steps in networks.items()
        if dtype == torch.float16
    ]
    return "\n".join([HEAD, summary(networks) + "\n", TRAINING, training(names) + "\n", *sections])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu_predictions.md")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args(arguments)
    networks = {(model, dtype): steps_of(model, MODELS[model], dtype) for dtype in DTYPES for model in options.model}
    options.out.write_text(page(networks), encoding="utf-8")
    every_step = options.out.with_suffix(".csv")
    every_layer = options.out.with_name(f"{options.out.stem}_layers.csv")
    write_csv(networks, every_step)
    write_layers(every_layer)
    print(summary(networks))
    print("written:", options.out, every_step, every_layer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
