"""``python -m benchmarks [models|layers|operators|demo|zoo]``: see --help."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.cases import SUITES, cases_of
from benchmarks.peers import PEERS
from benchmarks.timing import ROOT, ceilings, measure
from mobilenet_fast.cli import command_line, positive, thread_count

# Every operation and step on every instruction set, in a minute or two.
TESTS = (
    "test_activation.py",
    "test_batch_norm_act.py",
    "test_squeeze_excite.py",
    "test_depthwise_conv2d.py::test_layers_of_real_networks",
    "test_depthwise_conv2d.py::test_every_tap_counts",
    "test_pointwise_conv2d.py::test_layers_of_real_networks",
    "test_pointwise_conv2d.py::test_every_weight_counts",
    "test_accelerate_steps.py",
    "test_accelerate_blocks.py",
)


def selected(names, wanted, what):
    """Those that contain one of the wanted words in what is searched; all of them without words.

    ``names`` says for each name where to search.
    """
    chosen = [name for name, searched in names.items() if not wanted or any(word in searched for word in wanted)]
    if not chosen:
        sys.exit(f"benchmarks: no {what} matches {', '.join(wanted)}; there are: {', '.join(names)}")
    return chosen


def duration(text):
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text}")
    return value


def parse(arguments):
    parser = argparse.ArgumentParser("benchmarks", description="Times this package against others on the CPU.")
    parser.add_argument("suite", nargs="?", default="models", choices=SUITES)
    parser.add_argument(
        "--case", "--only", nargs="+", metavar="WORD", help="only cases whose name, or a layer's model, has a word"
    )
    parser.add_argument("--peer", nargs="+", metavar="WORD", help="only peers whose name contains a word")
    counts = sorted({1, len(os.sched_getaffinity(0))})
    parser.add_argument(
        "--threads", nargs="+", type=thread_count, help="default: 1 and all; for zoo, which takes one, all"
    )
    parser.add_argument("--batch", nargs="+", type=positive, default=[1])
    parser.add_argument(
        "--rounds", type=positive, default=15, help="how many times each peer has its turn (%(default)s)"
    )
    parser.add_argument("--seconds", type=duration, default=0.2, help="length of a turn (%(default)s)")
    parser.add_argument(
        "--out", type=Path, help="folder for JSON, CSV, PNG, benchmarks/results; zoo's file, docs/models.md"
    )
    parser.add_argument("--skip-tests", action="store_true", help="measure without running the kernels' tests first")
    parser.add_argument("--skip-latency", action="store_true", help="zoo: counts, parity and kernels alone")
    parser.add_argument("--list", action="store_true", help="list cases and peers")
    options = parser.parse_args(arguments)
    others = {"demo": ("case", "peer", "batch", "out", "skip_latency"), "zoo": ("batch",)}
    for name in others.get(options.suite, ("skip_latency",)):
        if vars(options)[name] != parser.get_default(name):
            parser.error(f"{options.suite} takes no --{name.replace('_', '-')}")
    if options.suite == "zoo":
        options.threads = options.threads or counts[-1:]
        options.out = options.out or ROOT / "docs" / "models.md"
        if len(options.threads) > 1:
            parser.error("zoo takes one number of --threads")
    options.threads = options.threads or counts
    options.out = options.out or ROOT / "benchmarks" / "results"
    return options


def kernels_pass() -> bool:
    print("testing the kernels, a minute or two (--skip-tests) …", file=sys.stderr)
    command = [sys.executable, "-m", "pytest", "-qx", *(f"tests/{test}" for test in TESTS)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        print(run.stdout, "benchmarks: no figures while a test is red", sep="\n", file=sys.stderr)
    return run.returncode == 0


@command_line
def main(arguments=None):
    options = parse(arguments)
    cases = {case.name: case for case in cases_of(options.suite)}
    searched = {name: " ".join([name, *case.models]) for name, case in cases.items()}
    cases = [cases[name] for name in selected(searched, options.case, "case")]
    suite_peers = {peer.name: peer.name for peer in PEERS.values() if options.suite in peer.suites}
    peers = [PEERS[name] for name in selected(suite_peers, options.peer, "peer")]
    if options.list:
        lines = [f"{p.name} (not installed: {', '.join(p.missing())})" if p.missing() else p.name for p in peers]
        print("cases:", *(case.name for case in cases), "peers:", *lines, sep="\n  ")
        return 0
    if options.suite == "demo":
        from benchmarks import demo

        return demo.main(options)
    if not (options.skip_tests or options.skip_latency or kernels_pass()):
        return 1
    if options.suite == "zoo":
        from benchmarks import zoo

        return zoo.main(options, cases, peers)

    results, start = [], time.monotonic()
    runs = [(case, threads, batch) for threads in options.threads for batch in options.batch for case in cases]
    for i, (case, threads, batch) in enumerate(runs):
        minutes = (time.monotonic() - start) / 60
        place = f"[{i + 1}/{len(runs)}, {minutes:.0f} min]"
        print(f"{place} {case.name}, {threads} thread(s), batch {batch}", file=sys.stderr)
        rows = measure(case, peers, threads, batch, options.rounds, options.seconds)
        print(report.results_table(rows), flush=True)
        results += rows
    if len(runs) > 1:
        print(report.summary(results))
    facts = report.conditions()
    print(f"{facts['cpu']} · {facts['isa']} · torch {facts['versions']['torch']} · commit {facts['commit']}")
    print("written:", *report.save(results, {threads: ceilings(threads) for threads in options.threads}, options.out))
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    sys.exit(main())
