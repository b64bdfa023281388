"""The tables of docs/models.md: what each model costs, how right and how fast it is, and what runs in our kernels.

``python -m benchmarks zoo`` examines each in a process of its own, ``python -m benchmarks.zoo NAME``, which prints a
line of JSON.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cases import Case, Setting, find_case
from benchmarks.cases.zoo import ZOO, Part
from benchmarks.gauges import ROOT, environment, verbose
from benchmarks.peers import Peer
from benchmarks.timing import Result, measure

# Millions of parameters and of multiply-accumulates, as the papers state them; EfficientNet-Lite's are its authors'.
PAPERS = {
    "mobilenet_v1": ("4.2", "569"),
    "mobilenet_v2": ("3.4", "300"),
    "mobilenet_v3_large": ("5.4", "219"),
    "mobilenet_v3_small": ("2.5", "56"),
    "mnasnet_a1": ("3.9", "312"),
    "efficientnet_b0": ("5.3", "390"),
    "efficientnet_b1": ("7.8", "700"),
    "efficientnet_b2": ("9.2", "1,000"),
    "efficientnet_b3": ("12", "1,800"),
    "efficientnet_b4": ("19", "4,200"),
    "efficientnet_b5": ("30", "9,900"),
    "efficientnet_b6": ("43", "19,000"),
    "efficientnet_b7": ("66", "37,000"),
    "efficientnet_lite0": ("4.7", "407"),
    "efficientnet_lite1": ("5.4", "631"),
    "efficientnet_lite2": ("6.1", "899"),
    "efficientnet_lite3": ("8.2", "1,440"),
    "efficientnet_lite4": ("13.0", "2,640"),
    "googlenet": ("7.0", "1,502"),
    "inception_v3": ("< 25", "5,000"),
    "xception": ("22.86", ""),
}


@dataclass
class Row:
    """What was found out about a model; ``failed`` says why the rest is missing."""

    name: str
    parameters: int | None = None
    macs: int | None = None
    reference: list[int] | None = None  # parameters and multiply-accumulates of what ours is a copy of
    error: float | None = None  # largest difference from float64, as a share of the largest output
    eager_error: float | None = None
    allowed: float | None = None
    share: float | None = None  # of the multiply-accumulates, those of steps with a kernel of ours
    steps: int | None = None
    native: int | None = None  # steps with a kernel of ours
    fallbacks: dict[str, int] = field(default_factory=dict)  # operation and reason → steps
    failed: str | None = None

    @property
    def is_right(self) -> bool:
        counts = self.reference in (None, [self.parameters, self.macs])
        return self.failed is None and counts and (self.error is None or self.error <= self.allowed)


@torch.no_grad()
def examine(case: Case) -> Row:
    """Counts, accelerates and checks a model: ours with the weights of the network that it is a copy of."""
    from mobilenet_fast import accelerate, cost, models

    entry, row = ZOO[case.name], Row(case.name)
    try:
        problem = case.problem(1)
        model, size = problem.module, problem.inputs[0].shape
        found = cost.count(model, size)
        if entry.ours:
            row.reference = [found.parameters, found.macs]
            state = (model.module if entry.output else model).state_dict()
            model = models.create_model(entry.ours, weights=state, **entry.options)
            model = (Part(model, entry.output) if entry.output else model).eval()
            found = cost.count(model, size)
        row.parameters, row.macs = found.parameters, found.macs
        outputs = torch.stack([problem.module(x) for x in problem.inputs])
        spread = ((outputs[0] - outputs).abs().max() / outputs.abs().max()).item()
        if not spread >= 0.1:
            raise ValueError(f"parity would mean nothing: outputs of two inputs differ by {spread:.0e} of the largest")
        row.eager_error, row.allowed = problem.eager_error, problem.allowed()
        fast = accelerate(model, (problem.inputs[0],))
        row.error = problem.error_of([fast(x) for x in problem.inputs[:2]])
        plan = fast.explain()
        row.steps, row.native = len(plan.rows), len(plan.rows) - len(plan.fallbacks)
        row.share = sum(step.macs for step in plan.rows if not step.fallback) / found.macs
        row.fallbacks = dict(Counter(f"{step.operation}: {step.fallback}" for step in plan.fallbacks))
    except Exception as failure:
        row.failed = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return row


def examined(case: Case, threads: int) -> Row:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.zoo", case.name],
        stdout=subprocess.PIPE,
        stderr=None if verbose() else subprocess.DEVNULL,
        text=True,
        env=environment(threads),
        cwd=ROOT,
    )
    if run.returncode:
        return Row(case.name, failed=f"its process ended with status {run.returncode}")
    return Row(**json.loads(run.stdout.splitlines()[-1]))


@dataclass
class Found:
    """All about a model, and under which conditions it was found."""

    row: Row
    latencies: list[Result]
    made: str


def read(path: Path) -> dict[str, Found]:
    """What earlier runs found, of the models that there still are."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Found(Row(**kept[name]["row"]), [Result(**r) for r in kept[name]["latencies"]], kept[name]["made"])
        for name in ZOO
        if name in kept
    }


