"""The number of threads changes nothing but the time; calls from several Python threads don't disturb each other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import OPERATIONS, arguments, function, operand

from mobilenet_fast import _C

# Many channels on a small map, few on a large one, and one of each: work is split by rows, by channels, or not at all.
SIZES = ((96, (7, 7)), (5, (40, 33)), (1, (1, 1)), (1025, (3, 1)))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("channels, size", SIZES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_do_not_depend_on_the_number_of_threads(isa, threads, operation, channels, size, dtype, layout):
    args = arguments(operation, layout, dtype, "silu", channels, size)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(getattr(_C, operation)(*args, isa=isa))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("count", (1, 2))
def test_calls_at_once(threads, count):
    threads(count)
    jobs = []
    for seed in range(6):
        for operation in OPERATIONS:
            args = arguments(operation, ("contiguous", "channels_last")[seed % 2], channels=16 + seed, size=(9, 8))
            args[0] = operand(args[0].shape, "contiguous", seed=100 + seed)
            jobs.append((function(operation), args))
    expected = [run(*args) for run, args in jobs]
    start = threading.Barrier(4)

    def worker(offset):
        torch.set_num_threads(count)
        start.wait()
        for _ in range(5):
            for i in range(offset, offset + len(jobs)):
                run, args = jobs[i % len(jobs)]
                assert torch.equal(run(*args), expected[i % len(jobs)])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(worker, (0, 5, 11, 17)))
