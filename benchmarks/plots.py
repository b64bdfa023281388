"""Bar chart and roofline plot of a run, and of a GPU's the shares of its floors; losses, latencies, searches."""

import itertools
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of a backend that needs no display
from matplotlib.ticker import NullFormatter  # noqa: E402

from benchmarks.report import fastest, groups, machine  # noqa: E402
from benchmarks.timing import Result  # noqa: E402

OURS = {"accelerate": "#c1121f", "replace_layers": "#f4978e"}
OTHERS = plt.get_cmap("GnBu_r")


def title(facts: dict) -> str:
    return f"{machine(facts)} · commit {facts['commit']}"


def bars(results: list[Result], facts: dict, file: Path):
    """Each peer's speed as a share of the fastest other's, a panel a setting, a group of bars a model."""
    panels = groups(results)
    peers = list(dict.fromkeys(r.peer for r in results if r.median_ms is not None))
    others = [peer for peer in peers if peer not in OURS]
    colours = OURS | {peer: OTHERS(0.75 * i / max(1, len(others))) for i, peer in enumerate(others)}
    models = max(map(len, panels.values()))
    size = max(9, 1.6 * models), 3.6 * len(panels) + 1
    figure, all_axes = plt.subplots(len(panels), figsize=size, squeeze=False, layout="constrained")
    for axes, (setting, rows) in zip(all_axes.flat, panels.items(), strict=True):
        labels = []
        for place, (case, row) in enumerate(rows.items()):
            best = fastest(row, ours=False)
            labels.append(f"{case.replace('_', chr(10), 1)}\n{best.median_ms:.3g} ms" if best else case)
            for i, peer in enumerate(peers):
                result = row.get(peer)
                if best and result and result.median_ms is not None:
                    x = place + 0.85 * ((i + 0.5) / len(peers) - 0.5)
                    axes.bar(x, best.median_ms / result.median_ms, 0.85 / len(peers), color=colours[peer])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_ylabel("speed, fastest peer = 1")
        axes.set_title(setting.label, loc="left")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[peer]) for peer in peers]
    figure.legend(handles, peers, loc="outside lower center", ncols=min(5, len(peers)), frameon=False, fontsize=9)
    figure.suptitle(f"{title(facts)}\nunder each model: the fastest peer's median latency", fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def roofline(results: list[Result], ceilings: dict[int, dict[str, float]], facts: dict, file: Path):
    """What was reached against what multiply-add units and copying allow, a panel a setting."""
    panels = groups([r for r in results if r.peak_share])
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = 8 * columns, 6 * lines
    figure, all_axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in all_axes.flat[len(panels) :]:
        axes.remove()
    for axes, (setting, rows) in zip(all_axes.flat, panels.items(), strict=False):
        peak = max(r.peak_gflops for row in rows.values() for r in row.values())
        intensities = [1e3 * 2 * r.gmacs / r.mbytes for row in rows.values() for r in row.values()]
        low, high = min(intensities) / 2, max(intensities) * 2.5
        axes.plot([low, high], [peak, peak], color="black")
        axes.annotate(
            f"multiply-add peak {peak:.0f} GFLOP/s", (high, peak), (0, 4), textcoords="offset points", ha="right"
        )
        copies = ceilings[setting.threads if setting.device == "cpu" else setting.dtype]
        for (what, bandwidth), style in zip(copies.items(), ("--", ":"), strict=False):
            end = min(high, peak / bandwidth)
            axes.plot([low, end], [low * bandwidth, end * bandwidth], color="black", linestyle=style)
            name = {"l2": "copy in L2", "memory": "copy in memory"}[what]
            axes.plot([], [], color="black", linestyle=style, label=f"{name}, {bandwidth:.0f} GB/s")
        for ours, colour, marker, name in ((True, "#c1121f", "o", "ours"), (False, "#3a7ca5", "x", "fastest peer")):
            best = [r for row in rows.values() if (r := fastest(row, ours))]
            x = [1e3 * 2 * r.gmacs / r.mbytes for r in best]
            axes.scatter(x, [r.gflops for r in best], color=colour, marker=marker, s=28, label=name, zorder=3)
        # Down to a decade below the peak at least, so that what lies just under it looks so.
        least = min(r.gflops for row in rows.values() for r in row.values())
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(least / 2, peak / 10), 2 * peak))
        axes.set_xlabel("multiply-adds × 2 per byte, layer by layer (FLOP/B)")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(setting.label, loc="left")
        axes.grid(which="both", alpha=0.2)
        if len(rows) <= 12:
            label_points(axes, rows)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.legend(loc="lower right")
    figure.suptitle(title(facts), fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def floors(results: list[Result], facts: dict, file: Path):
    """Of a GPU: what its floor is of the time that each case takes, ours and the fastest other, a panel a setting."""
    panels = groups([r for r in results if r.floor_share])
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = 8 * columns, 5 * lines
    figure, all_axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in all_axes.flat[len(panels) :]:
        axes.remove()
    for axes, (setting, rows) in zip(all_axes.flat, panels.items(), strict=False):
        for ours, colour, marker, name in ((True, "#c1121f", "o", "ours"), (False, "#3a7ca5", "x", "fastest peer")):
            best = [r for row in rows.values() if (r := fastest(row, ours))]
            share = [100 * r.floor_share for r in best]
            axes.scatter([r.floor_ms for r in best], share, color=colour, marker=marker, s=28, label=name, zorder=3)
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set(xscale="log", ylim=(0, None))
        axes.set_xlabel("floor: bytes at the bandwidth of a copy, or products at the matrix peak (ms)")
        axes.set_ylabel("floor / median (%)")
        axes.set_title(setting.label, loc="left")
        axes.grid(which="both", alpha=0.2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(loc="lower right")
    figure.suptitle(title(facts), fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def losses(runs: dict[str, list[float]], facts: dict, file: Path):
    """Of two runs of training: the losses, one line on the other, and below by how much they differ at each step."""
    (first, a), (second, b) = runs.items()
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(9, 6), height_ratios=(3, 1), layout="constrained")
    for name, values, colour, width in ((first, a, "#3a7ca5", 3), (second, b, "#c1121f", 1.2)):
        means = [statistics.fmean(values[max(0, end - 20) : end]) for end in range(1, len(values) + 1)]
        above.plot(values, color=colour, linewidth=0.6, alpha=0.3)
        above.plot(means, color=colour, linewidth=width, label=f"{name}, mean of 20 steps")
    above.set(yscale="log", ylabel="loss")
    above.legend()
    below.plot([abs(x - y) / abs(x) if x else 0 for x, y in zip(a, b, strict=True)], color="black", linewidth=0.8)
    below.set(yscale="log", xlabel="step", ylabel="difference / loss")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"MobileNetV3-Small on handwritten digits, the same seed\n{title(facts)}", fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def latencies(points: list[tuple[float, float, float]], lines: list[str], facts: dict, file: Path):
    """Of each network what the table predicts, what multiply-adds alone do, and what was measured; ms."""
    figure, axes = plt.subplots(figsize=(7, 7), layout="constrained")
    table, macs, measured = zip(*points, strict=True)
    ends = 0.95 * min(map(min, points)), 1.05 * max(map(max, points))
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.plot(measured, macs, "x", color="#3a7ca5", label=lines[3])
    axes.plot(measured, table, "o", color="#c1121f", label=lines[1])
    axes.set(xlabel="measured, ms", ylabel="predicted, ms", xlim=ends, ylim=ends, aspect="equal")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{lines[0]}, batch 1, 224 × 224\n{title(facts)}", fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def searches(found: dict, target_ms: float, facts: dict, file: Path):
    """Of each search the networks tried, by latency and accuracy, with its front, and the best reward so far."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for (method, result), colour in zip(found.items(), ("#c1121f", "#3a7ca5", "#888888"), strict=False):
        trials, front = result.trials, result.pareto
        left.plot([t.latency_ms for t in trials], [t.accuracy for t in trials], ".", color=colour, alpha=0.5)
        left.step([t.latency_ms for t in front], [t.accuracy for t in front], where="post", color=colour, label=method)
        best = list(itertools.accumulate((t.reward for t in trials), max))
        right.step(range(1, len(best) + 1), best, where="post", color=colour, label=method)
    left.axvline(target_ms, color="black", linestyle=":", linewidth=0.8)
    left.set(xlabel="predicted latency, ms (dotted: target)", ylabel="accuracy after the short training")
    right.set(xlabel="trials", ylabel="best reward so far")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(facts), fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def label_points(axes, rows):
    """Names stand upright below all points, pushed to the right where they would overlap."""
    points = sorted(
        (1e3 * 2 * r.gmacs / r.mbytes, r.gflops, case) for case, row in rows.items() if (r := fastest(row, True))
    )
    below = 0.8 * min(r.gflops for row in rows.values() for ours in (True, False) if (r := fastest(row, ours)))
    low, high = axes.get_xlim()
    step, place = (high / low) ** 0.025, low
    for x, y, case in points:
        place = max(x, place * step)
        line = {"arrowstyle": "-", "linewidth": 0.3}
        axes.annotate(case, (x, y), (place, below), ha="center", va="top", rotation=90, fontsize=8, arrowprops=line)


def save(results: list[Result], ceilings: dict[int, dict[str, float]], facts: dict, stem: Path) -> list[Path]:
    files = []
    if results[0].suite == "models" and any(r.median_ms is not None for r in results):
        files.append(stem.with_name(stem.name + "-speed.png"))
        bars(results, facts, files[-1])
    if any(r.peak_share for r in results):
        files.append(stem.with_name(stem.name + "-roofline.png"))
        roofline(results, ceilings, facts, files[-1])
    if any(r.floor_share for r in results):
        files.append(stem.with_name(stem.name + "-floor.png"))
        floors(results, facts, files[-1])
    return files
