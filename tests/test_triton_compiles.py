"""Every Triton kernel compiles for Hopper with the tiles that are chosen, and keeps its values in registers."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks.triton_offline import CHIPS, DTYPES, compile_for, layers, record  # noqa: E402


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
                # A stem's three channels are loaded one by one.
                assert resources.load_bytes == 16 or label.startswith("3 →"), what
                assert resources.store_bytes == 16, what
