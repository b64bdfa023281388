"""One of the two runs of ``python -m benchmarks train``, in a process of its own, so that its peak memory is its own.

A checkpoint holds all that the next step depends on: parameters, buffers, momentum, the schedule, the states of torch's
generator (dropout) and of the augmentation's, the order of the epoch's pictures and the place in it. With these go the
log and the time taken, so that a run that was killed goes on as if it had not been: what came after the checkpoint is
done again, bit by bit alike, and counted once.
"""

import csv
import ctypes
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import third_party
from benchmarks.device import status_kib
from benchmarks.pictures import Pictures
from mobilenet_fast.cli import command_line, load_model
from mobilenet_fast.progress import with_progress
from mobilenet_fast.search.digits import CLASSES

RUNS = {"stock": "PyTorch, eager", "ours": "replace_layers"}
COLUMNS = ("step", "epoch", "loss", "ms", "test_accuracy")
# SGD: Adam divides by what gradients are, and makes of a rounding difference in a small one a step of full length.
RATE, MOMENTUM, DECAY = 0.05, 0.9, 1e-4
WARMUP = 0.1  # of all steps, with a rate that grows from zero; then half a cosine, down to zero
NORM_MOMENTUM = 0.1  # torchvision's is 0.01: in hundreds of steps, statistics would still be those of the first
PR_SET_PDEATHSIG = 1


def save(state: dict, file: Path) -> None:
    """A process that is killed while it writes leaves the checkpoint before."""
    new = file.with_suffix(".new")
    with new.open("wb") as opened:
        torch.save(state, opened)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(new, file)


def load(file: Path) -> dict | None:
    """None without a checkpoint."""
    try:
        return torch.load(file, weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # what torch.load raises for a file that is none of its own depends on its bytes
        reason = str(error).splitlines()[0]
        raise SystemExit(f"benchmarks: {file} is no checkpoint, remove it ({reason})") from None


def network(name: str, weights: str | None) -> torch.nn.Module:
    """torchvision's MobileNetV3-Small with a last layer for digits; all but that has the weights that are given."""
    model = third_party.torchvision_models().mobilenet_v3_small(weights=None)
    if weights:
        model.load_state_dict(load_model("mobilenet_v3_small", weights).state_dict())
    model.classifier[-1] = torch.nn.Linear(model.classifier[-1].in_features, CLASSES)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = NORM_MOMENTUM
    model = model.to(memory_format=torch.channels_last).train()
    if name == "ours":
        import mobilenet_fast

        mobilenet_fast.replace_layers(model)
    return model


def rate(step: int, total: int) -> float:
    """As a share of the highest."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


class Run:
    """``options``: what the run is made with; it goes on from a checkpoint in ``folder`` if there is one."""

    def __init__(self, name: str, folder: Path, every: int, options: dict) -> None:
        self.name, self.folder, self.every, self.options = name, folder, every, options
        torch.set_num_threads(options["threads"])
        self.before_mib = status_kib("VmRSS") / 2**10
        self.pictures = Pictures(options["pictures"], options["size"])
        torch.manual_seed(options["seed"])
        self.model = network(name, options["weights"])
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
        self.steps = len(self.pictures.train) // options["batch"]  # of an epoch; what is left over waits for the next
        self.total = options["epochs"] * self.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate(step, self.total))
        self.generator = torch.Generator().manual_seed(options["seed"])
        self.order = torch.empty(0, dtype=torch.long)
        self.log, self.seconds, self.peak_mib, self.training_mib = [], 0.0, 0.0, 0.0
        self.resume(load(self.file))
        self.started = time.perf_counter() - self.seconds
        self.csv = self.start_csv()

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def resume(self, state: dict | None) -> None:
        if state is None:
            return
        for part in ("model", "optimizer", "schedule"):
            getattr(self, part).load_state_dict(state[part])
        torch.set_rng_state(state["torch_generator"])
        self.generator.set_state(state["generator"])
        for fact in ("order", "log", "seconds", "peak_mib", "training_mib"):
            setattr(self, fact, state[fact])
        print(f"[{RUNS[self.name]}] goes on from step {len(self.log)} of {self.total}", file=sys.stderr)

    def checkpoint(self) -> None:
        self.seconds = time.perf_counter() - self.started
        peak = status_kib("VmHWM") / 2**10
        self.peak_mib = max(self.peak_mib, peak)
        self.training_mib = max(self.training_mib, peak - self.before_mib)
        state = {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "schedule")}
        state |= {"torch_generator": torch.get_rng_state(), "generator": self.generator.get_state()}
        facts = ("options", "total", "order", "log", "seconds", "peak_mib", "training_mib")
        save(state | {fact: getattr(self, fact) for fact in facts}, self.file)

    def start_csv(self):
        """With the steps up to the checkpoint; those after it will be taken again."""
        opened = (self.folder / f"{self.name}.csv").open("w", newline="")
        writer = csv.writer(opened)
        writer.writerow(COLUMNS)
        writer.writerows(self.log)
        opened.flush()
        return opened

    def step(self, number: int) -> str | None:
        """Takes a step, and says what an epoch that ends with it has come to."""
        epoch, place = divmod(number, self.steps)
        if place == 0:
            self.order = self.pictures.train[torch.randperm(len(self.pictures.train), generator=self.generator)]
        batch = self.options["batch"]
        x, labels = self.pictures.batch(self.order[place * batch :][:batch], self.generator)

        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), labels)
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        ms = (time.perf_counter() - start) * 1e3

        self.schedule.step()
        ends = place == self.steps - 1
        accuracy = self.accuracy() if ends else None
        self.log.append([number, epoch, value, ms, accuracy])
        csv.writer(self.csv).writerow(self.log[-1])
        self.csv.flush()
        if ends or len(self.log) % self.every == 0:
            self.checkpoint()
        if ends:
            mean = sum(row[2] for row in self.log[-self.steps :]) / self.steps
            facts = f"epoch {epoch + 1} of {self.options['epochs']}, mean loss {mean:.3f}"
            return f"[{RUNS[self.name]}] {facts}, {100 * accuracy:.1f} % of the test's pictures right"
        return None

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of the test's pictures that are named rightly."""
        self.model.eval()
        right = 0
        for places in self.pictures.test.split(self.options["batch"]):
            x, labels = self.pictures.batch(places)
            right += (self.model(x).argmax(1) == labels).sum().item()
        self.model.train()
        return right / len(self.pictures.test)


def end_with_parent() -> None:
    """However the command is killed that started it, a run ends too: it would write beside the next one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@command_line
def main(arguments: list[str] | None = None) -> int:
    end_with_parent()
    name, folder, every, options = json.loads((arguments or sys.argv[1:])[0])
    run = Run(name, Path(folder), every, options)
    todo = range(len(run.log), run.total)
    for line in with_progress(run.step, todo, f"{RUNS[name]} ", run.total - len(todo)):
        if line:
            print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