def main(options, cases: list[Case], peers: list[Peer]) -> int:
    (threads,) = options.threads
    kept = options.out.with_suffix(".json")
    found = read(kept)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    made = conditions(threads)
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        row, latencies = examined(case, threads), []
        print("|", *cells(row), flush=True)
        if not options.skip_latency:
            latencies = measure(case, peers, Setting(threads=threads), options.rounds, options.seconds)
            print(report.results_table(latencies), flush=True)
        if case.folder(1):  # networks of gigabytes in all, which nothing else uses
            shutil.rmtree(case.folder(1), ignore_errors=True)
        found[case.name] = Found(row, latencies, made)
        found = {name: found[name] for name in ZOO if name in found}
        kept.write_text(json.dumps({name: asdict(f) for name, f in found.items()}, indent=1) + "\n", encoding="utf-8")
        options.out.write_text(page(list(found.values())), encoding="utf-8")
    print("written:", options.out, kept)
    return int(not all(found[case.name].row.is_right for case in cases))


def conditions(threads: int) -> str:
    facts = report.conditions()
    packages = [f"{name} {facts['versions'].get(name)}" for name in ("torch", "torchvision", "timm", "transformers")]
    return ", ".join([facts["cpu"], facts["isa"], f"{threads} thread(s)", *packages, f"commit {facts['commit']}"])


# The page


def cells(row: Row) -> list[str]:
    """What the tables of ours and of others have in common: counts, parity, and what runs in our kernels."""
    counts = [f"{row.parameters:,}", millions(row.macs)] if row.parameters else ["", ""]
    parity, kernels = "", f"failed: {row.failed}" if row.failed else ""
    if row.error is not None:
        parity = f"{row.error:.1e} ({row.eager_error:.1e})"
        if not row.error <= row.allowed:
            parity = f"**{parity}, allowed {row.allowed:.1e}**"
    if row.share is not None:
        kernels = f"{100 * row.share:.3g} %, {row.native} of {row.steps} steps"
    return [row.name, str(ZOO[row.name].size), *counts, parity, kernels]


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def origin(row: Row) -> list[str]:
    """What the paper states, and the reference, with its counts where they are not ours."""
    source = ZOO[row.name].source
    if row.reference not in (None, [row.parameters, row.macs]):
        source = f"**{source}: {row.reference[0]:,} and {millions(row.reference[1])}**"
    return [" / ".join(filter(None, PAPERS.get(row.name, ()))), source]


