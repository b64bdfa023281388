"""Every Triton kernel compiles for Hopper with the tiles that are chosen, and keeps its values in registers."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks.triton_offline import CHIPS, DTYPES, compile_all, compile_for, layers, page, record, rows  # noqa: E402


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
def test_kernels_compile(dtype, channels_last):
    for label, call in layers(dtype, channels_last, full=False):
        launches = record(call, 90)
        assert launches
        for launch in launches:
            resources = compile_for(launch, 90)
            what = f"{launch.name}, {label}: {resources}"
            if not (dtype is torch.float64 and launch.name == "inverted_residual_forward"):
                assert resources.spilled_bytes == 0, what
            assert resources.shared_bytes <= CHIPS[90].shared_bytes, what
            wide = ("depthwise_conv2d_forward", "conv2d_forward", "pool2d_forward") if channels_last else ()
            if launch.name in (*wide, "epilogue_forward") and dtype is torch.float16:
                # Large depthwise filters leave registers for 4 channels; a stem's three are loaded one by one.
                vector = 8 if launch.name == "depthwise_conv2d_forward" and "5 × 5" in label else 16
                assert resources.load_bytes == vector or label.startswith("3 →"), what
                assert resources.store_bytes == vector, what


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
