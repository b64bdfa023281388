"""Tables for people, CSV and JSON for everything else; each carries the conditions it was measured under."""

import csv
import datetime
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases.registry import version
from benchmarks.peers import PEERS
from benchmarks.timing import ROOT, Result

PACKAGES = ("mobilenet_fast", "torch", "torchvision", "timm", "transformers", "numpy", "matplotlib")
BASELINE = "eager channels_last"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git(*arguments) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def conditions() -> dict:
    try:
        import mobilenet_fast

        isa = mobilenet_fast.cpu_isa()
    except ImportError:
        isa = None
    packages = dict.fromkeys([*PACKAGES, *(package for peer in PEERS.values() for package in peer.needs)])
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "cpu": cpu_name(),
        "cpu_capability_of_torch": torch.backends.cpu.get_cpu_capability(),
        "isa": isa,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages if version(name)},
    }


def text_table(rows: list[list[str]]) -> str:
    """The first row is the heading, of one or more lines; the first column is flush left, the others flush right."""
    heading, *body = rows
    lines = [cell.split("\n") for cell in heading]
    height = max(map(len, lines))
    headings = [list(row) for row in zip(*([""] * (height - len(cell)) + cell for cell in lines), strict=True)]
    widths = [max(map(len, column)) for column in zip(*headings, *body, strict=True)]

    def line(row):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([row[0].ljust(widths[0]), *others]).rstrip()

    above, below = [line(row) for row in headings], [line(row) for row in body]
    return "\n".join([*above, "-" * max(map(len, above + below)), *below])


def number(value, pattern="{:.3g}") -> str:
    return "" if value is None else pattern.format(value)


def latency(result: Result | None) -> str:
    if result is None:
        return ""
    if result.median_ms is None:
        return "failed" if result.failed else "missing"
    return f"{result.median_ms:.4g}"


def results_table(results: list[Result]) -> str:
    """All peers of one case at one thread count and batch."""
    baseline = next((r.median_ms for r in results if r.peer == BASELINE), None)
    heading = ["", "median ms", "quartiles", "× " + BASELINE, "error", "% of peak", "% of copy"]
    rows = [[*heading, "MiB: model\n+ first call"]]
    for r in results:
        if r.median_ms is None:
            rows.append([r.peer, latency(r), "", "", "", "", "", ""])
            continue
        ratio = baseline / r.median_ms if baseline else None
        shares = [number(share and 100 * share, "{:.0f}") for share in (r.peak_share, r.copy_share)]
        quartiles = f"{r.q1_ms:.4g}–{r.q3_ms:.4g}"
        memory = "" if r.first_call_mib is None else f"{r.prepare_mib:.0f} + {r.first_call_mib:.1f}"
        error = number(r.error, "{:.1e}")
        rows.append([r.peer, latency(r), quartiles, number(ratio, "{:.2f}"), error, *shares, memory])
    first = results[0]
    title = f"{first.case} · {first.threads} thread(s) · batch {first.batch}"
    measured = next((r for r in results if r.peak_gflops), None)
    if measured:
        title += f" · peak {measured.peak_low_gflops:.0f}–{measured.peak_gflops:.0f} GFLOP/s"
        if measured.trip_ns:
            title += f" · a line between threads and back {measured.trip_low_ns:.0f}–{measured.trip_ns:.0f} ns"
    notes = [f"{r.peer}: {r.failed or r.absent}" for r in results if r.failed or r.absent]
    return "\n".join([title, text_table(rows), *notes, ""])


def groups(results: list[Result]) -> dict[tuple[int, int], dict[str, dict[str, Result]]]:
    """(threads, batch) → case → peer → result."""
    table: dict = {}
    for r in results:
        table.setdefault((r.threads, r.batch), {}).setdefault(r.case, {})[r.peer] = r
    return table


def fastest(row: dict[str, Result], ours: bool) -> Result | None:
    timed = (r for r in row.values() if r.median_ms is not None and r.error is not None and r.ours == ours)
    return min(timed, key=lambda r: r.median_ms, default=None)


def summary(results: list[Result]) -> str:
    """Every peer's median in ms, a row a case, a table for each number of threads and batch."""
    peers = list(dict.fromkeys(r.peer for r in results))
    tables = []
    for (threads, batch), rows in groups(results).items():
        ends = ["ours, %\nof peak", "fastest\npeer", "its time\n/ ours"]
        table = [["median ms", *(peer.replace(" ", "\n") for peer in peers), *ends]]
        for case, row in rows.items():
            ours, other = fastest(row, ours=True), fastest(row, ours=False)
            share = number(ours and ours.peak_share and 100 * ours.peak_share, "{:.0f}")
            ratio = number(other.median_ms / ours.median_ms if ours and other else None, "{:.2f}")
            table.append([case, *(latency(row.get(peer)) for peer in peers), share, other.peer if other else "", ratio])
        tables.append(f"{threads} thread(s) · batch {batch}\n{text_table(table)}\n")
    peaks = [bound / r.threads for r in results if r.peak_gflops for bound in (r.peak_low_gflops, r.peak_gflops)]
    if peaks:
        tables.append(f"measured multiply-add peak per thread: {min(peaks):.1f}–{max(peaks):.1f} GFLOP/s")
    return "\n".join(tables)


def save(results: list[Result], ceilings: dict[int, dict[str, float]], folder: Path) -> list[Path]:
    """Writes .json, .csv (a row a peer, the conditions on every row) and plots under a name of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = conditions()
    stem = f"{results[0].suite}-{facts['date'].replace(':', '').replace('+0000', '')}"
    json_file, csv_file = folder / f"{stem}.json", folder / f"{stem}.csv"
    rows = [r.as_dict() for r in results]
    saved = {"conditions": facts, "copy_gbytes_per_second": ceilings, "results": rows}
    json_file.write_text(json.dumps(saved, indent=1) + "\n")
    flat = {k: v for k, v in facts.items() if k != "versions"}
    flat["versions"] = " ".join(f"{k}={v}" for k, v in facts["versions"].items())
    with csv_file.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *flat])
        writer.writeheader()
        writer.writerows(row | flat for row in rows)
    if version("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return [json_file, csv_file]
    from benchmarks import plots

    return [json_file, csv_file, *plots.save(results, ceilings, facts, folder / stem)]
