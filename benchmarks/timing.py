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
    ours: bool = False
    gmacs: float | None = None
    mbytes: float | None = None  # layer by layer: inputs, weights and outputs of convolutions and linear layers
    peak_gflops: float | None = None  # of all threads together, the largest around this case's rounds
    peak_low_gflops: float | None = None  # the smallest: far below, others used the machine
    peak_share: float | None = None  # 2 · MACs / (time · peak)
    # A cache line from one thread to another and back: the quickest and the slowest between this case's rounds. Where
    # all are several times the usual, the system has put the threads where they share no cache.
    trip_low_ns: float | None = None
    trip_ns: float | None = None
    # Growth of the process's resident memory while the peer took the model, and by its first call.
    prepare_mib: float | None = None
    first_call_mib: float | None = None
    copy_share: float | None = None  # time of a copy of the input / time
    absent: str | None = None  # why there is no figure although nothing went wrong
    failed: str | None = None

    as_dict = asdict

    @property
    def gflops(self) -> float:
        return 2 * self.gmacs / (self.median_ms / 1e3)


def environment(threads: int) -> dict[str, str]:
    return dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))


def verbose() -> bool:
    return bool(os.environ.get("BENCHMARKS_VERBOSE"))


def convert(case: Case, peer: Peer, batch: int) -> str | None:
    """Makes the files that the peer needs and lacks; returns what went wrong."""
    wanted = [folder / "problem.pt"] if (folder := case.folder(batch)) else []
    if conversion := peer.conversion(case, batch):
        wanted.append(conversion)
    if all(path.exists() for path in wanted):
        return None
    print(f"  converting {case.name} for {peer.name}, which takes up to a minute, once", file=sys.stderr)
    arguments = [case.suite, case.name, str(batch), peer.name]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.convert", *arguments], cwd=ROOT, capture_output=not verbose(), text=True
    )
    if not done.returncode:
        return None
    lines = (done.stderr or "").strip().splitlines() or [f"status {done.returncode}"]
    return f"conversion: {lines[-1]}"


class Worker:
    def __init__(self, case: Case, peer: Peer, threads: int, batch: int):
        self.peer = peer
        arguments = [case.suite, case.name, peer.name, str(threads), str(batch)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose() else subprocess.DEVNULL,
            text=True,
            env=environment(threads),
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


def ceilings(threads: int) -> dict[str, float]:
    return {what: peak(what, threads, 0.5) for what in ("l2", "memory")}


def measure(case: Case, peers: list[Peer], threads: int, batch: int, rounds: int, seconds: float) -> list[Result]:
    workers, results, times = [], {}, {}
    try:
        for peer in peers:
            result = results[peer.name] = Result(case.suite, case.name, peer.name, threads, batch, ours=peer.ours)
            if missing := peer.missing():
                result.absent = f"not installed: {', '.join(missing)}"
                continue
            print(f"  preparing {peer.name}", file=sys.stderr)
            if failure := convert(case, peer, batch):
                result.failed = failure
                continue
            worker = Worker(case, peer, threads, batch)
            workers.append(worker)
            facts = worker.facts
            result.failed, result.absent, result.error = map(facts.get, ("failed", "absent", "error"))
            result.prepare_mib, result.first_call_mib = facts.get("prepare_mib"), facts.get("first_call_mib")
            if "macs" in facts:
                result.gmacs, result.mbytes = facts["macs"] / 1e9, facts["bytes"] / 1e6
        ready = [worker for worker in workers if "macs" in worker.facts]
        peaks, trips = [peak("fma", threads)], []
        for turn in range(rounds):
            print(f"\r  round {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
            first = turn % max(len(ready), 1)  # nobody always follows the same one
            for worker in ready[first:] + ready[:first]:
                times.setdefault(worker.peer.name, []).extend(worker.round(seconds))
                time.sleep(0.01)  # the idle threads of one peer's OpenMP spin for a while after its last region
            if threads > 1:
                trips.append(peak("trip", 2, 0.02))
            peaks.append(peak("fma", threads))
        print(file=sys.stderr)
    finally:
        for worker in workers:
            worker.close()
    for name, result in results.items():
        if name in times:
            sample = times[name]
            quartiles = statistics.quantiles(sample, n=4) if len(sample) > 1 else sample * 3
            result.q1_ms, result.median_ms, result.q3_ms = quartiles
            result.calls = len(sample)
            result.peak_gflops, result.peak_low_gflops = max(peaks), min(peaks)
            if trips:
                result.trip_low_ns, result.trip_ns = min(trips), max(trips)
            if result.error is not None and result.gmacs:
                result.peak_share = result.gflops / result.peak_gflops
            if "copy" in times:
                result.copy_share = statistics.median(times["copy"]) / result.median_ms
    return list(results.values())
