"""``python -m benchmarks [models|layers|operators|demo|zoo] [--device cuda]``, or train …: see --help."""

import argparse
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks import report
from benchmarks.cases import DIRECTIONS, DTYPES, SUITES, Setting, cases_of
from benchmarks.gauges import ROOT, ceilings
from benchmarks.peers import peers_of
from benchmarks.timing import measure
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


# The same of the Triton kernels, on the GPU.
CUDA_TESTS = ("test_triton_kernels.py",)
# Of networks; of a layer alone one batch says enough.
CUDA_BATCHES = {"models": [1, 32, 256], "layers": [32], "operators": [32]}
# Modules with a command line of their own: a network on real pictures, predicted against measured latencies, searches,
# networks made narrower, the papers' claims.
OWN_OPTIONS = ("train", "latency", "search", "netadapt", "ablations")


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
    parser = argparse.ArgumentParser(
        "benchmarks",
        description="Times this package against others.",
        epilog=f"{' and '.join(OWN_OPTIONS)} have options of their own: benchmarks train --help",
    )
    parser.add_argument("suite", nargs="?", default="models", choices=(*SUITES, *OWN_OPTIONS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument(
        "--case", "--only", nargs="+", metavar="WORD", help="only cases whose name, or a layer's model, has a word"
    )
    parser.add_argument("--peer", nargs="+", metavar="WORD", help="only peers whose name contains a word")
    counts = sorted({1, len(os.sched_getaffinity(0))})
    parser.add_argument(
        "--threads", nargs="+", type=thread_count, help="default: 1 and all; for zoo, which takes one, all"
    )
    parser.add_argument(
        "--batch", nargs="+", type=positive, help="default: 1; with --device cuda 1 32 256 for models, 32 for layers"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="cuda: default fp16 bf16 fp32 for models, fp16 for others"
    )
    parser.add_argument(
        "--direction", nargs="+", choices=DIRECTIONS, help="cuda: with which gradients; default all that a case has"
    )
    parser.add_argument(
        "--rounds", type=positive, default=15, help="how many times each peer has its turn (%(default)s)"
    )
    parser.add_argument("--seconds", type=duration, default=0.2, help="length of a turn (%(default)s)")
    parser.add_argument("--limit", type=duration, help="seconds that a peer may take until it is ready; default none")
    parser.add_argument(
        "--out", type=Path, help="folder for JSON, CSV, PNG, benchmarks/results; zoo's file, docs/models.md"
    )
    parser.add_argument("--skip-tests", action="store_true", help="measure without running the kernels' tests first")
    parser.add_argument("--skip-latency", action="store_true", help="zoo: counts, parity and kernels alone")
    parser.add_argument("--list", action="store_true", help="list cases and peers")
    options = parser.parse_args(arguments)
    if options.suite in OWN_OPTIONS:
        parser.error(f"{options.suite} comes first: benchmarks {options.suite}, then its own options")

    def refuse(who, names):
        for name in names:
            if vars(options)[name] != parser.get_default(name):
                parser.error(f"{who} takes no --{name.replace('_', '-')}")

    others = {
        "demo": ("device", "case", "peer", "batch", "limit", "out", "skip_latency"),
        "zoo": ("device", "batch", "limit"),
    }
    refuse(options.suite, others.get(options.suite, ("skip_latency",)))
    refuse(f"--device {options.device}", ("threads",) if options.device == "cuda" else ("dtype", "direction"))
    if options.suite == "zoo":
        options.threads = options.threads or counts[-1:]
        options.out = options.out or ROOT / "docs" / "models.md"
        if len(options.threads) > 1:
            parser.error("zoo takes one number of --threads")
    if options.device == "cuda":
        options.threads = counts[-1:]  # of the host, which only starts kernels
        options.batch = options.batch or CUDA_BATCHES[options.suite]
        options.dtype = options.dtype or (["fp16", "bf16", "fp32"] if options.suite == "models" else ["fp16"])
        options.direction = options.direction or list(DIRECTIONS)
    options.threads = options.threads or counts
    options.batch = options.batch or [1]
    options.out = options.out or ROOT / "benchmarks" / "results"
    return options


def runs_of(options, cases):
    """Each case under each setting that was asked for and that it has."""
    if options.device == "cpu":
        settings = [Setting(batch, threads) for threads in options.threads for batch in options.batch]
        return [(case, setting) for setting in settings for case in cases]
    return [
        (case, Setting(batch, options.threads[0], "cuda", dtype, direction))
        for case in cases
        for dtype in case.dtypes or options.dtype
        for batch in case.batches or options.batch
        for direction in case.directions
        if direction in options.direction
    ]


def kernels_pass(device="cpu") -> bool:
    print("testing the kernels, a minute or two (--skip-tests) …", file=sys.stderr)
    tests = CUDA_TESTS if device == "cuda" else TESTS
    command = [sys.executable, "-m", "pytest", "-qx", *(f"tests/{test}" for test in tests)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        print(run.stdout, "benchmarks: no figures while a test is red", sep="\n", file=sys.stderr)
    return run.returncode == 0


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@command_line
def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in OWN_OPTIONS:
        return import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    options = parse(arguments)
    cases = {case.name: case for case in cases_of(options.suite, options.device)}
    searched = {name: " ".join([name, *case.models]) for name, case in cases.items()}
    cases = [cases[name] for name in selected(searched, options.case, "case")]
    known = peers_of(options.device)
    suite_peers = {peer.name: peer.name for peer in known.values() if options.suite in peer.suites}
    peers = [known[name] for name in selected(suite_peers, options.peer, "peer")]
    if options.list:
        lines = [f"{p.name} (not installed: {', '.join(p.missing())})" if p.missing() else p.name for p in peers]
        print("cases:", *(case.name for case in cases), "peers:", *lines, sep="\n  ")
        return 0
    if options.device == "cuda" and not has_gpu():
        sys.exit("benchmarks: --device cuda needs a GPU, torch sees none")
    if options.suite == "demo":
        from benchmarks import demo

        return demo.main(options)
    if not (options.skip_tests or options.skip_latency or kernels_pass(options.device)):
        return 1
    if options.suite == "zoo":
        from benchmarks import zoo

        return zoo.main(options, cases, peers)

    results, start = [], time.monotonic()
    runs = runs_of(options, cases)
    if not runs:
        sys.exit(f"benchmarks: no case has direction {' or '.join(options.direction)}")
    for i, (case, setting) in enumerate(runs):
        minutes = (time.monotonic() - start) / 60
        place = f"[{i + 1}/{len(runs)}, {minutes:.0f} min]"
        print(f"{place} {case.name}, {setting.label.replace(' · ', ', ')}", file=sys.stderr)
        rows = measure(case, peers, setting, options.rounds, options.seconds, options.limit)
        print(report.results_table(rows), flush=True)
        results += rows
    if len(runs) > 1:
        print(report.summary(results))
    limits = report.limits(results) if options.device == "cuda" else {n: ceilings(n) for n in options.threads}
    facts = report.conditions(options.device)
    print(f"{report.machine(facts)} · torch {facts['versions']['torch']} · commit {facts['commit']}")
    print("written:", *report.save(results, limits, options.out, facts))
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    sys.exit(main())
