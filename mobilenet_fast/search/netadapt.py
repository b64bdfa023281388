"""NetAdapt: a network made faster in small steps, each chosen by what it costs in accuracy."""

from __future__ import annotations

import copy
import csv
import ctypes
import hashlib
import math
import numbers
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..accelerate import accelerate
from ..messages import first_line
from ..models.rounding import make_divisible
from ..progress import with_progress
from .blocks import KEEPS, ChannelGroup, channel_groups, shrink, with_widths
from .facts import note_facts, other_facts
from .latency import Conditions

__all__ = ["RULES", "MeasuredLatency", "NetAdapted", "latencies_in_turn", "netadapt"]

RULES = ("ratio", "least loss")
COLUMNS = ("step", "layer", "kind", "channels_before", "channels", "latency_ms", "accuracy", "score", "chosen")
_HALVINGS = 10
_TURN_S = 0.002
_TRIES = 5
_CHANGE = 0.1  # of the first model's latency, beyond which the machine is not what it was


@dataclass(frozen=True)
class NetAdapted:
    """What `netadapt` gives.

    ``proposals`` has a row for each proposal, with the columns of the log; ``widths`` are the channels of each group,
    by its name (`mobilenet_fast.search.ChannelGroup`); latencies are in ms, accuracies as ``evaluate`` gives them.
    """

    model: nn.Module
    latency_ms: float
    accuracy: float
    first_latency_ms: float
    first_accuracy: float
    widths: dict[str, int]
    proposals: list[dict[str, Any]]

    def plot(self, path: str | os.PathLike) -> None:
        """Draws all proposals, and the way that was taken, by latency and accuracy as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("netadapt: matplotlib is not installed; run: pip install matplotlib") from error
        figure = Figure((8, 5), layout="constrained")
        axes = figure.subplots()
        for kind, colour in (("expansion", "#3a7ca5"), ("bottleneck", "#e09f3e")):
            rows = [row for row in self.proposals if row["kind"] == kind]
            points = [row["latency_ms"] for row in rows], [row["accuracy"] for row in rows]
            axes.plot(*points, "o", color=colour, markersize=4, alpha=0.6, label=f"proposal, {kind}")
        way = [(self.first_latency_ms, self.first_accuracy)]
        way += [(row["latency_ms"], row["accuracy"]) for row in self.proposals if row["chosen"]]
        axes.plot(*zip(*way, strict=True), "-", color="#c1121f", label="chosen")
        axes.plot(self.latency_ms, self.accuracy, "*", color="#c1121f", markersize=12, label="fine-tuned at the end")
        axes.set(xlabel="latency (ms)", ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, format="png", dpi=120)


def netadapt(
    model: nn.Module,
    finetune: Callable[[nn.Module, int], object],
    evaluate: Callable[[nn.Module], float],
    target_latency_ms: float,
    *,
    example_input: Tensor | None = None,
    delta: float = 0.01,
    steps: int = 10_000,
    final_steps: int | None = None,
    latency: Callable[[nn.Module], float] | None = None,
    keep: str = "first",
    rule: str = "ratio",
    divisor: int = 8,
    seed: int = 0,
    log: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    note: dict[str, Any] | None = None,
    progress: Callable[..., Iterable] = with_progress,
) -> NetAdapted:
    """Makes a trained network narrower, block by block, until its latency is ``target_latency_ms``.

    A step makes a proposal of each group of `channel_groups`: one block's expansion, or the bottleneck of all blocks
    whose residuals share its width, with the most channels that lower the latency by at least ``delta`` times the first
    model's. Each takes over the weights of the channels that it keeps (as channels are only ever taken away, none are
    missing), and is fine-tuned. The best one is the next step's model, and the last one is fine-tuned once more. Where
    no group can lower the latency by so much any more, half of it is asked for.

    The global generators of torch are seeded for each fine-tuning, from ``seed``, and put back at the end: what a
    fine-tuning draws from elsewhere it has to seed itself, for example by ``torch.initial_seed()``, to be the same when
    it is done again.

    Args:
        model: what `mobilenet_fast.accelerate` takes, trained; it is left as it is.
        finetune: ``finetune(model, steps)`` trains a model in place.
        evaluate: ``evaluate(model)`` is its accuracy; more is better. Modes are these two's business.
        target_latency_ms: when to stop.
        example_input: what latency is measured for, on the model's device; None is (1, 3, 224, 224).
        delta: the least reduction of a step, as a share of the first latency: the paper's δ.
        steps: of fine-tuning, a proposal: the paper's T.
        final_steps: of the last fine-tuning; None is ``steps``.
        latency: ``latency(model)`` in ms, such as `LatencyTable.predict`; None measures it as
            `mobilenet_fast.accelerate` runs it, beside the first model (`MeasuredLatency`). It should not grow when
            channels are taken away, and is asked again for the model that is chosen: where that lowers it by less than
            half of what was asked for, the step is made again with what is known now.
        keep: which channels: "first" or "largest norm", see `shrink`.
        rule: which proposal is the best: "ratio", that of the largest change in accuracy over the reduction in latency,
            as MobileNetV3's, or "least loss", that of the highest accuracy, as NetAdapt's. Of equal ones it is the
            first.
        divisor: numbers of channels are multiples of it, as those that `make_divisible` gives.
        seed: of the fine-tuning.
        log: a CSV file with a line for each proposal, written anew after each.
        checkpoint: a file, written after each proposal; the same call goes on from it, to the same result, for it has
            the latencies too.
        note: what ``finetune``, ``evaluate`` and ``latency`` depend on, such as data and rates, as numbers and strings
            by name: a checkpoint with another note is refused.
        progress: takes the place of ``map`` over the proposals of a step: a bar on a terminal's stderr, unless it is
            ``map`` itself.

    Raises:
        TypeError, ValueError: an option is none of the above, the model has no group to make narrower, the target is
            no less than the model's latency, or less than that of the model with all groups at their least width, or
            the checkpoint is of another note, other options, another model, other weights or another
            ``example_input``, or was measured on another machine or number of threads.
        RuntimeError: latencies as measured do not go down any more.

    Searching for MobileNetV3 (Howard et al., 2019, arXiv:1905.02244), section 4.2; NetAdapt (Yang et al., 2018,
    arXiv:1804.03230), section 3.
    """
    _check(model, finetune, evaluate, latency)
    for name, value in {"target_latency_ms": target_latency_ms, "delta": delta}.items():
        if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
            raise ValueError(f"netadapt: {name} must be a positive number, got {value!r}")
    if delta >= 1:
        raise ValueError(f"netadapt: delta must be less than 1, a share of the latency, got {delta}")
    final_steps = steps if final_steps is None else final_steps
    for name, value, least in (
        ("steps", steps, 0),
        ("final_steps", final_steps, 0),
        ("divisor", divisor, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"netadapt: {name} must be an integer of at least {least}, got {value!r}")
    for name, value, known in (("keep", keep, KEEPS), ("rule", rule, RULES)):
        if value not in known:
            raise ValueError(f"netadapt: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if example_input is None:
        parameter = next(model.parameters(), torch.empty(0))
        example_input = torch.zeros(1, 3, 224, 224, dtype=parameter.dtype, device=parameter.device)
    groups = channel_groups(model, example_input)
    if not any(_narrower(group.width(model), divisor) for group in groups):
        raise ValueError(f"netadapt: the model has no block to make narrower by multiples of {divisor} channels")
    recipe = {
        **note_facts("netadapt", note),
        "target_latency_ms": float(target_latency_ms),
        "delta": float(delta),
        "steps": steps,
        "final_steps": final_steps,
        "keep": keep,
        "rule": rule,
        "divisor": divisor,
        "seed": seed,
        "groups": {group.name: group.width(model) for group in groups},
        "example_input": [f"{tuple(x.shape)} {x.dtype} {x.device.type}" for x in pytree.tree_leaves(example_input)],
        "shapes": {name: tuple(tensor.shape) for name, tensor in _weights(model).items()},
        "weights": _digest(model),
        "modules": hashlib.sha256(repr(model).encode()).hexdigest(),
    }
    if latency is None:
        x = next(x for x in pytree.tree_leaves(example_input) if isinstance(x, Tensor))
        recipe |= asdict(Conditions.here(x.device, torch.get_num_threads(), len(x), x.dtype))
    run = _Run(model, groups, recipe, evaluate, finetune, log, checkpoint)
    run.latency = latency or MeasuredLatency(model, example_input, run.state["first_latency_ms"])
    return run.result(progress)


def latencies_in_turn(models: Sequence[Callable], x: Tensor, rounds: int = 50) -> list[float]:
    """The median time in ms of a call of each model, called in turn, so that a change in the machine's speed meets all.

    Args:
        models: of `mobilenet_fast.accelerate`, for example.
        x: what each is called with.
        rounds: turns of each, which take 2 ms or one call.
    """

    def call(model: Callable) -> None:
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for model in models:
            call(model)
        pairs = [*zip(models, times, strict=True)]
        for _ in range(rounds):
            pairs.reverse()  # a disturbance that comes and goes as regularly as the turns would meet one of them alone
            for model, taken in pairs:
                turn = time.perf_counter()
                while (start := time.perf_counter()) - turn < _TURN_S:
                    call(model)
                    taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


class MeasuredLatency:
    """``latency(model)`` of `netadapt`: the first model's latency in ms, times how much of it another takes beside it,
    both as `mobilenet_fast.accelerate` runs them.

    What threads take to meet is the same for both, and changes by the second where the system moves them between cores
    that share a cache and cores that don't. So while the first model takes a tenth more or less than it did at first,
    the two are measured again, five times at most.

    Args:
        first: the model to compare with.
        example_input: what both are called with, on their device.
        first_ms: the first model's latency; None measures it at the first call.
    """

    def __init__(self, first: nn.Module, example_input: Tensor, first_ms: float | None = None) -> None:
        self.x, self.first_ms = example_input, first_ms
        self.first = self.accelerated(first)

    def accelerated(self, model: nn.Module) -> nn.Module:
        return accelerate(_OneShape(copy.deepcopy(model), self.x.shape).eval(), (self.x,))

    def __call__(self, model: nn.Module) -> float:
        if self.first_ms is None:
            self.first_ms = min(latencies_in_turn([self.first], self.x)[0] for _ in range(_TRIES))
        calls = [self.accelerated(model), self.first]
        found = []
        for _ in range(_TRIES):
            ms, first_ms = latencies_in_turn(calls, self.x)
            found.append((abs(first_ms / self.first_ms - 1), ms / first_ms))
            if found[-1][0] <= _CHANGE:
                break
        return self.first_ms * min(found)[1]


class _OneShape(nn.Module):
    """Refuses other shapes, so that a capture for one picture is not tried for more, which takes most of its time."""

    def __init__(self, model: nn.Module, shape: torch.Size) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, x: Tensor):
        if x.shape != self.shape:
            raise ValueError(f"netadapt: latency is measured for {tuple(self.shape)}, got {tuple(x.shape)}")
        return self.model(x)


class _Run:
    """``state`` is what a checkpoint holds: all that the next proposal depends on."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[ChannelGroup],
        recipe: dict[str, Any],
        evaluate: Callable,
        finetune: Callable,
        log: str | os.PathLike | None,
        checkpoint: str | os.PathLike | None,
    ) -> None:
        self.first, self.groups, self.recipe = model, groups, recipe
        self.evaluate, self.finetune = evaluate, finetune
        self.log, self.file = log and Path(log), checkpoint and Path(checkpoint)
        self.latency: Callable[[nn.Module], float]
        self.state: dict[str, Any] = {
            "recipe": recipe,
            "latencies": {},  # in ms, by widths
            "first_latency_ms": None,
            "least_latency_ms": None,
            "first_accuracy": None,
            "required_ms": None,
            "widths": dict(recipe["groups"]),
            "weights": None,
            "proposals": [],
            "done": 0,  # groups of this step
            "best": None,  # of this step: the place of its row, and its weights
            "accuracy": None,  # after the last fine-tuning
        }
        if self.file is not None and self.file.exists():
            self.load()

    def load(self) -> None:
        try:
            state = torch.load(self.file, weights_only=True, map_location="cpu")
            made = dict(state["recipe"])
            state = {key: state[key] for key in self.state}
        except KeyError as error:
            raise ValueError(f"netadapt: {self.file} is no checkpoint: it has no {error}") from None
        except Exception as error:  # what torch.load raises for a file that is none of its own depends on its bytes
            raise ValueError(f"netadapt: {self.file} is no checkpoint: {first_line(error)}") from None
        others = other_facts(made, self.recipe)
        if others:
            raise ValueError(f"netadapt: {self.file} was made with another {', '.join(others)}")
        self.state = state

    def save(self) -> None:
        if self.log:
            with self.log.open("w", newline="") as opened:
                writer = csv.DictWriter(opened, COLUMNS)
                writer.writeheader()
                writer.writerows(self.state["proposals"])
        if self.file:
            new = self.file.with_name(self.file.name + ".new")
            with new.open("wb") as opened:
                torch.save(self.state, opened)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(new, self.file)  # a process that is killed while it writes leaves the checkpoint before

    def built(self, widths: dict[str, int], weights: dict[str, Tensor] | None) -> nn.Module:
        model = with_widths(self.first, self.groups, widths)
        if weights is not None:
            state = model.state_dict()  # with the versions of its layers' formats, by which some load their tensors
            state.update(weights)
            model.load_state_dict(state)
        return model

    def latency_of(self, model: nn.Module, widths: dict[str, int], again: bool = False) -> float:
        key = " ".join(map(str, widths.values()))
        known = self.state["latencies"]
        if again or key not in known:
            ms = float(self.latency(model))
            if not 0 < ms < math.inf:
                raise ValueError(f"netadapt: latency must give a positive number of ms, got {ms}")
            known[key] = ms
        return known[key]

    def accuracy_of(self, model: nn.Module) -> float:
        accuracy = float(self.evaluate(model))
        if not math.isfinite(accuracy):
            raise ValueError(f"netadapt: evaluate must give a finite number, got {accuracy}")
        return accuracy

    def begin(self) -> None:
        """The latency and accuracy to start from, and whether the target can be reached."""
        state, target, divisor = self.state, self.recipe["target_latency_ms"], self.recipe["divisor"]
        first_ms = self.latency_of(self.first, self.recipe["groups"])
        if target >= first_ms:
            raise ValueError(f"netadapt: target_latency_ms={target:g} is no less than the model's, {first_ms:.4g} ms")
        least = {name: min(_narrower(width, divisor), default=width) for name, width in self.recipe["groups"].items()}
        least_ms = self.latency_of(self.built(least, None), least)
        if target < least_ms:
            raise ValueError(
                f"netadapt: target_latency_ms={target:g} can't be reached: {least_ms:.4g} ms is the least, with all "
                f"blocks at their least width"
            )
        state["first_latency_ms"], state["least_latency_ms"] = first_ms, least_ms
        state["required_ms"] = self.recipe["delta"] * first_ms
        state["first_accuracy"] = self.accuracy_of(copy.deepcopy(self.first))
        self.save()

    def result(self, progress: Callable[..., Iterable]) -> NetAdapted:
        state, recipe = self.state, self.recipe
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            if state["required_ms"] is None:
                self.begin()
            model = self.built(state["widths"], state["weights"])
            while self.latency_of(model, state["widths"]) > recipe["target_latency_ms"]:
                model = self.step(model, progress)
            if state["accuracy"] is None:
                self.seed(0)
                self.finetune(model, recipe["final_steps"])
                state["accuracy"], state["weights"] = self.accuracy_of(model), _weights(model)
                self.save()
        return NetAdapted(
            model,
            self.latency_of(model, state["widths"]),
            state["accuracy"],
            state["first_latency_ms"],
            state["first_accuracy"],
            dict(state["widths"]),
            [dict(row) for row in state["proposals"]],
        )

    def seed(self, place: int) -> None:
        step = sum(bool(row["chosen"]) for row in self.state["proposals"])
        # Mixed to 32 bits, which is what torch's generator on the CPU takes of a seed.
        torch.manual_seed(random.Random(f"{self.recipe['seed']} {step} {place}").getrandbits(32))

    def step(self, model: nn.Module, progress: Callable[..., Iterable]) -> nn.Module:
        state = self.state
        current_ms = self.latency_of(model, state["widths"])
        way = [row for row in state["proposals"] if row["chosen"]]
        accuracy = way[-1]["accuracy"] if way else state["first_accuracy"]

        def score(row: dict[str, Any]) -> float:
            if self.recipe["rule"] == "least loss":
                return row["accuracy"]
            less_ms = current_ms - row["latency_ms"]
            return (row["accuracy"] - accuracy) / less_ms if less_ms > 0 else -math.inf

        def propose(place: int) -> None:
            group = self.groups[place]
            narrowed = self.narrowed(model, group, current_ms)
            if narrowed is not None:
                self.save()  # with the latencies
                candidate, channels = narrowed
                self.seed(1 + place)
                self.finetune(candidate, self.recipe["steps"])
                widths = state["widths"] | {group.name: channels}
                row = {
                    "step": len(way) + 1,
                    "layer": group.name,
                    "kind": group.kind,
                    "channels_before": state["widths"][group.name],
                    "channels": channels,
                    "latency_ms": self.latency_of(candidate, widths),
                    "accuracy": self.accuracy_of(candidate),
                    "score": 0.0,
                    "chosen": False,
                }
                row["score"] = score(row)
                best = state["best"]
                if best is None or row["score"] > state["proposals"][best["row"]]["score"]:
                    state["best"] = {"row": len(state["proposals"]), "weights": _weights(candidate)}
                state["proposals"].append(row)
            state["done"] = place + 1
            self.save()

        for _ in progress(propose, range(state["done"], len(self.groups))):
            pass
        best, state["best"], state["done"] = state["best"], None, 0
        if best is None:
            state["required_ms"] /= 2
            asked = self.recipe["delta"] * state["first_latency_ms"]
            if state["required_ms"] < asked / 2**_HALVINGS:
                raise RuntimeError(
                    f"netadapt: no proposal is faster than {current_ms:.4g} ms any more; the least reachable latency, "
                    f"measured with all blocks at their least width, is {state['least_latency_ms']:.4g} ms"
                )
            return model
        row = state["proposals"][best["row"]]
        widths = state["widths"] | {row["layer"]: row["channels"]}
        chosen = self.built(widths, best["weights"])
        # Anew: of many latencies the choice prefers one that was measured too low.
        row["latency_ms"] = self.latency_of(chosen, widths, again=True)
        row["score"] = score(row)
        if current_ms - row["latency_ms"] < state["required_ms"] / 2:
            self.save()  # the step is made again, and knows better
            return model
        state["widths"], state["weights"], row["chosen"] = widths, best["weights"], True
        self.save()
        return chosen

    def narrowed(self, model: nn.Module, group: ChannelGroup, current_ms: float) -> tuple[nn.Module, int] | None:
        """The model with the most channels of a group that takes less by what is required, and how many they are."""
        name, widths = group.name, self.state["widths"]
        options = [*_narrower(widths[name], self.recipe["divisor"]), widths[name]]
        most_ms = current_ms - self.state["required_ms"]

        def with_option(place: int) -> nn.Module:
            return shrink(model, group, options[place], self.recipe["keep"])

        def latency_ms(place: int) -> float:
            return self.latency_of(with_option(place), widths | {name: options[place]})

        low, high = 0, len(options) - 1
        if low == high or (low_ms := latency_ms(low)) > most_ms:
            return None
        high_ms = current_ms
        while high - low > 1:  # low is fast enough, high is not; latency is about linear in the channels
            share = (most_ms - low_ms) / (high_ms - low_ms)
            guess = low + min(max(1, int(share * (high - low))), high - low - 1)
            guess_ms = latency_ms(guess)
            if guess_ms <= most_ms:
                low, low_ms = guess, guess_ms
            else:
                high, high_ms = guess, guess_ms
        return with_option(low), options[low]


def _narrower(width: int, divisor: int) -> list[int]:
    """The numbers of channels that a width can be made into."""
    return sorted({rounded for n in range(1, width) if (rounded := make_divisible(n, divisor)) < width})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()  # which may have what is no tensor, of a module's own
    return {name: tensor.detach().clone() for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _digest(model: nn.Module) -> str:
    """Of the bytes of a model's state, in whatever memory format."""
    digest = hashlib.sha256()
    for tensor in _weights(model).values():
        there = tensor.cpu().contiguous()
        digest.update(ctypes.string_at(there.data_ptr(), there.nbytes))
    return digest.hexdigest()


def _check(model: Any, finetune: Any, evaluate: Any, latency: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"netadapt: model must be an nn.Module, got {type(model).__name__}")
    for name, function in (("finetune", finetune), ("evaluate", evaluate), ("latency", latency)):
        if not callable(function) and not (name == "latency" and function is None):
            raise TypeError(f"netadapt: {name} must be callable, got {type(function).__name__}")
