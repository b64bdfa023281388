"""Tables for people, CSV and JSON for everything else; each carries the conditions it was measured under."""

import csv
import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases.registry import Setting, version
from benchmarks.gauges import ROOT, gpu_process
from benchmarks.peers import peers_of
from benchmarks.timing import Result

PACKAGES = ("mobilenet_fast", "torch", "triton", "torchvision", "timm", "transformers", "numpy", "matplotlib")
BASELINE = "eager channels_last"
CUDA_BASELINE = "eager channels_last graph"


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


def conditions(device: str = "cpu") -> dict:
    try:
        import mobilenet_fast

        isa = mobilenet_fast.cpu_isa()
    except ImportError:
        isa = None
    packages = dict.fromkeys([*PACKAGES, *(package for peer in peers_of(device).values() for package in peer.needs)])
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "device": device,
        **(gpu_process().facts if device == "cuda" else {}),
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


def machine(facts: dict) -> str:
    if facts["device"] == "cuda":
        return f"{facts['gpu']} · driver {facts['driver']} · CUDA {facts['cuda']} · cuDNN {facts['cudnn']}"
    return f"{facts['cpu']} · {facts['isa']}"


def results_table(results: list[Result]) -> str:
    """All peers of one case under one setting."""
    first = results[0]
    table = cpu_table if first.device == "cpu" else cuda_table
    notes = [f"{r.peer}: {r.failed or r.absent}" for r in results if r.failed or r.absent]
    return table(results, f"{first.case} · {first.setting.label}", notes)


def cpu_table(results: list[Result], title: str, notes: list[str]) -> str:
    baseline = next((r.median_ms for r in results if r.peer == BASELINE), None)
    heading = ["", "median ms", "quartiles", "× " + BASELINE, "error", "% of peak", "% of copy"]
    rows = [[*heading, "MiB: model\n+ first call"]]
    for r in results:
        if r.median_ms is None:
            rows.append([r.peer, latency(r), *[""] * (len(heading) - 1)])
            continue
        ratio = baseline / r.median_ms if baseline else None
        shares = [number(share and 100 * share, "{:.0f}") for share in (r.peak_share, r.copy_share)]
        quartiles = f"{r.q1_ms:.4g}–{r.q3_ms:.4g}"
        memory = "" if r.first_call_mib is None else f"{r.prepare_mib:.0f} + {r.first_call_mib:.1f}"
        error = number(r.error, "{:.1e}")
        rows.append([r.peer, latency(r), quartiles, number(ratio, "{:.2f}"), error, *shares, memory])
    measured = next((r for r in results if r.peak_gflops), None)
    if measured:
        title += f" · peak {measured.peak_low_gflops:.0f}–{measured.peak_gflops:.0f} GFLOP/s"
        if measured.trip_ns:
            title += f" · a line between threads and back {measured.trip_low_ns:.0f}–{measured.trip_ns:.0f} ns"
    return "\n".join([title, text_table(rows), *notes, ""])


def cuda_table(results: list[Result], title: str, notes: list[str]) -> str:
    baseline = next((r.median_ms for r in results if r.peer == CUDA_BASELINE), None)
    heading = ["", "median ms", "quartiles", "× " + CUDA_BASELINE.replace(" ", "\n"), "error", "floor /\nmedian, %"]
    rows = [[*heading, "kernels\na call", "MiB", "longest kernel, its share of all"]]
    for r in results:
        if r.median_ms is None:
            rows.append([r.peer, latency(r), *[""] * (len(rows[0]) - 2)])
            continue
        ratio = number(baseline / r.median_ms if baseline else None, "{:.2f}")
        quartiles, error = f"{r.q1_ms:.4g}–{r.q3_ms:.4g}", number(r.error, "{:.1e}")
        share = number(r.floor_share and 100 * r.floor_share, "{:.0f}")
        kernel = f"{r.kernel[:60]} {100 * r.kernel_us / r.kernels_us:.0f} %" if r.kernel else ""
        rows.append([r.peer, latency(r), quartiles, ratio, error, share])
        rows[-1] += [number(r.kernels, "{}"), number(r.memory_mib, "{:.0f}"), kernel]
    measured = next((r for r in results if r.floor_ms), None)
    if measured:
        title += f" · floor {measured.floor_ms:.4g} ms: {measured.mbytes:.4g} MB at {measured.copy_gbytes:.0f} GB/s"
        title += f", {measured.gmacs:.3g} G multiply-adds at {measured.peak_gflops / 1e3:.0f} TFLOP/s"
    tf32 = next((r.tf32 for r in results if r.tf32 is not None), None)
    if tf32 is not None:
        title += f" · TF32 {'allowed' if tf32 else 'off'}"
    groups = max((r.group or 1 for r in results), default=1)
    if groups > 1:
        notes = [*notes, f"timed in {groups} groups, one after another: the device's memory does not hold all at once"]
    return "\n".join([title, text_table(rows), *notes, ""])


