"""Every Triton kernel compiles for Hopper with the tiles that are chosen, and keeps its values in registers."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks import triton_tiles  # noqa: E402
from benchmarks.triton_offline import (  # noqa: E402
    CHIPS,
    DTYPES,
    compile_all,
    compile_for,
    compiled_for,
    layers,
    page,
    record,
    rows,
    specialise,
)
from mobilenet_fast import triton_kernels  # noqa: E402
from mobilenet_fast.triton_kernels import tiles  # noqa: E402
from mobilenet_fast.triton_kernels.common import dependent_launches, launch_options  # noqa: E402


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
def test_kernels_compile(dtype, channels_last):
    for label, call in layers(dtype, channels_last, full=False):
        launches = record(call, 90)
        assert launches
        for launch in launches:
            resources = compile_for(launch, 90)
            what = f"{launch.name}, {label}: {resources}"
            assert resources.spilled_bytes == 0, what
            assert resources.shared_bytes <= CHIPS[90].shared_bytes, what
            wide = ("depthwise_conv2d_forward", "conv2d_forward", "pool2d_forward") if channels_last else ()
            if launch.name in (*wide, "epilogue_forward") and dtype is torch.float16:
                # Large depthwise filters and tall patches leave registers for 4 channels; a stem's three are loaded one
                # by one.
                few = launch.name == "depthwise_conv2d_forward" and ("5 × 5" in label or launch.arguments["ROWS"] == 7)
                vector = 8 if few else 16
                assert resources.load_bytes == vector or label.startswith("3 →"), what
                assert resources.store_bytes == vector, what


def test_a_new_momentum_compiles_nothing():
    x, v = image(2, 16, 8, 8), torch.empty(16, device="meta")
    first, second = (
        record(lambda m=m: triton_kernels.batch_norm_act_training(x, v, v, v, v, m, 1e-5, "relu"), 90)
        for m in (0.1, np.float32(0.25))
    )
    assert [specialise(launch) for launch in first] == [specialise(launch) for launch in second]


def image(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)


@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("multiprocessors", (20, 58, 128))
def test_products_fit_the_shared_memory_of_small_chips(multiprocessors, itemsize):
    chip = tiles.Chip("small", multiprocessors, 99 * 1024)
    for images, pixels in ((1, 1), (1, 49), (1, 196), (1, 64), (4, 196), (8, 196), (1, 1568), (32, 3136)):
        for channels in (16, 72, 120, 240, 480, 672, 960, 1280):
            for out_channels in (16, 24, 40, 112, 160, 672, 1000, 1280):
                tile = tiles.pointwise_tile(chip, itemsize, images, pixels, channels, out_channels, pixels % 2 == 0)
                stage = (tile.pixels + tile.out_channels) * tile.channels * itemsize
                assert (tile.stages - 1) * stage <= chip.shared_bytes, tile


def test_inputs_that_no_tap_meets():
    """Rows and columns that a stride leaves out, which an interpreter does not mind."""
    weight = torch.empty(16, 1, 2, 1, device="meta")
    for stride, dilation in (((3, 2), (1, 1)), ((1, 1), (3, 1)), ((3, 3), (5, 1))):
        (launch,) = record(
            lambda s=stride, d=dilation: triton_kernels.depthwise_conv2d(
                image(2, 16, 30, 30), weight, None, s, (0, 0), d
            ),
            90,
        )
        assert compile_for(launch, 90).spilled_bytes == 0


def test_dependent_launches(monkeypatch):
    """Kernels wait for those before them once they have read their weights, where a network's launches ask for it."""
    with dependent_launches(torch.device("cuda")):
        assert launch_options() == {"DEPENDENT": False}
    monkeypatch.setenv("MOBILENET_FAST_DEPENDENT_LAUNCHES", "1")
    for capability, dependent in (((9, 0), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with dependent_launches(torch.device("cuda")):
            assert launch_options().get("launch_pdl", False) == dependent
            with dependent_launches(None):  # PyTorch's own steps
                assert launch_options() == {"DEPENDENT": False}
            weight = torch.empty(32, 64, 1, 1, dtype=torch.float16, device="meta")
            (launch,) = record(lambda w=weight: triton_kernels.pointwise_conv2d(image(2, 64, 14, 14), w), 90)
        assert launch_options() == {"DEPENDENT": False}
        lines = [line.strip() for line in compiled_for(launch, 90).asm["ptx"].splitlines()]
        waits = [i for i, line in enumerate(lines) if line.startswith("griddepcontrol.wait")]
        assert len(waits) == dependent
        if dependent:
            assert any("ld.global" in line for line in lines[: waits[0]])
            assert not any("cp.async" in line for line in lines[: waits[0]])


def test_page_has_a_row_a_kernel_and_a_column_an_architecture():
    table = [next(rows([dtype], [80, 90], "^epilogue")) for dtype in ("fp16", "fp64")]
    compiled = compile_all(table, 2)
    assert set(compiled) == {(0, 80), (0, 90), (1, 90)}
    head, _, half, double = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page(table, compiled, [80, 90]).splitlines()
        if line.startswith("|")
    )
    assert head[-2:] == ["sm_80", "sm_90"] and half[:5] == [
        "epilogue_forward",
        table[0].label,
        "fp16",
        "channels_last",
        "16, 16",
    ]
    assert half[5].split(" · ")[0] == str(compiled[0, 80].registers)
    assert double[5] == "" and double[6]


def test_every_tile_of_some_layers(monkeypatch, tmp_path):
    names = (
        "depthwise_conv2d 72x28x28 to 72 k5x5 s1 p2x2",
        "batch_norm_act 24x7x7 relu",
        "pointwise_conv2d 24x7x7 to 40 k1x1 s1 p0x0",
    )
    cases = [triton_tiles.layers.parse(name).case() for name in names]
    monkeypatch.setattr(triton_tiles.layers, "cases", lambda: cases)
    monkeypatch.setattr(triton_tiles, "BATCHES", (2,))
    table = list(triton_tiles.layer_rows([torch.float16], [90]))
    found = {row.launches[90].name for row in table}
    assert found >= {"depthwise_conv2d_forward", "depthwise_conv2d_backward", "batch_norm_act_backward"}
    assert {row.channels_last for row in table} == {True, False}
    compiled = compile_all(table, 2)
    lines = triton_tiles.page(table, compiled, [90]).splitlines()
    rows = [line for line in lines if "| fp16 |" in line]
    assert len(rows) == 2 * len(found) and any(line.startswith("None of") for line in lines)
    spilling = {key: replace(resources, spilled_bytes=8) for key, resources in compiled.items()}
    text = triton_tiles.page(table, spilling, [90])
    assert f"- depthwise_conv2d_forward, fp16, channels_last, sm_90, {names[0]}, batch 2: 8 bytes spilled" in text
