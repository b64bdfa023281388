"""Which instruction sets are used and tested."""

import os
import platform
import subprocess
import sys

import pytest

from mobilenet_fast import _C


def machine_isas():
    """What this machine offers, by the operating system's account and not by ours."""
    if platform.machine() in ("aarch64", "arm64"):
        return {"neon", "scalar"}
    with open("/proc/cpuinfo") as info:
        flags = set(next(line for line in info if line.startswith("flags")).split())
    needed = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    return {"scalar"} | {isa for isa, wanted in needed.items() if wanted <= flags}


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs /proc/cpuinfo")
def test_no_instruction_set_of_this_machine_is_left_out(request):
    chosen = request.config.getoption("--isa") or _C.available_isas()
    missing = machine_isas() - set(chosen)
    if missing and request.config.getoption("--isa") and not os.environ.get("MOBILENET_FAST_CI"):
        pytest.skip(f"only {', '.join(chosen)} by --isa")
    assert not missing, f"not tested: {missing}"
    assert _C.available_isas()[-1] == "scalar"


@pytest.mark.parametrize("cap", _C.available_isas())
def test_environment_caps_the_instruction_set(cap):
    code = "from mobilenet_fast import _C; print(_C.cpu_isa(), *_C.available_isas())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MOBILENET_FAST_ISA": cap}, capture_output=True, text=True
    )
    assert run.stdout.split() == [cap, *_C.available_isas()], run.stderr
