"""What a few minutes on a GPU can tell: ``python -m benchmarks.gpu_session [--out FOLDER] [--minutes 8]``.

First the tests that need a GPU, then the rows that say most, in the order of their weight; what there is no time for
is said. A failure is a row like any other. Everything is written under the folder as it is found, and a short table is
printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.cases import Setting, find_case
from benchmarks.cases.registry import version
from benchmarks.gauges import ROOT
from benchmarks.peers import CUDA_PEERS
from benchmarks.timing import Result, convert, measure, start

MODEL = "mobilenet_v3_large"
EAGER, MAX_AUTOTUNE = "eager channels_last graph", "torch.compile max-autotune"
OURS = "functional channels_last graph"
DEPTHWISE = (
    "depthwise_conv2d 64x112x112 to 64 k3x3 s1 p1x1",
    "depthwise_conv2d 120x56x56 to 120 k5x5 s1 p2x2",
    "depthwise_conv2d 192x56x56 to 192 k7x7 s1 p3x3",
)
POINTWISE = (
    "pointwise_conv2d 16x112x112 to 64 k1x1 s1 p0x0",
    "pointwise_conv2d 672x14x14 to 112 k1x1 s1 p0x0",
)
# Float32 and contiguous: others have published figures of them.
LARGE = (
    ("depthwise_conv2d 64x512x512 to 64 k3x3 s1 p1x1", 16),
    ("depthwise_conv2d 128x256x512 to 128 k3x3 s1 p1x1", 64),
)


@dataclass(frozen=True)
class Step:
    """Peers on a case. ``limit``: seconds that one of them may take to get ready."""

    suite: str
    case: str
    peers: tuple[str, ...]
    batch: int
    dtype: str = "fp16"
    direction: str = "forward"
    limit: float = 60

    @property
    def setting(self) -> Setting:
        return Setting(self.batch, len(os.sched_getaffinity(0)), "cuda", self.dtype, self.direction)


STEPS = (
    *(Step("models", MODEL, ("accelerate", EAGER), batch, limit=100) for batch in (256, 1, 32)),
    *(Step("layers", case, (OURS, EAGER), 256) for case in DEPTHWISE),
    *(Step("layers", case, ("functional", "eager"), batch, "fp32") for case, batch in LARGE),
    *(Step("layers", case, (OURS, EAGER), 256) for case in POINTWISE),
    *(Step("models", MODEL, ("accelerate", MAX_AUTOTUNE), batch, limit=120) for batch in (256, 1, 32)),
    Step("layers", DEPTHWISE[0], (OURS, EAGER), 256, direction="forward+both"),
    Step("layers", "batch_norm_act 64x112x112 relu", (OURS, EAGER), 256),
    Step("layers", "squeeze_excite 120x28x28 squeeze 32 relu hardsigmoid", (OURS, EAGER), 256),
)


class Clock:
    """The seconds that are left of the session."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def run_tests(name: str, arguments: list[str], seconds: float, out: Path, processes: int | None = None) -> dict:
    """Of one run of pytest: how it ended, its last line, and which tests failed; all it printed goes to a file. By so
    many processes, or one a core, up to twelve.
    """
    log = out / f"tests-{name}.txt"
    # Of a session in the background, children would ignore the signal that ends them.
    start = "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "-v", "-rfE", "-p", "no:cacheprovider", "--maxfail=25"]
    command += ["--continue-on-collection-errors", *arguments]
    processes = processes or min(12, len(os.sched_getaffinity(0)))
    if processes > 1 and version("pytest-xdist"):  # the compiler takes longer than the GPU
        command += ["-n", str(processes), "--dist", "loadgroup"]
    begin = time.monotonic()
    with log.open("w") as file:
        # A session of its own, so that its end is that of its children as well.
        tests = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = str(tests.wait(seconds))
        except subprocess.TimeoutExpired:
            status = f"ended after {seconds:.0f} s"
            tests.send_signal(signal.SIGINT)  # for its summary
            try:
                tests.wait(10)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if tests.poll() is None:
                    os.killpg(tests.pid, signal.SIGKILL)
                    tests.wait()
    lines = log.read_text(errors="replace").splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR "))]
    # Without a summary, what was printed of each test.
    failures = failures or [line for line in lines if re.search(r"::\S.* (FAILED|ERROR)\b|\] (FAILED|ERROR) ", line)]
    summary = next(
        (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error|skipped|deselected)", line)), ""
    )
    seconds = round(time.monotonic() - begin, 1)
    return {"name": name, "status": status, "summary": summary.strip("= !"), "seconds": seconds, "failures": failures}


