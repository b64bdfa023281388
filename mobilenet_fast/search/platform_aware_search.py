"""Search for accurate networks that are fast on this machine: MnasNet (Tan et al., 2019, arXiv:1807.11626)."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing.connection
import numbers
import os
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..messages import first_line, no_such
from ..progress import with_progress
from .controller import METHODS
from .facts import note_facts, other_facts
from .latency import LatencyTable
from .reward import reward
from .space import Architecture, Choices, SearchSpace

COLUMNS = ("trial", "accuracy", "latency_ms", "reward", "choices", "network")


@dataclass(frozen=True)
class Trial:
    """A network that was tried, by its number in the search."""

    number: int
    choices: Choices
    architecture: Architecture
    accuracy: float
    latency_ms: float
    reward: float


@dataclass(frozen=True)
class SearchResult:
    """All trials in their order."""

    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """That of the highest reward, the first of them."""
        return max(self.trials, key=lambda trial: trial.reward)

    @property
    def pareto(self) -> list[Trial]:
        """Those than which none is both as fast and as accurate and better in one, from fast to slow."""
        front: list[Trial] = []
        for trial in sorted(self.trials, key=lambda trial: (trial.latency_ms, -trial.accuracy, trial.number)):
            if not front or trial.accuracy > front[-1].accuracy:
                front.append(trial)
        return front


def platform_aware_search(
    space: SearchSpace,
    evaluate: Callable[[nn.Module], float],
    latency: LatencyTable | Callable[[Architecture], float],
    target_ms: float,
    trials: int,
    *,
    method: str = "controller",
    reward_exponent: float = -0.07,
    workers: int | Any = 0,
    at_once: int = 4,
    log: str | os.PathLike | None = None,
    note: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Tries networks of a space and learns from their `reward` which to try next.

    The log is the checkpoint. A search depends on its seed and on the results of its trials alone, so that the same
    call with a log of earlier trials makes the same proposals again, takes their results from there, in no time, and
    goes on where the log ends: nothing is lost but trials that were under way, and the result is that of a search
    without the interruption. What the search is lies beside the log, in a file of its name and ".json"; ``trials``,
    ``workers`` and ``progress`` are none of it, nor is a table's `calibrate`: trials keep the latency logged. Before
    each evaluation torch's generator is seeded by the search's seed and the trial's number.

    Args:
        space: what to choose from.
        evaluate: takes a network with fresh weights, trains it as it likes, and gives its accuracy, 0 or more. With
            workers it has to be importable by name.
        latency: a table, or what gives the ms of an `Architecture`.
        target_ms: the latency wanted.
        trials: how many networks to try. A network that comes again counts, and is not evaluated again.
        method: "controller", an RNN trained by REINFORCE with a baseline (`Controller`); "evolution", aging evolution
            of 16 members (arXiv:1802.01548); "random".
        reward_exponent: see `reward`; -0.15 for small networks.
        workers: processes that evaluate, on an equal share of torch's threads each; 0 evaluates in this one. Or a pool
            of one's own, as `multiprocessing.Pool` is, for example a cluster's ``ray.util.multiprocessing.Pool()``.
        at_once: networks that are proposed before the result of any is known, whatever number of workers.
        log: of a CSV file that gets a line when a trial ends; None keeps none.
        note: what ``evaluate``, and a ``latency`` that is no table, depend on, such as data and steps, as numbers and
            strings by name: a log with another note is refused.
        seed: of all that is drawn.
        progress: a bar on stderr.

    Raises:
        TypeError: ``space`` is none, ``evaluate`` or ``latency`` can't be called, or ``note`` is nothing for JSON.
        ValueError: an argument is out of range, no network of the space is as fast as ``target_ms``, ``evaluate`` gives
            no number of 0 or more, or ``log`` is of another search.
    """
    if not isinstance(space, SearchSpace):
        raise TypeError(f"platform_aware_search: space must be a SearchSpace, got {type(space).__name__}")
    predicts = latency.predict if isinstance(latency, LatencyTable) else latency
    for name, function in (("evaluate", evaluate), ("latency", predicts)):
        if not callable(function):
            raise TypeError(f"platform_aware_search: {name} must be callable, got {type(function).__name__}")

    def predict(architecture: Architecture) -> float:
        return _number("latency", predicts(architecture))

    for name, value in (("target_ms", target_ms), ("reward_exponent", reward_exponent)):
        if not isinstance(value, numbers.Real):
            raise ValueError(f"platform_aware_search: {name} must be a number, got {value!r}")
    own_pool = hasattr(workers, "imap_unordered")
    numbers_of = ("trials", trials, 1), ("workers", 0 if own_pool else workers, 0), ("at_once", at_once, 1)
    for name, value, least in numbers_of:
        if not isinstance(value, int) or value < least:
            raise ValueError(f"platform_aware_search: {name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"platform_aware_search: seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
    if method not in METHODS:
        raise ValueError(f"platform_aware_search: {no_such('method', method, METHODS)}")
    reward(1.0, 1.0, target_ms, reward_exponent)  # raises what is out of range
    facts = {
        **note_facts("platform_aware_search", note),
        **{f"space.{name}": value for name, value in asdict(space).items()},
        "target_ms": float(target_ms),
        "reward_exponent": float(reward_exponent),
        "method": method,
        "seed": seed,
        "at_once": at_once,
    }
    if isinstance(latency, LatencyTable):
        facts |= {f"latency.{name}": value for name, value in asdict(latency.conditions).items()}
        facts["latency.size"] = latency.size
    least = least_latency(space, predict, target_ms)
    if least > target_ms:
        raise ValueError(
            f"platform_aware_search: no network of {space.name} takes {target_ms:g} ms; "
            f"the least found is {least:.3g} ms"
        )
    book = _Log(None if log is None else Path(log), facts)
    proposer = METHODS[method](space, seed)
    done: list[Trial] = []
    known: dict[Choices, float] = {}

    def batch(start: int) -> None:
        proposed = proposer.propose(at_once)[: trials - start]  # all, so that more trials would go on from the same
        todo: dict[int, Choices] = {}
        accuracies: dict[int, float] = {}
        for number, choices in enumerate(proposed, start):
            if number in book.rows:
                *logged, accuracies[number], _ = book.rows[number]
                if logged != [choices, str(space.architecture(choices))]:
                    raise ValueError(
                        f"platform_aware_search: {log} is the log of another search, from trial {number} on"
                    )
            elif choices in known:
                accuracies[number] = known[choices]
            elif choices not in todo.values():
                todo[number] = choices

        def trial(number: int) -> Trial:
            choices = proposed[number - start]
            architecture = space.architecture(choices)
            ms = book.rows[number][-1] if number in book.rows else predict(architecture)
            value = reward(accuracies[number], ms, target_ms, reward_exponent)
            return Trial(number, choices, architecture, accuracies[number], ms, value)

        for number, accuracy in run({number: space.architecture(c) for number, c in todo.items()}):
            accuracies[number] = _number("evaluate", accuracy)
            book.write(trial(number))
        known.update({proposed[number - start]: accuracy for number, accuracy in accuracies.items()})
        for number, choices in enumerate(proposed, start):
            if number not in accuracies:
                accuracies[number] = known[choices]
            found = trial(number)
            book.write(found)
            done.append(found)
        proposer.learn(proposed, [found.reward for found in done[start:]])

    with _runner(evaluate, workers, seed) as run:
        starts = range(0, trials, at_once)
        for _ in with_progress(batch, starts, f"{method} ") if progress else map(batch, starts):
            pass
    return SearchResult(tuple(done))


def least_latency(space: SearchSpace, predict: Callable[[Architecture], float], enough: float = 0.0) -> float:
    """The latency of a network that no single other option makes faster; the search for it ends at ``enough`` ms.

    As parts add up, decisions hardly depend on each other but through the channels between two blocks.
    """
    choices = tuple(0 for _ in space.decisions)
    best = predict(space.architecture(choices))
    improved = True
    while improved and best > enough:
        improved = False
        for place, (_, options) in enumerate(space.decisions):
            for option in range(len(options)):
                other = (*choices[:place], option, *choices[place + 1 :])
                ms = predict(space.architecture(other)) if other != choices else best
                if ms < best:
                    choices, best, improved = other, ms, True
    return best


def _number(name: str, given: Any) -> float:
    """What a function of the caller's gave, which may be a tensor of one element."""
    try:
        value = float(given)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"platform_aware_search: {name} must give a number of 0 or more, got {given!r}")
    return value


