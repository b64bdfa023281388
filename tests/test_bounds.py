"""Nothing outside an operand is read: each is placed against a page of memory that must not be touched."""

import subprocess
import sys
from pathlib import Path

import pytest

from mobilenet_fast import _C

PROGRAM = r"""
import ctypes, itertools, math, mmap, sys

import torch
from helpers import OPERATIONS, arguments, check

from mobilenet_fast import _C

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
keep = []


def against_a_guard(tensor, at_end):
    memory = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 and not tensor.is_contiguous() else tensor
    size = memory.numel() * memory.itemsize
    pages = -(-size // PAGE)
    region = mmap.mmap(-1, (pages + 2) * PAGE)
    keep.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (start, start + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    offset = PAGE * (pages + 1) - size if at_end else PAGE
    placed = torch.frombuffer(region, dtype=tensor.dtype, count=memory.numel(), offset=offset).view(memory.shape)
    placed.copy_(memory)
    return placed.permute(0, 3, 1, 2) if memory is not tensor else placed


sizes = ((1, (1, 1)), (5, (7, 7)), (16, (4, 4)), (17, (5, 9)), (35, (3, 8)), (65, (2, 2)))
cases = itertools.product(
    OPERATIONS, ("contiguous", "channels_last"), (torch.float32, torch.float64), ("hardswish", "silu"), sizes, (0, 1)
)
for case in cases:
    operation, layout, dtype, activation, (channels, size), at_end = case
    print(case, flush=True)
    args = arguments(operation, layout, dtype, activation, channels, size)
    args = [against_a_guard(a, at_end) if isinstance(a, torch.Tensor) else a for a in args]
    check(operation, getattr(_C, operation)(*args, isa=sys.argv[1]), args)
    keep.clear()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_is_read_outside_an_operand(isa):
    here = Path(__file__).parent
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = [{str(here)!r}, {str(Path(_C.__file__).parents[1])!r}]\n{PROGRAM}",
            isa,
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout.splitlines()[-1:]} ended with {run.returncode}: {run.stderr[-2000:]}"