def start_all(steps: tuple[Step, ...]) -> dict[Step, dict[str, subprocess.Popen]]:
    """Every peer's process at once, as most of their time goes into imports. Ours get ready at once as well: what takes
    long is the compiler; others choose among kernels by timing them, and wait until the device is theirs alone.

    What a step fails by, it says itself.
    """
    started: dict[Step, dict[str, subprocess.Popen]] = {}
    cases = {}
    for step in steps:
        with suppress(Exception):
            cases[step] = find_case(step.suite, step.case)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda case: convert(case, CUDA_PEERS["accelerate"], 1), dict.fromkeys(cases.values())))
    for step, case in cases.items():
        started[step] = {}
        for peer in map(CUDA_PEERS.__getitem__, step.peers):
            with suppress(OSError):
                started[step][peer.name] = start(case, peer, step.setting, at_once=peer.ours)
    return started


def wait_for_answers(started: dict[Step, dict[str, subprocess.Popen]], seconds: float) -> None:
    """Until those that get ready at once are, so that nothing else runs while rows are timed; no longer than that."""
    end = time.monotonic() + seconds
    for processes in started.values():
        for process in processes.values():
            if getattr(process, "asked", False):
                select.select([process.stdout], [], [], max(0, end - time.monotonic()))


def rows_of(
    step: Step, clock: Clock, started: dict[str, subprocess.Popen] | None = None, rounds: int = 3, seconds: float = 0.1
) -> list[Result]:
    """A row a peer, whatever happens."""
    case, peers = None, [CUDA_PEERS[name] for name in step.peers]
    try:
        case = find_case(step.suite, step.case)
        limit = min(step.limit, clock.left() / len(peers))
        if limit < 10:
            raise TimeoutError("no time left")
        return measure(case, peers, step.setting, rounds, seconds, limit, started)
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return [
            Result(step.suite, step.case, peer.name, ours=peer.ours, failed=reason, **asdict(step.setting))
            for peer in peers
        ]
    finally:
        for process in (started or {}).values():
            process.kill()


def table(steps: list[list[Result]]) -> str:
    """A line a row; "times ours" is within a step, whose peers had their turns one after another."""
    heading = ["", "peer", "median ms", "floor / median, %", "GB/s", "times ours", "error", "kernels", "longest kernel"]
    rows, results = [heading], [r for step in steps for r in step]
    mine = {id(r): ours.median_ms for step in steps for ours in step if ours.ours and ours.median_ms for r in step}
    for r in results:
        name = r.case.split(" to ")[0] if r.suite == "layers" else r.case
        kernel_size = re.search(r" k\dx(\d)", r.case)
        name += f" {kernel_size[1]}×{kernel_size[1]}" if kernel_size else ""
        name += f" {r.dtype} batch {r.batch}" + (f" {r.direction}" if r.direction != "forward" else "")
        if r.median_ms is None:
            rows.append([name, r.peer, "failed" if r.failed else "missing", "", "", "", "", "", ""])
            continue
        share = report.number(r.floor_share and 100 * r.floor_share, "{:.0f}")
        speed = report.number(r.mbytes / r.median_ms, "{:.0f}")
        ratio = report.number(r.median_ms / mine[id(r)] if id(r) in mine else None, "{:.2f}")
        error, kernels = report.number(r.error, "{:.1e}"), report.number(r.kernels, "{}")
        rows.append([name, r.peer, f"{r.median_ms:.4g}", share, speed, ratio, error, kernels, (r.kernel or "")[:40]])
    notes = [f"{r.case}, {r.peer}: {r.failed or r.absent}" for r in results if r.failed or r.absent]
    return "\n".join([report.text_table(rows), *dict.fromkeys(notes)])