class _Log:
    """Trials by number in a CSV file, each line written at once, where a line that was cut off is dropped; and what the
    search is, in a JSON file beside it."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path = path
        self.rows: dict[int, tuple[Choices, str, float, float]] = {}
        if path is None:
            return
        header = ",".join(COLUMNS) + "\n"
        try:
            text = path.read_text() if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if not (whole.startswith(header) if whole else header.startswith(text)):
                raise ValueError(f"its first line is not {header.strip()}")
            for number, accuracy, ms, _, choices, network in csv.reader(whole.splitlines()[1:]):
                self.rows[int(number)] = tuple(map(int, choices.split())), network, float(accuracy), float(ms)
        except ValueError as error:
            raise ValueError(f"platform_aware_search: {path} is no log of a search ({error})") from None
        beside = path.with_name(path.name + ".json")
        there = self.facts(beside) if self.rows or beside.exists() else {}
        if self.rows:
            self.compare(there, json.loads(json.dumps(facts)))
        else:
            new = beside.with_name(beside.name + ".new")
            new.write_text(json.dumps(facts, indent=1) + "\n")
            os.replace(new, beside)  # a process that is killed while it writes leaves none, or a whole one
        if whole != text or not whole:
            path.write_text(whole or header)

    def facts(self, beside: Path) -> dict[str, Any]:
        try:
            found = json.loads(beside.read_text())
            if not isinstance(found, dict) or "at_once" not in found:
                raise ValueError("it is none of a search's")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"platform_aware_search: {beside} does not say which search {self.path} is of ({first_line(error)})"
            ) from None
        return found

    def compare(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        def said(facts: dict[str, Any], name: str) -> str:
            return textwrap.shorten(json.dumps(facts[name]), 60, placeholder=" …") if name in facts else "not given"

        others = [f"{name} {said(there, name)}, here {said(here, name)}" for name in other_facts(there, here)]
        if others:
            raise ValueError(f"platform_aware_search: {self.path} is the log of another search: {'; '.join(others)}")

    def write(self, trial: Trial) -> None:
        if self.path is None or trial.number in self.rows:
            return
        self.rows[trial.number] = trial.choices, str(trial.architecture), trial.accuracy, trial.latency_ms
        values = trial.number, trial.accuracy, trial.latency_ms, trial.reward
        with self.path.open("a", newline="") as opened:
            choices = " ".join(map(str, trial.choices))
            csv.writer(opened, lineterminator="\n").writerow([*values, choices, trial.architecture])


class _runner:
    """``run(architectures by number)`` gives pairs of number and accuracy as they come."""

    def __init__(self, evaluate: Callable[[nn.Module], float], workers: int | Any, seed: int) -> None:
        self.evaluate, self.seed, self.pool, self.own_pool = evaluate, seed, None, None
        if hasattr(workers, "imap_unordered"):
            self.own_pool = workers
        elif workers:
            threads = max(1, torch.get_num_threads() // workers)
            context = torch.multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, _start_worker, (threads,))

    def __enter__(self) -> Callable[[dict[int, Architecture]], Iterator[tuple[int, float]]]:
        return self.run

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, architectures: dict[int, Architecture]) -> Iterator[tuple[int, float]]:
        jobs = {n: (self.evaluate, a, self.seed + 1_000_003 * n) for n, a in architectures.items()}
        if self.own_pool is not None:
            yield from self.own_pool.imap_unordered(_numbered, jobs.items())
            return
        if self.pool is None:
            for number, job in jobs.items():
                yield number, _evaluate(*job)
            return
        futures = {self.pool.submit(_evaluate, *job): number for number, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A search that is killed can't end its workers."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _numbered(job: tuple[int, tuple]) -> tuple[int, float]:
    number, arguments = job
    return number, _evaluate(*arguments)


def _evaluate(evaluate: Callable[[nn.Module], float], architecture: Architecture, seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return evaluate(architecture.build())
