"""What each step of the family's networks should take on a GPU: ``python -m benchmarks.predict``.

Writes docs/gpu_predictions.md; its .csv with every step, gpu_predictions_networks.csv, and for each chip a
gpu_predictions_layers_*.csv with every layer of the suite (benchmarks/predict_layers.py). The steps are those that
`accelerate` plans for each chip, the times those that it chooses fused blocks by
(mobilenet_fast/accelerate/roofline.py). What a GPU took has a column of its own, which is empty as long as nothing was
measured: the prediction is there to be compared with, and to say beforehand which steps deserve work. ``--measured``
fills it, by the name of the chip, from what `benchmarks --device cuda`, `gpu_session`, `gpu_tune` and `training
--device cuda` wrote; later runs keep it. No GPU is needed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import predict_layers
from benchmarks.gauges import ROOT
from benchmarks.measured import Measured
from mobilenet_fast import models
from mobilenet_fast.accelerate import cuda
from mobilenet_fast.accelerate.capture import Capture
from mobilenet_fast.accelerate.passes import optimise
from mobilenet_fast.accelerate.roofline import H100, H200, Limits, Work

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
CHIPS = {"H100": H100, "H200": H200}
# As PyTorch names them. Others of their families, as H100s on PCIe, have other memories.
NAMES = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}
Steps = list[tuple[cuda.Row, Work]]
Networks = dict[tuple[str, str, torch.dtype], dict[int, Steps]]
"""By chip, model and dtype; then by batch."""


def steps_of(model: str, dtype: torch.dtype, limits: Limits) -> dict[int, Steps]:
    """For each batch size, the rows of a chip's plan in this dtype, and what each asks of the GPU."""
    size = MODELS[model]
    options = {"aux_logits": False} if model in ("googlenet", "inception_v3") else {}
    network = models.create_model(model, **options).eval().requires_grad_(False).to(dtype)
    capture = Capture(network, (torch.zeros(2, 3, size, size, dtype=dtype),), {}, None)
    found = {}
    for batch in BATCHES:
        image = torch.empty(batch, 3, size, size, dtype=dtype, device="meta")
        graph = optimise(capture.lower([image], network.state_dict(), cuda.KERNEL_DTYPES))
        plan = cuda.build(graph, cuda.CudaWeights(), torch.device("cpu"), limits)
        works = [step.work for step in plan.steps if step.kernel]
        found[batch] = list(zip(plan.report.rows, works, strict=True))
    return found


STEP = "chip", "model", "dtype", "batch", "step", "kernel", "output"
LAYER = "chip", "case", "dtype", "batch", "direction"
NETWORK = "chip", "model", "dtype", "batch", "what"


def step_rows(networks: Networks) -> Iterator[dict]:
    for (chip, model, dtype), batches in networks.items():
        for batch, steps in batches.items():
            for i, (row, work) in enumerate(steps):
                yield {
                    "chip": chip,
                    "model": model,
                    "dtype": _name(dtype),
                    "batch": batch,
                    "step": i,
                    "name": row.name,
                    "kernel": row.kernel,
                    "output": _shape(row.shape),
                    "bytes": row.bytes,
                    "macs": row.macs,
                    "bound": work.bound(CHIPS[chip]),
                    "predicted_us": f"{1e6 * work.seconds(CHIPS[chip]):.2f}",
                }


def network_rows(networks: Networks) -> Iterator[dict]:
    """Of inference, by the plan's steps; of training, forward and backward of its layers, and the same by PyTorch's
    passes."""
    for (chip, model, dtype), batches in networks.items():
        limits = CHIPS[chip]
        for batch, steps in batches.items():
            seconds = sum(work.seconds(limits) for _, work in steps)
            known = {"chip": chip, "model": model, "dtype": _name(dtype), "batch": batch}
            yield known | {"what": "inference", "predicted_ms": f"{1e3 * seconds:.3f}", "pytorch_ms": ""}
            if batch > 1:
                ours, pytorch = (
                    predict_layers.training_seconds(limits, model, batch, dtype, own) for own in (True, False)
                )
                predicted = {"predicted_ms": f"{1e3 * ours:.3f}", "pytorch_ms": f"{1e3 * pytorch:.3f}"}
                yield known | {"what": "training"} | predicted


def write(
    file: Path, rows: list[dict], key: tuple[str, ...], column: str, measured: dict[tuple[str, ...], str]
) -> None:
    """With what was measured in the last column, or else was there before. What has no row is said."""

    def key_of(row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in key)

    before = {}
    if file.exists():
        with file.open(newline="") as opened:
            before = {key_of(row): row[column] for row in csv.DictReader(opened) if row.keys() >= {*key, column}}
    for row in rows:
        row[column] = measured.get(key_of(row)) or before.get(key_of(row), "")
    if strangers := [", ".join(each) for each in measured.keys() - {key_of(row) for row in rows}]:
        print(f"{file.name}: of {len(measured)} measured, {len(strangers)} have no prediction, as {min(strangers)}")
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(heading: tuple[str, ...], rows: list[tuple]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (heading, *rows)]
    return "\n".join([lines[0], "|---" * len(heading) + "|", *lines[1:]])


