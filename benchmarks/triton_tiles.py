"""Every tile that is chosen for the family's layers, compiled without a GPU: ``python -m benchmarks.triton_tiles``.

Where docs/triton.md shows some layers, here are all: every layer of the benchmarks' networks at batches of 1, 32 and
256, forward and backward in both layouts, and every step of these networks' plans, with the tiles that a chip of each
architecture gets. What comes to the same code is compiled once. For each kernel, type and layout docs/triton_tiles.md
says how many variants there are, the most registers and shared memory of any, the fewest warps that a multiprocessor
holds of one, and spills, one by one: with fewer than 250 registers it is the compiler's choice, which keeps a value or
two in memory for more warps. An activation changes no tile: batch norms have SiLU, which takes the most.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from benchmarks import gpu_tune
from benchmarks.cases import layers
from benchmarks.gauges import ROOT
from benchmarks.predict import BATCHES, MODELS
from benchmarks.triton_offline import CHIPS, DTYPES, Resources, Row, compile_all, record, specialise
from mobilenet_fast import triton_kernels as kernels

# Whose limits decide what is fused; of Blackwell there are none, and an H200 is nearest.
PLANNED_FOR = {80: "A100", 90: "H100", 100: "H200"}


def calls_of(layer: layers.Layer, batch: int, dtype: torch.dtype, channels_last: bool) -> Iterator[Callable]:
    """Of launchers, forward and backward, on tensors that are nowhere: with all that an epilogue has in `accelerate`'s
    plans and more, and with the scale and bias of a batch norm, as layers have them in evaluation."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def image(channels: int, height: int, width: int) -> torch.Tensor:
        shape = batch, channels, height, width
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

    def vector(*shape: int, wide: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32 if wide and dtype.itemsize < 4 else dtype, device="meta")

    c = layer.channels
    if isinstance(layer, layers.Convolution):
        k, size, sides = layer.out_channels, (layer.height, layer.width), zip(layer.padding, layer.kernel, strict=True)
        out = ((n + 2 * p - r) // layer.stride + 1 for n, (p, r) in zip(size, sides, strict=True))
        x, y, bias, scale = image(c, *size), image(k, *out), vector(k, wide=True), vector(k, wide=True)
        if layer.depthwise:
            w, geometry = vector(c, 1, *layer.kernel), ((layer.stride, layer.stride), layer.padding, (1, 1))
            yield lambda: kernels.depthwise_conv2d(x, w, bias, *geometry, "hardswish", with_sums=channels_last)
            yield lambda: kernels.depthwise_conv2d(x, w, bias, *geometry, "hardswish", scale)
            yield lambda: kernels.depthwise_conv2d_backward(y, x, w, *geometry)
        else:
            w, gate = vector(k, c, 1, 1), vector(batch, c, 1, 1)
            yield lambda: kernels.pointwise_conv2d(x, w, bias, "hardswish", gate, y)
            yield lambda: kernels.pointwise_conv2d(x, w, bias, "hardswish", None, y, scale)
        return
    x = image(c, layer.size, layer.size)
    if isinstance(layer, layers.BatchNorm):
        v = vector(c, wide=True)
        yield lambda: kernels.batch_norm_act(x, v, v, v, v, 1e-3, "silu")
        yield lambda: kernels.batch_norm_act_training(x, v, v, v, v, 0.1, 1e-3, "silu")
        yield lambda: kernels.batch_norm_act_backward(x, x, v, v, v, v, "silu")
    else:
        w1, w2 = vector(layer.squeeze_channels, c, 1, 1), vector(c, layer.squeeze_channels, 1, 1)
        yield lambda: kernels.squeeze_excite(x, w1, None, w2, None, layer.activation, layer.gate)
        yield lambda: kernels.sums_of_products(x, x)


def layer_rows(dtypes: list[torch.dtype], capabilities: list[int]) -> Iterator[Row]:
    for case in layers.cases():
        if "cuda" not in case.devices:
            continue
        for dtype in dtypes:
            if case.dtypes and DTYPES[dtype] not in case.dtypes:
                continue
            for batch in case.batches or BATCHES:
                for channels_last in (True, False):
                    for call in calls_of(layers.parse(case.name), batch, dtype, channels_last):
                        for launches in zip(*(record(call, each) for each in capabilities), strict=True):
                            label = f"{case.name}, batch {batch}"
                            yield Row(label, dtype, channels_last, dict(zip(capabilities, launches, strict=True)))


def plan_rows(models: list[str], dtypes: list[torch.dtype], capabilities: list[int]) -> Iterator[Row]:
    for model in models:
        for dtype in dtypes:
            for batch in BATCHES:
                for each in capabilities:
                    job = model, batch, DTYPES[dtype], "planned", False
                    for launch in gpu_tune.launches_of(gpu_tune.trials_of(job, PLANNED_FOR[each]), each):
                        yield Row(f"{model}, batch {batch}", dtype, True, {each: launch.without_memory()})


def page(table: list[Row], compiled: dict[tuple[int, int], Resources], capabilities: list[int]) -> str:
    """docs/triton_tiles.md."""
    groups: dict[tuple[str, str, str], dict[int, dict[str, tuple[str, Resources]]]] = {}
    for index, row in enumerate(table):
        for capability, launch in row.launches.items():
            layout = "channels_last" if row.channels_last else "contiguous"
            group = groups.setdefault((launch.name, DTYPES[row.dtype], layout), {})
            variant = repr((specialise(launch), launch.options))
            group.setdefault(capability, {}).setdefault(variant, (row.label, compiled[index, capability]))
    head = ["kernel", "dtype", "layout", *(f"sm_{c}" for c in capabilities)]
    lines, spills, count = [head, ["---"] * len(head)], [], 0
    for key, group in sorted(groups.items()):
        cells = []
        for capability in capabilities:
            found = group.get(capability, {}).values()
            count += len(found)
            most = max((r.registers for _, r in found), default=0)
            shared = max((r.shared_bytes for _, r in found), default=0)
            warps = min((r.resident_warps(capability) for _, r in found), default=0)
            cells.append(f"{len(found)} · {most} · {shared} · {warps}" if found else "")
            for label, r in found:
                where = f"{', '.join(key)}, sm_{capability}, {label}"
                if r.spilled_bytes:
                    spills.append(f"- {where}: {r.spilled_bytes} bytes spilled, {r.registers} registers")
                if r.shared_bytes > CHIPS[capability].shared_bytes:
                    spills.append(f"- {where}: {r.shared_bytes} bytes of shared memory, more than there is")
        lines.append([*key, *cells])
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    command = shlex.join(["python", "-m", "benchmarks.triton_tiles", *sys.argv[1:]])
    made = f"Made by `{command}`, triton {triton.__version__}."
    units = "Variants · most registers a thread · most bytes of shared memory a program · fewest resident warps."
    found = f"Of {count} variants, these spill or ask for too much:" if spills else f"None of {count} variants spills."
    text = __doc__.partition("\n\n")[2]
    return "\n".join(
        ["# Every tile as compiled", "", made, "", f"{text}\n{units}", "", *rows, "", found, "", *spills, ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.triton_tiles", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="*", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--dtype", nargs="*", default=["fp16", "fp32"], choices=list(DTYPES.values()))
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=MODELS, help="whose plans")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "triton_tiles.md")
    options = parser.parse_args()
    dtypes = [dtype for dtype, name in DTYPES.items() if name in options.dtype]
    table = [*layer_rows(dtypes, options.capability), *plan_rows(options.model, dtypes, options.capability)]
    compiled = compile_all(table, options.processes)
    options.output.write_text(page(table, compiled, options.capability))


if __name__ == "__main__":
    main()