def groups(results: list[Result]) -> dict[Setting, dict[str, dict[str, Result]]]:
    """Setting → case → peer → result. Threads, or a GPU's dtype, come first."""
    table: dict = {}
    for r in results:
        table.setdefault(r.setting, {}).setdefault(r.case, {})[r.peer] = r
    return table


def limits(results: list[Result]) -> dict[str, dict[str, float]]:
    """Of a GPU, the bandwidth of copies beside which each dtype was measured."""
    found: dict[str, list[float]] = {}
    for r in results:
        if r.copy_gbytes:
            found.setdefault(r.dtype, []).append(r.copy_gbytes)
    return {dtype: {"memory": statistics.median(values)} for dtype, values in found.items()}


def fastest(row: dict[str, Result], ours: bool) -> Result | None:
    timed = (r for r in row.values() if r.median_ms is not None and r.error is not None and r.ours == ours)
    return min(timed, key=lambda r: r.median_ms, default=None)


def summary(results: list[Result]) -> str:
    """Every peer's median in ms, a row a case, a table for each number of threads and batch."""
    peers = list(dict.fromkeys(r.peer for r in results))
    tables = []
    for setting, rows in groups(results).items():
        on_cpu = setting.device == "cpu"
        ends = ["ours, %\nof peak" if on_cpu else "ours, floor\n/ median, %", "fastest\npeer", "its time\n/ ours"]
        table = [["median ms", *(peer.replace(" ", "\n") for peer in peers), *ends]]
        for case, row in rows.items():
            ours, other = fastest(row, ours=True), fastest(row, ours=False)
            share = ours and (ours.peak_share if on_cpu else ours.floor_share)
            share = number(share and 100 * share, "{:.0f}")
            ratio = number(other.median_ms / ours.median_ms if ours and other else None, "{:.2f}")
            table.append([case, *(latency(row.get(peer)) for peer in peers), share, other.peer if other else "", ratio])
        tables.append(f"{setting.label}\n{text_table(table)}\n")
    peaked = [r for r in results if r.peak_gflops and r.device == "cpu"]
    peaks = [bound / r.threads for r in peaked for bound in (r.peak_low_gflops, r.peak_gflops)]
    if peaks:
        tables.append(f"measured multiply-add peak per thread: {min(peaks):.1f}–{max(peaks):.1f} GFLOP/s")
    return "\n".join(tables)


def write_csv(results: list[Result], facts: dict, file: Path):
    flat = {k: v for k, v in facts.items() if k not in ("versions", "device")}
    flat["versions"] = " ".join(f"{k}={v}" for k, v in facts.get("versions", {}).items())
    rows = [r.as_dict() | flat for r in results]
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save(results: list[Result], ceilings: dict, folder: Path, facts: dict | None = None) -> list[Path]:
    """Writes .json, .csv (a row a peer, the conditions on every row) and plots under a name of their own.

    ``ceilings``: by threads, or a GPU's dtype, GB/s of copies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = facts or conditions()
    on = "" if facts["device"] == "cpu" else f"-{facts['device']}"
    stem = f"{results[0].suite}{on}-{facts['date'].replace(':', '').replace('+0000', '')}"
    json_file, csv_file = folder / f"{stem}.json", folder / f"{stem}.csv"
    rows = [r.as_dict() for r in results]
    saved = {"conditions": facts, "copy_gbytes_per_second": ceilings, "results": rows}
    json_file.write_text(json.dumps(saved, indent=1) + "\n")
    write_csv(results, facts, csv_file)
    if version("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return [json_file, csv_file]
    from benchmarks import plots

    return [json_file, csv_file, *plots.save(results, ceilings, facts, folder / stem)]
