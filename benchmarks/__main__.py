"""``python -m benchmarks [models|operators|demo]``: see --help."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.peers import PEERS
from benchmarks.timing import ROOT, measure
from mobilenet_fast.cli import command_line, positive, thread_count


def selected(names, wanted, what):
    """The names that contain one of the wanted words; all of them without words."""
    chosen = [name for name in names if not wanted or any(word in name for word in wanted)]
    if not chosen:
        sys.exit(f"benchmarks: no {what} matches {', '.join(wanted)}; there are: {', '.join(names)}")
    return chosen


def parse(arguments):
    parser = argparse.ArgumentParser("benchmarks", description="Times this package against others on the CPU.")
    parser.add_argument("suite", nargs="?", default="models", choices=["models", "operators", "demo"])
    parser.add_argument("--case", nargs="+", metavar="WORD", help="only cases whose name contains a word")
    parser.add_argument("--peer", nargs="+", metavar="WORD", help="only peers whose name contains a word")
    counts = sorted({1, len(os.sched_getaffinity(0))})
    parser.add_argument("--threads", nargs="+", type=thread_count, default=counts, help="default: 1 and all")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1])
    parser.add_argument("--rounds", type=int, default=15, help="how many times each peer has its turn (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a turn (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for JSON and CSV")
    parser.add_argument("--list", action="store_true", help="list cases and peers")
    options = parser.parse_args(arguments)
    for name in ("case", "peer", "batch", "out"):
        if options.suite == "demo" and vars(options)[name] != parser.get_default(name):
            parser.error(f"demo takes no --{name}")
    return options


@command_line
def main(arguments=None):
    options = parse(arguments)
    cases = selected([name for suite, name in CASES if suite == options.suite], options.case, "case")
    peers = [PEERS[name] for name in selected([*PEERS], options.peer, "peer") if options.suite in PEERS[name].suites]
    if options.list:
        lines = [p.name if p.available() else f"{p.name} (needs {p.needs})" for p in peers]
        print("cases:", *cases, "peers:", *lines, sep="\n  ")
        return 0
    if options.suite == "demo":
        from benchmarks import demo

        return demo.main(options)
    for absent in (p for p in peers if not p.available()):
        print(f"left out: {absent.name} (needs {absent.needs})", file=sys.stderr)
    peers = [p for p in peers if p.available()]

    results = []
    for name in cases:
        for threads in options.threads:
            for batch in options.batch:
                rows = measure(CASES[options.suite, name], peers, threads, batch, options.rounds, options.seconds)
                print(report.results_table(rows), flush=True)
                results += rows
    facts = report.conditions()
    print(f"{facts['cpu']} · {facts['isa']} · torch {facts['versions']['torch']} · commit {facts['commit']}")
    print("written:", *report.save(results, options.out))
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    sys.exit(main())
