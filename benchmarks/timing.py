"""Runs the peers of a case in turn, a process each, so that a change in the machine's speed meets all of them alike."""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.peers import Peer

ROOT = Path(__file__).parents[1]


@dataclass
class Result:
    suite: str
    case: str
    peer: str
    threads: int
    batch: int
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    calls: int = 0
    error: float | None = None  # largest difference from float64, as a share of the largest output
    gmacs: float | None = None
    peak_gflops: float | None = None  # of all threads together, around this case's rounds
    peak_share: float | None = None  # 2 · MACs / (time · peak)
    copy_share: float | None = None  # time of a copy of the input / time
    failed: str | None = None

    as_dict = asdict


class Worker:
    def __init__(self, case: Case, peer: Peer, threads: int, batch: int):
        self.peer = peer
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        arguments = [case.suite, case.name, peer.name, str(threads), str(batch)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCHMARKS_VERBOSE") else subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.facts = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": f"its process ended with status {self.process.wait()}"}

    def round(self, seconds: float) -> list[float]:
        print(json.dumps({"seconds": seconds}), file=self.process.stdin, flush=True)
        answer = self.answer()
        if "failed" in answer:
            raise RuntimeError(f"{self.peer.name}: {answer['failed']}")
        return answer["times_ms"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@cache
def peak_program() -> str:
    source, program = ROOT / "benchmarks" / "peak.cpp", ROOT / "build" / "peak"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        program.parent.mkdir(exist_ok=True)
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, "-O3", "-march=native", "-fopenmp", str(source), "-o", str(program)], check=True)
    return str(program)


def peak_gflops(threads: int) -> float:
    return float(subprocess.run([peak_program(), str(threads), "0.1"], check=True, capture_output=True).stdout)


def measure(case: Case, peers: list[Peer], threads: int, batch: int, rounds: int, seconds: float) -> list[Result]:
    workers, results, times = [], {}, {}
    try:
        for peer in peers:
            result = results[peer.name] = Result(case.suite, case.name, peer.name, threads, batch)
            print(f"{case.name}, {threads} thread(s): preparing {peer.name}", file=sys.stderr)
            worker = Worker(case, peer, threads, batch)
            workers.append(worker)
            result.failed, result.error = worker.facts.get("failed"), worker.facts.get("error")
            result.gmacs = worker.facts["macs"] / 1e9 if "macs" in worker.facts else None
        ready = [worker for worker in workers if "failed" not in worker.facts]
        peaks = [peak_gflops(threads)]
        for _ in range(rounds):
            for worker in ready:
                times.setdefault(worker.peer.name, []).extend(worker.round(seconds))
                time.sleep(0.01)  # the idle threads of one peer's OpenMP spin for a while after its last region
            peaks.append(peak_gflops(threads))
    finally:
        for worker in workers:
            worker.close()
    for name, result in results.items():
        if name in times:
            sample = times[name]
            quartiles = statistics.quantiles(sample, n=4) if len(sample) > 1 else sample * 3
            result.q1_ms, result.median_ms, result.q3_ms = quartiles
            result.calls = len(sample)
            result.peak_gflops = max(peaks)
            if result.error is not None and result.gmacs:
                result.peak_share = 2 * result.gmacs / (result.median_ms / 1e3 * result.peak_gflops)
            if "copy" in times:
                result.copy_share = statistics.median(times["copy"]) / result.median_ms
    return list(results.values())