def markdown(table: list[list[str]]) -> str:
    """The first row is the heading; the first column is flush left, the others flush right."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in [table[0], rule, *table[1:]]
    )


def page(found: list[Found]) -> str:
    peers = list(dict.fromkeys(result.peer for f in found for result in f.latencies))
    rows = [f.row for f in found]
    latencies = {f.row.name: {result.peer: result for result in f.latencies} for f in found}

    def table(rows: list[Row], heading: list[str], more: Callable[[Row], list[str]]) -> str:
        body = [
            [*cells(row), *more(row), *(report.latency(latencies[row.name].get(peer)) for peer in peers)]
            for row in rows
        ]
        return markdown([[*HEADING, *heading, *(f"{peer}, ms" for peer in peers)], *body])

    ours, others = ([row for row in rows if bool(ZOO[row.name].ours) == mine] for mine in (True, False))
    counts = Counter(f.made for f in found)
    made = "\n".join(f"- {count} models: {what}" for what, count in counts.items())
    parts = ["\n".join([INTRODUCTION, *([LATENCY] if peers else [])]), f"Made on:\n\n{made}"]
    if ours:
        parts += ["## Models of this package", table(ours, ["paper", "reference, of the same counts"], origin), NOTES]
    if others:
        parts += ["## Networks of other people", table(others, [], lambda row: [])]
    lists = {
        "Slower than PyTorch": [f"- {name}: {what}" for name in latencies if (what := slower(latencies[name]))],
        "What falls back to PyTorch": [
            f"- {row.name}: " + "; ".join(f"{count} × {what}" for what, count in row.fallbacks.items())
            for row in rows
            if row.fallbacks
        ],
        "Not timed": [
            f"- {result.peer}, {f.row.name}: {result.failed}" for f in found for result in f.latencies if result.failed
        ],
    }
    for heading, lines in lists.items():
        if lines:
            parts += [f"## {heading}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def slower(results: dict[str, Result]) -> str:
    """The peers of PyTorch's own that took less time than we."""
    ours = next((r.median_ms for r in results.values() if r.ours), None)
    faster = [r for r in results.values() if not r.ours and r.median_ms and ours and r.median_ms < ours]
    return ", ".join(f"{r.peer} takes {r.median_ms / ours:.2f} of the time" for r in faster)


HEADING = ["model", "pixels", "parameters", "MACs, millions", "error (eager's)", "in our kernels"]
INTRODUCTION = """# Models

Made by `python -m benchmarks zoo`; with `--only` it makes those models' rows again and keeps the others.

- **Parameters and multiply-accumulates (MACs)** are counted by `mobilenet_fast.cost` for one picture, ours and the
  reference's by the same code; auxiliary heads, which count in training alone, are left out.
- **Error**: the largest difference of `accelerate(model)` from the reference in float64 with the same weights, as a
  share of the largest output, and that of the reference in eager float32. Weights are random, batch norm has the
  statistics of random pictures, and two pictures' outputs differ by at least a tenth of the largest; allowed are 1e-5
  and four times what eager float32 errs. Where eager itself errs by more than 1e-3, the row says little: those random
  weights make the network unstable.
- **In our kernels**: the share of multiply-accumulates in steps with a kernel of ours, and the number of such steps."""
LATENCY = "- **ms**: the median time of one picture, of the reference as PyTorch runs it and as `accelerate` does."
NOTES = """Papers state millions of parameters / of MACs. Where the counts are others:

- MobileNetV2 (arXiv:1801.04381, table 4): 3.47 M parameters are without batch norm's 34,112 weights and biases, as the
  authors' code states them.
- MobileNetV3 (arXiv:1905.02244v5, table 3): for the large one the authors' code states 217 M MACs, as counted here; for
  the small one 2.9 M parameters and 66 M MACs, though the layers defined there are those of the paper's table 2 and of
  this model.
- MnasNet-B1 is the one without squeeze-and-excitation; MnasNet-A1's figures are of arXiv:1807.11626, table 1.
- EfficientNet (arXiv:1905.11946, table 2): from B4 on the paper's MACs are up to 5 % below a count at the same sizes of
  pictures.
- EfficientNet-Lite has no paper; its authors' MACs are 3 to 6 % above a count of convolutions and classifier. By that
  count Lite0 takes what EfficientNet-B0 does but for squeeze-and-excitation (0.6 M).
- GoogLeNet (arXiv:1409.4842): sums of table 1, whose K of parameters is 1,024. Like torchvision's, the model has batch
  norm, and 3x3 convolutions in the place of the 5x5 ones, which takes 0.38 M parameters and 84 M MACs less; and the
  table has 34 M MACs for the first convolution, which takes 118 M.
- Inception v3 (arXiv:1512.00567): the abstract's "5 billion" and "less than 25 million".
- Xception (arXiv:1610.02357, table 3): 22,855,952 parameters, the same; it states no MACs."""


if __name__ == "__main__":
    print(json.dumps(asdict(examine(find_case("zoo", sys.argv[1])))))
