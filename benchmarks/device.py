"""What a worker asks of the device that its peer runs on: clock, memory, CUDA graphs, names of kernels."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Problem, Setting
from benchmarks.cases.placed import PlacedProblem

# What a GPU does besides kernels.
NO_KERNELS = ("Memcpy", "Memset", "Context Sync", "Event Sync", "Stream Sync", "Stream Wait")


def status_kib(name: str) -> int:
    """Of this process; resource.getrusage would count the parent's memory too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class CpuDevice:
    name = "cpu"

    def problem(self, case: Case, setting: Setting) -> Problem:
        return case.problem(setting.batch)

    def time_calls(self, run: Callable, inputs: Iterator, seconds: float) -> list[float]:
        """Milliseconds of each call, for so many seconds."""
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            x = next(inputs)
            start = time.perf_counter()
            run(x)
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def memory_mib(self) -> float:
        """Memory of this process that is in RAM."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def peak_growth_mib(self, call: Callable[[], Any]) -> float:
        """By how much the call's most memory is above what there was before, if there never was more."""
        before = self.memory_mib()
        call()
        return status_kib("VmHWM") / 2**10 - before

    def trim(self) -> None:
        pass

    def facts(self) -> dict:
        return {}


class CudaDevice:
    """``cold``: the L2 cache is emptied before each call."""

    name = "cuda"

    def __init__(self, cold: bool):
        torch.backends.cudnn.benchmark = True
        self.flush = None
        if cold:
            size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.zeros(size // 4, device=self.name)

    def problem(self, case: Case, setting: Setting) -> PlacedProblem:
        """With the weights of batch 1, which is all that is kept on disk."""
        return PlacedProblem(case.problem(1), setting, self.name)

    def empty_cache(self) -> None:
        """Reads after it has written: lines that are still to be written back would take bandwidth from the call."""
        self.flush.zero_()
        self.flush.sum()

    def clock(self):
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def time_calls(self, run: Callable, inputs: Iterator, seconds: float) -> list[float]:
        """Milliseconds of each call between two events of the stream, for about so many seconds.

        Calls are queued by as many as take a hundredth of a second, so that the device does not wait for the host
        unless a call's own launches make it.
        """
        times, end = [], time.perf_counter() + seconds
        count = 1
        while not times or time.perf_counter() < end:
            events = []
            for _ in range(count):
                x = next(inputs)
                if self.flush is not None:
                    self.empty_cache()
                start, stop = self.clock(), self.clock()
                start.record()
                run(x)
                stop.record()
                events.append((start, stop))
            self.synchronize()
            times += [start.elapsed_time(stop) for start, stop in events]
            count = min(32, max(1, int(10 / max(times[-1], 1e-3))))
        return times

    def time_from_host(self, run: Callable, wait: Callable, inputs: Iterator, seconds: float) -> list[float]:
        """The same of a runtime that uses a stream of its own: by the host's clock, over several calls at a time, so
        that waiting for the last one weighs little."""
        times, end, count = [], time.perf_counter() + seconds, 1
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            for _ in range(count):
                y = run(next(inputs))
            wait(y)
            times.append(1e3 * (time.perf_counter() - start) / count)
            count = min(256, max(1, math.ceil(10 / max(times[-1], 1e-3))))
        return times

    def capture(self, call: Callable, inputs: list) -> Callable:
        """The call in CUDA graphs, one for each input, which so is copied nowhere; all use the same memory."""
        stream, graphs, pool = torch.cuda.Stream(), {}, None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for x in inputs:
                for _ in range(2):
                    call(x)
        torch.cuda.current_stream().wait_stream(stream)
        for x in inputs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                output = call(x)
            graphs[id(x)] = graph, output
            pool = pool or graph.pool()

        def replay(x: Any) -> Any:
            graph, output = graphs[id(x)]
            graph.replay()
            return output

        return replay

    def kernels(self, call: Callable[[], Any]) -> list[tuple[str, float]]:
        """The kernels of a call in their order, and the microseconds that each took."""
        with self.profiler() as profile:
            call()
            self.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [(e.name, e.time_range.elapsed_us()) for e in events]
        return [(name, us) for name, us in kernels if not name.startswith(NO_KERNELS)]

    @contextmanager
    def profiler(self):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield profile

    def memory_mib(self) -> float:
        return torch.cuda.memory_reserved() / 2**20

    def peak_growth_mib(self, call: Callable[[], Any]) -> float:
        """By how much the tensors of the call, at their most, are above those before it; of a second call, as in the
        first cuDNN and compilers try what takes more."""
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        self.trim()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def trim(self) -> None:
        """Hands back memory that only set-up took."""
        torch.cuda.empty_cache()

    def facts(self) -> dict:
        """What the parent decides by whether another process fits in, and what rows say."""
        free, total = torch.cuda.mem_get_info()
        return {
            "free_mib": free / 2**20,
            "total_mib": total / 2**20,
            "peak_mib": torch.cuda.max_memory_reserved() / 2**20,
            "held_mib": self.memory_mib(),
            "tf32": torch.backends.cudnn.conv.fp32_precision == "tf32",
        }


def device_for(setting: Setting, suite: str) -> CpuDevice | CudaDevice:
    """Networks read weights that the last call left in the cache, as they do in use; layers find it empty."""
    return CpuDevice() if setting.device == "cpu" else CudaDevice(cold=suite != "models")
