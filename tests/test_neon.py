"""The NEON kernels, compiled for aarch64 and run by an emulator: the whole of them, without Python or torch."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(platform.machine() == "aarch64", reason="the other tests run the NEON kernels themselves")
def test_neon_kernels_equal_plain_loops_in_double(tmp_path):
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (Debian: g++-aarch64-linux-gnu qemu-user)")
    program = tmp_path / "check_kernels"
    sources = [ROOT / "tests/native/check_kernels.cpp", *sorted((ROOT / "csrc/kernels").glob("*.cpp"))]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-static", f"-I{ROOT / 'csrc'}"]
    objects = []
    for source in sources:
        objects.append(tmp_path / f"{source.stem}.o")
        subprocess.run([COMPILER, *flags, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([COMPILER, "-static", *objects, "-o", program], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "MOBILENET_FAST_ISA"}
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon: as the reference" in done.stdout