def save(out: Path, facts: dict, tests: list[dict], results: list[Result]) -> None:
    rows = [r.as_dict() for r in results]
    (out / "session.json").write_text(json.dumps({"conditions": facts, "tests": tests, "results": rows}, indent=1))
    if rows:
        report.write_csv(results, facts, out / "session.csv")


def attempt(call: Callable[[], dict]) -> dict:
    try:
        return call()
    except Exception as failure:
        return {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}


def training(out: Path, seconds: float) -> str:
    """The table of a training step under autocast, by the peers that get ready in seconds."""
    peers = ("eager channels_last", "eager channels_last graph", "replace_layers channels_last")
    command = [sys.executable, "-m", "benchmarks.training", "--device", "cuda", "--case", MODEL, "--rounds", "3"]
    command += ["--peer", *peers, f"{peers[-1]} graph", "--out", str(out / "training.csv")]
    if seconds < 30:
        return "training: no time left"
    # A session of its own, so that its end is that of its children as well.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"training: no answer after {seconds:.0f} s"
    return printed or f"training: {(errors.strip().splitlines() or [f'status {process.returncode}'])[-1]}"


def session(
    out: Path, seconds: float, steps: tuple[Step, ...] = STEPS, with_tests: bool = True, with_training: bool = True
) -> Iterator[str]:
    """Does it all, and gives lines to print."""
    clock = Clock(seconds)
    out.mkdir(parents=True, exist_ok=True)
    facts = attempt(lambda: report.conditions("cuda"))
    if "failed" in facts:
        facts = {"no_conditions": facts["failed"]}
    tests, results = [], []
    started = start_all(steps)
    # First what nothing but a GPU can run; then what the interpreter has run as well.
    for name, arguments, share in (
        ("gpu", ["-m", "gpu_alone"], 0.2),
        ("triton", ["-m", "gpu and not gpu_alone"], 0.15),
    ):
        if not with_tests:
            break
        tests.append(attempt(lambda n=name, a=arguments, s=share: run_tests(n, a, s * seconds, out)) | {"name": name})
        save(out, facts, tests, results)
        yield f"{name} tests: {tests[-1]}"
    wait_for_answers(started, min(120, clock.left() / 2))
    for step in steps:
        rows = rows_of(step, clock, started.get(step, {}))
        results.append(rows)
        save(out, facts, tests, [r for rows in results for r in rows])
        yield report.results_table(rows)
    if with_training:
        yield training(out, clock.left())
    yield report.machine(facts) if "gpu" in facts else f"of the machine: {facts['no_conditions']}"
    for test in tests:
        outcome = test.get("summary") or test.get("failed") or f"status {test['status']}"
        yield f"{test['name']} tests: {outcome}" + (f" ({test['status']})" if test.get("status", "0") != "0" else "")
        yield from test.get("failures", [])[:10]
    yield table(results)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu_session", description=__doc__.splitlines()[0])
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu_session")
    parser.add_argument("--out", type=Path, default=folder, help="folder, by default $OUT or benchmarks/results")
    parser.add_argument("--minutes", type=float, default=7.5, help="in all (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only cases or peers whose name contains a word")
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args(arguments)

    def wanted(step: Step) -> bool:
        return not options.only or any(word in " ".join([step.case, *step.peers]) for word in options.only)

    from benchmarks.__main__ import has_gpu

    if not has_gpu():
        sys.exit("benchmarks: gpu_session needs a GPU, torch sees none")
    steps = tuple(filter(wanted, STEPS))
    trains = not options.only or any(word in "training" for word in options.only)
    for line in session(options.out, 60 * options.minutes, steps, not options.skip_tests, trains):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
