"""Where the time of an accelerated model goes: see :meth:`AcceleratedModule.profile`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from .. import _C
from .plan import Plan, Row

_BAR = 24


@dataclass(frozen=True)
class Profile:
    """Median times of a plan's steps, each from barrier to barrier. ``str(profile)`` is a table with a bar chart.

    ``rows`` and ``seconds`` are in the order of the steps; ``total_seconds`` is the median time of the whole plan run
    as usual, without a clock between its steps. ``peak_gflops`` is what multiply-adds on registers alone reached, on
    ``threads`` threads of ``isa``, right before.
    """

    rows: tuple[Row, ...]
    seconds: tuple[float, ...]
    total_seconds: float
    isa: str
    threads: int
    peak_gflops: float

    def gflops(self, index: int) -> float:
        """Two operations a multiply-add of convolutions and linear layers, a second."""
        return 2e-9 * self.rows[index].macs / self.seconds[index]

    def gbytes(self, index: int) -> float:
        """Inputs, weights and outputs of the step, each counted once, a second; they may come from any cache."""
        return 1e-9 * self.rows[index].bytes / self.seconds[index]

    def __str__(self) -> str:
        table = [("step", "operation", "output", "us", "GFLOP/s", "% of peak", "GB/s")]
        for i, row in enumerate(self.rows):
            speed = self.gflops(i)
            computes = (f"{speed:.0f}", f"{100 * speed / self.peak_gflops:.0f}") if row.macs else ("", "")
            shape = "×".join(map(str, row.shape))
            table.append(
                (f"{i} {row.name}", row.operation, shape, f"{1e6 * self.seconds[i]:.1f}", *computes)
                + (f"{self.gbytes(i):.0f}",)
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        longest = max(self.seconds, default=0.0) or 1.0
        lines = []
        for i, cells in enumerate(table):
            sides = [c.ljust(w) if j < 3 else c.rjust(w) for j, (c, w) in enumerate(zip(cells, widths, strict=True))]
            bar = "█" * round(_BAR * self.seconds[i - 1] / longest) if i else ""
            lines.append("  ".join([*sides, bar]).rstrip())
        macs = sum(row.macs for row in self.rows)
        share = 2e-9 * macs / (self.total_seconds * self.peak_gflops)
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        lines.append(
            f"{1e3 * self.total_seconds:.2f} ms a call on {threads} of {self.isa}: {100 * share:.0f} % of the "
            f"{self.peak_gflops:.0f} GFLOP/s that its multiply-adds reach"
        )
        return "\n".join(lines)


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