def summary(networks: Networks, rows: list[dict]) -> str:
    found = {tuple(row[name] for name in NETWORK): row for row in rows}
    lines = []
    for (chip, model, dtype), batches in networks.items():
        limits = CHIPS[chip]
        for batch, steps in batches.items():
            seconds, bounds = sum(work.seconds(limits) for _, work in steps), Counter()
            for _, work in steps:
                bounds[work.bound(limits)] += work.seconds(limits)
            shares = ", ".join(f"{bound} {100 * value / seconds:.0f} %" for bound, value in bounds.most_common())
            row = found[chip, model, _name(dtype), batch, "inference"]
            megabytes = sum(row.bytes for row, _ in steps) / 1e6 / batch
            counted = chip, model, _name(dtype), batch, len(steps), f"{megabytes:.1f}"
            lines.append((*counted, row["predicted_ms"], f"{batch / seconds:,.0f}", shares, row["measured_ms"]))
    first = "chip", "model", "dtype", "batch", "kernels", "MB an image"
    return table((*first, "predicted ms", "images/s", "of it bound by", "measured ms"), lines)


def training(rows: list[dict]) -> str:
    """Forward and backward of a network's layers, ours and by PyTorch's passes."""
    lines = []
    for row in rows:
        if row["what"] == "training":
            ours, pytorch = float(row["predicted_ms"]), float(row["pytorch_ms"])
            times = f"{ours:.2f}", f"{pytorch:.2f}", f"{pytorch / ours:.2f}"
            lines.append((row["chip"], row["model"], row["dtype"], row["batch"], *times, row["measured_ms"]))
    last = "predicted ms", "PyTorch's passes, ms", "ratio", "measured step, ms"
    return table(("chip", "model", "dtype", "batch", *last), lines)


def details(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        output = row["output"].partition("×")[2]  # of one image
        cells = row["step"], row["kernel"], output, f"{row['bytes'] / 1e6:.1f}", f"{float(row['predicted_us']):.1f}"
        lines.append((*cells, row["bound"], row["measured_us"]))
    return table(("step", "kernel", "output of an image", "MB", "predicted µs", "bound by", "measured µs"), lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


HEAD = f"""# What an H100 and an H200 should take

**STATUS** Made by `python -m benchmarks.predict`; every step of both chips' plans is in
[gpu_predictions.csv](gpu_predictions.csv). The constants are fitted to one run of MobileNetV3-Large on an H200
([gpu.md](gpu.md)); the other networks have not been timed.

The steps that `accelerate` plans for CUDA, all of them in one CUDA graph, without the copies of inputs
and outputs. A step takes {1e6 * H100.launch_seconds:.1f} µs, and the longest of these:

- *memory*: its bytes (inputs, weights and outputs once) at {H100.copy_bytes / 1e12:.1f} TB/s on an H100 and
  {H200.copy_bytes / 1e12:.1f} on an H200, all else being alike; tensors of less than
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
what their bytes do. The host's time is left out: launched one by one, a step at batch 32 waits for the host, and in a
CUDA graph, as `python -m benchmarks.training --device cuda` times it too, it does not.
Single layers, forward and with each gradient, are in
[gpu_predictions_layers_h100.csv](gpu_predictions_layers_h100.csv) and
[gpu_predictions_layers_h200.csv](gpu_predictions_layers_h200.csv), in channels_last and under the names that
`python -m benchmarks layers --device cuda --batch 1 32 256 --dtype fp16 fp32` gives them.
"""


def page(networks: Networks, steps: list[dict], of_networks: list[dict]) -> str:
    measured = any(row["measured_us"] for row in steps) or any(row["measured_ms"] for row in of_networks)
    status = "Predictions; what was measured stands beside them." if measured else "Predictions, no measurements."
    batch = BATCHES[-1]
    sections = []
    for chip, model, dtype in networks:
        if (chip, dtype) == ("H200", torch.float16):
            key = chip, model, _name(dtype), batch
            rows = [row for row in steps if tuple(row[name] for name in STEP[:4]) == key]
            sections.append(f"## {model}, H200, float16, batch {batch}\n\n{details(rows)}\n")
    tables = [summary(networks, of_networks) + "\n", TRAINING, training(of_networks) + "\n"]
    return "\n".join([HEAD.replace("STATUS", status), *tables, *sections])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: docs/gpu_predictions.md, with --model benchmarks/results")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--measured", nargs="+", type=Path, default=[], metavar="CSV", help="of a run on a GPU")
    options = parser.parse_args(arguments)
    folder = ROOT / "docs" if options.model == list(MODELS) else ROOT / "benchmarks" / "results"
    out = options.out or folder / "gpu_predictions.md"
    found = Measured(NAMES)
    for file in options.measured:
        try:
            found.add(file)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    networks = {
        (chip, model, dtype): steps_of(model, dtype, limits)
        for chip, limits in CHIPS.items()
        for dtype in DTYPES
        for model in options.model
    }
    steps, of_networks = list(step_rows(networks)), list(network_rows(networks))
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_suffix(".csv"), out.with_name(f"{out.stem}_networks.csv")]
    write(files[0], steps, STEP, "measured_us", found.steps)
    write(files[1], of_networks, NETWORK, "measured_ms", found.networks)
    for chip, limits in CHIPS.items():
        files.append(out.with_name(f"{out.stem}_layers_{chip.lower()}.csv"))
        measured = {key: us for key, us in found.layers.items() if key[0] == chip or key[0] not in CHIPS}
        write(files[-1], list(predict_layers.layer_rows(chip, limits)), LAYER, "measured_us", measured)
    out.write_text(page(networks, steps, of_networks), encoding="utf-8")
    print(summary(networks, of_networks))
    print("written:", out, *files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
