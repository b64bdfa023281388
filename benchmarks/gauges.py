"""What the machine allows, measured between the peers' turns: multiply-add peaks and the bandwidth of copies.

``python -m benchmarks.gauges`` does so on a GPU: for each line {"dtype": …} on stdin it prints a line of JSON.
"""

import json
import os
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

from benchmarks.cases import DTYPES, Setting

ROOT = Path(__file__).parents[1]


def environment(threads: int) -> dict[str, str]:
    return dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))


def verbose() -> bool:
    return bool(os.environ.get("BENCHMARKS_VERBOSE"))


# The peak that a kernel is held to is that of the instructions it may use.
PEAK_FLAGS = {"avx512": ["-mavx512f"], "avx2": ["-mavx2", "-mfma"]}


@cache
def peak_program() -> str:
    import mobilenet_fast

    isa = mobilenet_fast.cpu_isa()
    source, program = ROOT / "benchmarks" / "peak.cpp", ROOT / "build" / f"peak-{isa}"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        program.parent.mkdir(exist_ok=True)
        flags = ["-std=c++17", "-O3", "-fopenmp", *PEAK_FLAGS.get(isa, [])]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(program)], check=True)
    return str(program)


def peak(what: str, threads: int, seconds: float = 0.1) -> float:
    """GFLOP/s of multiply-adds (``fma``) or GB/s of a copy (``l2``, ``memory``) by all threads together, or the ns of a
    cache line's way between two of them and back (``trip``)."""
    arguments = [peak_program(), what, str(threads), str(seconds)]
    return float(subprocess.run(arguments, check=True, capture_output=True, env=environment(threads)).stdout)


class CpuGauge:
    def __init__(self, setting: Setting):
        self.threads = setting.threads
        self.peaks: list[float] = []
        self.trips: list[float] = []

    def read(self, peak_only: bool = False):
        if self.threads > 1 and not peak_only:
            self.trips.append(peak("trip", 2, 0.02))
        self.peaks.append(peak("fma", self.threads))

    def fill(self, result):
        result.peak_gflops, result.peak_low_gflops = max(self.peaks), min(self.peaks)
        if self.trips:
            result.trip_low_ns, result.trip_ns = min(self.trips), max(self.trips)
        if result.error is not None and result.gmacs:
            result.peak_share = result.gflops / result.peak_gflops


class CudaGauge:
    """Asks the one process that measures the device."""

    def __init__(self, setting: Setting):
        self.dtype = setting.dtype
        self.readings: list[dict[str, float]] = []

    def read(self, peak_only: bool = False):
        self.readings.append(gpu_process().ask(dtype=self.dtype))

    def fill(self, result):
        """The floor is that of the median peaks; ``peak_share`` that of multiply-adds alone."""
        peaks = [reading["matrix_gflops"] for reading in self.readings]
        result.peak_gflops, result.peak_low_gflops = statistics.median(peaks), min(peaks)
        result.copy_gbytes = statistics.median(reading["copy_gbytes"] for reading in self.readings)
        if result.error is not None:
            result.floor_ms = floor_ms(result.mbytes, result.gmacs, result.copy_gbytes, result.peak_gflops)
            result.floor_share = result.floor_ms / result.median_ms
            result.peak_share = result.gflops / result.peak_gflops if result.gmacs else None


def floor_ms(mbytes: float, gmacs: float, gbytes_per_second: float, gflops_per_second: float) -> float:
    """What moving the bytes or computing the products takes, whichever takes longer."""
    return max(mbytes / gbytes_per_second, 1e3 * 2 * gmacs / gflops_per_second)


def gauge_of(setting: Setting) -> CpuGauge | CudaGauge:
    return CpuGauge(setting) if setting.device == "cpu" else CudaGauge(setting)


def ceilings(threads: int) -> dict[str, float]:
    return {what: peak(what, threads, 0.5) for what in ("l2", "memory")}


class GpuProcess:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gauges"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose() else subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        self.facts = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that measures the GPU ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **what) -> dict:
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self.answer()


_gpu_processes: list[GpuProcess] = []


def gpu_process() -> GpuProcess:
    """The one of this run; another if it has ended."""
    if not _gpu_processes or _gpu_processes[0].process.poll() is not None:
        _gpu_processes[:] = [GpuProcess()]
    return _gpu_processes[0]


def gpu_facts() -> dict:
    """Name, driver and versions of the device that PyTorch uses."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    except OSError:
        driver = ""
    return {
        "gpu": properties.name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
    }


class Peaks:
    """Copies of half a GiB, which no cache holds, and products of 8192 × 8192 matrices."""

    def __init__(self, device, clock, size: int = 8192, copied: int = 2**29):
        import torch

        self.device, self.clock, self.size = device, clock, size
        self.source, self.target = torch.empty(2, copied, dtype=torch.uint8, device=device)

    def read(self, dtype: str) -> dict[str, float]:
        import torch

        # A convolution of 1×1 is such a product, and may use TF32 by default where a product may not.
        rounded = torch.backends.cudnn.conv.fp32_precision == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "tf32" if rounded else "ieee"
        a, b = torch.randn(2, self.size, self.size, device=self.device).to(DTYPES[dtype])
        c = torch.empty_like(a)
        copy_ms = self.clock(lambda: self.target.copy_(self.source))
        product_ms = self.clock(lambda: torch.mm(a, b, out=c))
        copied = 2 * self.source.numel()
        return {"copy_gbytes": copied / copy_ms / 1e6, "matrix_gflops": 2 * self.size**3 / product_ms / 1e6}


def median_ms(call, repeats: int = 7) -> float:
    """Of calls that a GPU runs one after another."""
    import torch

    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))


def main():
    print(json.dumps(gpu_facts()), flush=True)
    peaks = Peaks("cuda", median_ms)
    for line in sys.stdin:
        print(json.dumps(peaks.read(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
