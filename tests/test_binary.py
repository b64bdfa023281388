"""One binary has to run on every CPU of its architecture.

The linker keeps a single copy of each weak symbol (inline functions, templates). Were a file compiled for AVX-512 to
hold a weak ``std::max``, every CPU might be given that copy. So the weak symbols of such a file must carry its
instruction set's namespace in their names, and no function may use instructions beyond its namespace's.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mobilenet_fast._C as C

ROOT = Path(__file__).parents[1]
OBJECTS = ROOT / "build" / "objects" / torch.__version__ / "csrc" / "kernels"
WEAK = "WwVvu"


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def unavailable(reason):
    (pytest.fail if os.environ.get("MOBILENET_FAST_CI") else pytest.skip)(reason)


@pytest.mark.parametrize("instructions", [isa for isa in C.available_isas() if isa not in ("scalar", "neon")])
def test_weak_symbols_name_their_instruction_set(instructions):
    path = OBJECTS / f"{instructions}.o"
    if not path.exists() or not shutil.which("nm"):
        unavailable(f"needs nm and {path.relative_to(ROOT)}")
    symbols = [line.split(maxsplit=2) for line in output_of("nm", "-C", "--defined-only", str(path)).splitlines()]
    assert symbols
    shared = [name for _, kind, name in symbols if kind in WEAK and f"mobilenet_fast::{instructions}::" not in name]
    assert not shared, f"{path.name} shares symbols with other files: {shared}"


@pytest.mark.skipif("avx2" not in C.available_isas(), reason="x86-64 with AVX2 only")
def test_vector_instructions_stay_in_their_namespaces():
    if not shutil.which("objdump"):
        unavailable("needs objdump")
    listing = output_of("objdump", "-d", "-C", "--no-show-raw-insn", "--section=.text", C.__file__)
    header, avx = re.compile(r"^[0-9a-f]+ <(.*)>:$"), re.compile(r":\s+v(?!err|erw)\w+\s.*%[xyz]mm")
    evex = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")  # what needs AVX-512
    function, users, offenders = "", set(), set()
    for line in listing.splitlines():
        if match := header.match(line):
            function = match[1]
        elif avx.search(line):
            users.add("avx512" if "::avx512::" in function else "avx2")
            if "::avx512::" not in function and ("::avx2::" not in function or evex.search(line)):
                offenders.add(function)
    assert users == {"avx2", "avx512"}
    assert not offenders, f"these functions would crash on an older CPU: {sorted(offenders)}"
