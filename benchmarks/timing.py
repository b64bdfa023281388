"""Runs the peers of a case in turn, a process each, so that a change in the machine's speed meets all of them alike."""

import json
import select
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from benchmarks.cases import Case, Setting
from benchmarks.gauges import ROOT, environment, gauge_of, verbose
from benchmarks.peers import Peer


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
    device: str = "cpu"
    dtype: str = "fp32"
    direction: str = "forward"
    # Of a GPU. What the memory holds together was timed in turns: the number of that group.
    group: int | None = None
    tf32: bool | None = None  # whether float32 convolutions may use it
    memory_mib: float | None = None  # what PyTorch holds for this peer: inputs, weights, CUDA graphs
    kernel: str | None = None  # which took the longest of a call's, all with its name together
    kernel_us: float | None = None
    kernels: int | None = None  # of a call
    kernels_us: float | None = None  # of all, one after another
    copy_gbytes: float | None = None  # a second, reads and writes, measured around this case's rounds
    floor_ms: float | None = None  # the larger of bytes / copy bandwidth and operations / matrix peak
    floor_share: float | None = None  # floor / median

    as_dict = asdict

    @classmethod
    def of(cls, case: Case, peer: Peer, setting: Setting) -> "Result":
        return cls(case.suite, case.name, peer.name, ours=peer.ours, **asdict(setting))

    @property
    def setting(self) -> Setting:
        return Setting(self.batch, self.threads, self.device, self.dtype, self.direction)

    @property
    def gflops(self) -> float:
        return 2 * self.gmacs / (self.median_ms / 1e3)


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


def start(case: Case, peer: Peer, setting: Setting, at_once: bool = False) -> subprocess.Popen:
    """A peer's process, which imports what it needs and waits to be asked to get ready, or does so ``at_once``."""
    arguments = [case.suite, case.name, peer.name, json.dumps(asdict(setting))]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if verbose() else subprocess.DEVNULL,
        text=True,
        env=environment(setting.threads),
        cwd=ROOT,
    )
    process.asked = at_once
    if at_once:
        with suppress(BrokenPipeError):  # it has ended, which its answer will say
            print(json.dumps({"prepare": True}), file=process.stdin, flush=True)
    return process


class Worker:
    """A peer that gets ready in a process of its own, which may have been started before.

    ``limit``: after how many seconds without an answer it is ended; None waits for ever.
    """

    def __init__(
        self,
        case: Case,
        peer: Peer,
        setting: Setting,
        limit: float | None = None,
        process: subprocess.Popen | None = None,
    ):
        self.peer, self.limit = peer, limit
        self.process = process or start(case, peer, setting)
        self.facts = self.answer() if self.process.asked else self.ask(prepare=True)

    def answer(self) -> dict:
        # It answers line by line, so that none can be left in the buffer of what is waited for.
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            self.process.kill()
            return {"failed": f"no answer after {self.limit:g} s"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": f"its process ended with status {self.process.wait()}"}

    def ask(self, **what) -> dict:
        try:
            print(json.dumps(what), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return {"failed": f"its process ended with status {self.process.wait()}"}
        return self.answer()

    def close(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()


# Of a device's memory, what is to stay free beside the processes of a group.
SPARE = 0.1


def prepare(case: Case, peers: list[Peer], setting: Setting, limit, results: dict[str, Result], started: dict):
    """Workers of as many of the peers as the device's memory holds together, and the peers that are left."""
    ready: list[Worker] = []
    largest = 0.0
    for i, peer in enumerate(peers):
        result = results[peer.name] = Result.of(case, peer, setting)
        if missing := peer.missing():
            result.absent = f"not installed: {', '.join(missing)}"
            continue
        print(f"  preparing {peer.name}", file=sys.stderr)
        # On a GPU all start from the weights of batch 1.
        if failure := convert(case, peer, setting.batch if setting.device == "cpu" else 1):
            result.failed = failure
            continue
        worker = Worker(case, peer, setting, limit, *([started.pop(peer.name)] if peer.name in started else []))
        facts = worker.facts
        if facts.get("out_of_memory") and ready:
            worker.close()
            return ready, peers[i:]
        result.failed, result.absent, result.error = map(facts.get, ("failed", "absent", "error"))
        result.prepare_mib, result.first_call_mib = facts.get("prepare_mib"), facts.get("first_call_mib")
        if "macs" not in facts:
            worker.close()
            continue
        ready.append(worker)
        result.gmacs, result.mbytes = facts["macs"] / 1e9, facts["bytes"] / 1e6
        if setting.device == "cuda":
            result.memory_mib = facts["held_mib"]
            result.tf32 = facts["tf32"] if setting.dtype == "fp32" else None
            largest = max(largest, facts["peak_mib"])
            if facts["free_mib"] < largest + SPARE * facts["total_mib"]:
                return ready, peers[i + 1 :]
    return ready, []


def measure(
    case: Case,
    peers: list[Peer],
    setting: Setting,
    rounds: int,
    seconds: float,
    limit: float | None = None,
    started: dict[str, subprocess.Popen] | None = None,
) -> list[Result]:
    """A row a peer. ``seconds`` are those of a turn, ``limit`` those that a peer may take until it is ready.

    ``started``: processes of peers that wait to be asked, by the peers' names; those that are used are taken out.
    """
    results: dict[str, Result] = {}
    gauge = gauge_of(setting)
    left, group = list(peers), 0
    while left:
        ready, left = prepare(case, left, setting, limit, results, {} if started is None else started)
        if not ready:
            continue
        group += 1
        times: dict[str, list[float]] = {}
        try:
            gauge.read(peak_only=True)
            for turn in range(rounds):
                print(f"\r  round {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
                first = turn % max(len(ready), 1)  # nobody always follows the same one
                for worker in ready[first:] + ready[:first]:
                    result = results[worker.peer.name]
                    if result.failed:
                        continue
                    answer = worker.ask(seconds=seconds)
                    result.failed = answer.get("failed")
                    times.setdefault(worker.peer.name, []).extend(answer.get("times_ms", []))
                    time.sleep(0.01)  # the idle threads of one peer's OpenMP spin for a while after its last region
                gauge.read()
            print(file=sys.stderr)
            if setting.device == "cuda":
                for worker in ready:
                    result = results[worker.peer.name]
                    result.group = group
                    if not result.failed:
                        answer = worker.ask(kernels=True)
                        answer.pop("failed", None)  # the times stand without the names
                        vars(result).update(answer)
        finally:
            for worker in ready:
                worker.close()
        for name, sample in times.items():
            if sample and not results[name].failed:
                fill(results[name], sample, times.get("copy"))
                gauge.fill(results[name])
    return list(results.values())


def fill(result: Result, sample: list[float], copies: list[float] | None):
    quartiles = statistics.quantiles(sample, n=4) if len(sample) > 1 else sample * 3
    result.q1_ms, result.median_ms, result.q3_ms = quartiles
    result.calls = len(sample)
    if copies:
        result.copy_share = statistics.median(copies) / result.median_ms
