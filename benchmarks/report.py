"""Tables for people, CSV and JSON for everything else; each carries the conditions it was measured under."""

import csv
import datetime
import json
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.timing import ROOT, Result

PACKAGES = ("mobilenet_fast", "torch", "torchvision", "timm", "numpy")
BASELINE = "eager channels_last"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "cpu": cpu_name(),
        "cpu_capability_of_torch": torch.backends.cpu.get_cpu_capability(),
        "isa": isa,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES if version(name)},
    }


def text_table(rows: list[list[str]]) -> str:
    """The first row is the heading; the first column is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([row[0].ljust(widths[0]), *others]).rstrip()

    heading, *body = map(line, rows)
    return "\n".join([heading, "-" * max(len(heading), *map(len, body)), *body])


def number(value, pattern="{:.3g}") -> str:
    return "" if value is None else pattern.format(value)


def results_table(results: list[Result]) -> str:
    """All peers of one case at one thread count and batch."""
    baseline = next((r.median_ms for r in results if r.peer == BASELINE), None)
    rows = [["", "median ms", "quartiles", "× " + BASELINE, "error", "% of peak", "% of copy"]]
    for r in results:
        if r.failed:
            rows.append([r.peer, "failed", "", "", "", "", ""])
            continue
        ratio = baseline / r.median_ms if baseline else None
        shares = [number(share and 100 * share, "{:.0f}") for share in (r.peak_share, r.copy_share)]
        times = [f"{r.median_ms:.4g}", f"{r.q1_ms:.4g}–{r.q3_ms:.4g}"]
        rows.append([r.peer, *times, number(ratio, "{:.2f}"), number(r.error, "{:.1e}"), *shares])
    first = results[0]
    title = f"{first.case} · {first.threads} thread(s) · batch {first.batch}"
    if first.peak_gflops:
        title += f" · peak {first.peak_gflops:.0f} GFLOP/s"
    notes = [f"{r.peer}: {r.failed}" for r in results if r.failed]
    return "\n".join([title, text_table(rows), *notes, ""])


def save(results: list[Result], folder: Path) -> list[Path]:
    """Writes results.json and results.csv (a row a peer, the conditions on every row) under a name of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = conditions()
    stem = f"{results[0].suite}-{facts['date'].replace(':', '').replace('+0000', '')}"
    json_file, csv_file = folder / f"{stem}.json", folder / f"{stem}.csv"
    rows = [r.as_dict() for r in results]
    json_file.write_text(json.dumps({"conditions": facts, "results": rows}, indent=1) + "\n")
    flat = {k: v for k, v in facts.items() if k != "versions"}
    flat["versions"] = " ".join(f"{k}={v}" for k, v in facts["versions"].items())
    with csv_file.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *flat])
        writer.writeheader()
        writer.writerows(row | flat for row in rows)
    return [json_file, csv_file]
