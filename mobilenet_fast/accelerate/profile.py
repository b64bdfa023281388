"""Where the time of an accelerated model goes: see :meth:`AcceleratedModule.profile`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from .. import _C
from .cuda import CudaPlan
from .plan import Plan, Row

_BAR = 24


@dataclass(frozen=True)
class Profile:
    """Median times of a plan's steps. ``str(profile)`` is a table with a bar chart.

    ``rows`` and ``seconds`` are in the order of the steps: on CPU each from barrier to barrier, on CUDA from the end of
    the step before. ``total_seconds`` is the median time of the whole plan run as usual, without a clock between its
    steps. ``isa`` is an instruction set, or "triton". Measured right before: ``peak_gflops``, what multiply-adds on
    registers alone reach on ``threads`` threads (0 on CUDA), and ``copy_gbytes``, what a copy between two large tensors
    in the GPU's memory reaches, reads and writes (0 on CPU).
    """

    rows: tuple[Row, ...]
    seconds: tuple[float, ...]
    total_seconds: float
    isa: str
    threads: int
    peak_gflops: float
    copy_gbytes: float = 0.0

    def gflops(self, index: int) -> float:
        """Two operations a multiply-add of convolutions and linear layers, a second."""
        return 2e-9 * self.rows[index].macs / self.seconds[index]

    def gbytes(self, index: int) -> float:
        """Inputs, weights and outputs of the step, each counted once, a second; they may come from any cache."""
        return 1e-9 * self.rows[index].bytes / self.seconds[index]

    def __str__(self) -> str:
        peak, copy = self.peak_gflops, self.copy_gbytes
        table = [("step", "operation", "output", "us", "GFLOP/s")]
        table[0] += ("% of peak", "GB/s") if peak else ("GB/s", "% of copy")
        for i, row in enumerate(self.rows):
            speed, width = self.gflops(i), self.gbytes(i)
            flops = f"{speed:.0f}" if row.macs else ""
            shape = "×".join(map(str, row.shape))
            cells = (f"{i} {row.name}", row.operation, shape, f"{1e6 * self.seconds[i]:.1f}", flops)
            share = f"{100 * speed / peak:.0f}" if peak and row.macs else ""
            cells += (share, f"{width:.0f}") if peak else (f"{width:.0f}", f"{100 * width / copy:.0f}")
            table.append(cells)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        longest = max(self.seconds, default=0.0) or 1.0
        lines = []
        for i, cells in enumerate(table):
            sides = [c.ljust(w) if j < 3 else c.rjust(w) for j, (c, w) in enumerate(zip(cells, widths, strict=True))]
            bar = "█" * round(_BAR * self.seconds[i - 1] / longest) if i else ""
            lines.append("  ".join([*sides, bar]).rstrip())
        lines.append(f"{1e3 * self.total_seconds:.2f} ms a call on {self._share()}")
        return "\n".join(lines)

    def _share(self) -> str:
        if not self.peak_gflops:
            moved = 1e-9 * sum(row.bytes for row in self.rows) / self.total_seconds
            return f"the GPU: {moved:.0f} GB/s between steps, of the {self.copy_gbytes:.0f} GB/s that a copy reaches"
        macs = sum(row.macs for row in self.rows)
        share = 2e-9 * macs / (self.total_seconds * self.peak_gflops)
        where = f"{self.threads} thread{'s' * (self.threads != 1)} of {self.isa}"
        return f"{where}: {100 * share:.0f} % of the {self.peak_gflops:.0f} GFLOP/s that its multiply-adds reach"


def measure(plan: Plan, inputs: list[torch.Tensor], isa: str, runs: int) -> Profile:
    threads = torch.get_num_threads()
    plan.engine.run(inputs)
    peak = _C.peak_gflops(isa, threads)
    steps = [plan.engine.profile(inputs) for _ in range(runs)]
    whole = []
    for _ in range(runs):
        start = time.perf_counter()
        plan.engine.run(inputs)
        whole.append(time.perf_counter() - start)
    seconds = tuple(statistics.median(times) for times in zip(*steps, strict=True))
    return Profile(plan.report.rows, seconds, statistics.median(whole), isa, threads, peak)


def measure_cuda(plan: CudaPlan, inputs: list[torch.Tensor], runs: int) -> Profile:
    plan.run(inputs)
    if plan.device.type != "cuda":
        raise NotImplementedError("accelerate: steps are timed on a GPU, got Triton's interpreter")
    with torch.cuda.device(plan.device):
        copy = _copy_gbytes()
        steps = [_step_seconds(plan, inputs) for _ in range(runs)]
        whole = [_event_seconds(lambda: plan.run(inputs)) for _ in range(runs)]
    seconds = tuple(statistics.median(times) for times in zip(*steps, strict=True))
    return Profile(plan.report.rows, seconds, statistics.median(whole), "triton", 1, 0.0, copy)


def _event_seconds(run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _step_seconds(plan: CudaPlan, inputs: list[torch.Tensor]) -> list[float]:
    """Of each step that is a row. The GPU is busy while all of them are queued, and then takes them without a gap."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(plan.report.rows) + 1)]
    torch.cuda._sleep(200_000 * len(events))  # cycles: a tenth of a millisecond a step
    marks = iter(events)
    next(marks).record()
    plan.execute(inputs, after_row=lambda: next(marks).record())
    torch.cuda.synchronize()
    return [1e-3 * a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def _copy_gbytes() -> float:
    source = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = min(_event_seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2e-9 * source.nbytes / seconds
