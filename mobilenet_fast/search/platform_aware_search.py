"""Search for accurate networks that are fast on this machine: MnasNet (Tan et al., 2019, arXiv:1807.11626)."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..messages import no_such
from ..progress import with_progress
from .controller import METHODS
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
    workers: int = 0,
    at_once: int = 4,
    log: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Tries networks of a space and learns from their `reward` which to try next.

    The log is the checkpoint. A search depends on its seed and on the results of its trials alone, so that the same
    call with a log of earlier trials makes the same proposals again, takes their results from there, in no time, and
    goes on where the log ends: nothing is lost but trials that were under way, and the result is that of a search
    without the interruption. Before each evaluation torch's generator is seeded by the search's seed and the trial's
    number.

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
        workers: processes that evaluate, on an equal share of torch's threads each; 0 evaluates in this one.
        at_once: networks that are proposed before the result of any is known, whatever number of workers.
        log: of a CSV file that gets a line when a trial ends; None keeps none.
        seed: of all that is drawn.
        progress: a bar on stderr.

    Raises:
        ValueError: an argument is out of range, no network of the space is as fast as ``target_ms``, ``evaluate`` gives
            no number of 0 or more, or ``log`` is of another search.
    """
    for name, value, least in (("trials", trials, 1), ("workers", workers, 0), ("at_once", at_once, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"platform_aware_search: {name} must be an integer of at least {least}, got {value!r}")
    if method not in METHODS:
        raise ValueError(f"platform_aware_search: {no_such('method', method, METHODS)}")
    reward(1.0, 1.0, target_ms, reward_exponent)  # raises what is out of range
    predict = latency.predict if isinstance(latency, LatencyTable) else latency
    least = least_latency(space, predict, target_ms)
    if least > target_ms:
        raise ValueError(
            f"platform_aware_search: no network of {space.name} takes {target_ms:g} ms; "
            f"the least found is {least:.3g} ms"
        )
    book = _Log(None if log is None else Path(log))
    proposer = METHODS[method](space, seed)
    done: list[Trial] = []
    known: dict[Choices, float] = {}

    def batch(start: int) -> None:
        proposed = proposer.propose(min(at_once, trials - start))
        todo: dict[int, Choices] = {}
        accuracies: dict[int, float] = {}
        for number, choices in enumerate(proposed, start):
            if number in book.rows:
                logged, accuracies[number], _ = book.rows[number]
                if logged != choices:
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
            ms = book.rows[number][2] if number in book.rows else predict(architecture)
            value = reward(accuracies[number], ms, target_ms, reward_exponent)
            return Trial(number, choices, architecture, accuracies[number], ms, value)

        for number, accuracy in run({number: space.architecture(c) for number, c in todo.items()}):
            accuracies[number] = _checked(accuracy)
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


def _checked(accuracy: float) -> float:
    try:
        value = float(accuracy)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"platform_aware_search: evaluate must give a number of 0 or more, got {accuracy!r}")
    return value


class _Log:
    """Trials by number in a CSV file, each line written at once; a line that was cut off is dropped."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[int, tuple[Choices, float, float]] = {}
        if path is None:
            return
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        lines = list(csv.reader(whole.splitlines()))
        if lines and tuple(lines[0]) != COLUMNS:
            raise ValueError(f"platform_aware_search: {path} is no log of a search")
        try:
            for number, accuracy, ms, _, choices, _ in lines[1:]:
                self.rows[int(number)] = tuple(map(int, choices.split())), float(accuracy), float(ms)
        except ValueError as error:
            raise ValueError(f"platform_aware_search: {path} is no log of a search ({error})") from None
        if whole != text or not lines:
            path.write_text(whole or ",".join(COLUMNS) + "\n")

    def write(self, trial: Trial) -> None:
        if self.path is None or trial.number in self.rows:
            return
        self.rows[trial.number] = trial.choices, trial.accuracy, trial.latency_ms
        values = trial.number, trial.accuracy, trial.latency_ms, trial.reward
        with self.path.open("a", newline="") as opened:
            choices = " ".join(map(str, trial.choices))
            csv.writer(opened, lineterminator="\n").writerow([*values, choices, trial.architecture])


class _runner:
    """``run(architectures by number)`` gives pairs of number and accuracy as they come."""

    def __init__(self, evaluate: Callable[[nn.Module], float], workers: int, seed: int) -> None:
        self.evaluate, self.seed, self.pool = evaluate, seed, None
        if workers:
            threads = max(1, torch.get_num_threads() // workers)
            context = torch.multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,))

    def __enter__(self) -> Callable[[dict[int, Architecture]], Iterator[tuple[int, float]]]:
        return self.run

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, architectures: dict[int, Architecture]) -> Iterator[tuple[int, float]]:
        jobs = {n: (self.evaluate, a, self.seed + 1_000_003 * n) for n, a in architectures.items()}
        if self.pool is None:
            for number, job in jobs.items():
                yield number, _evaluate(*job)
            return
        futures = {self.pool.submit(_evaluate, *job): number for number, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _evaluate(evaluate: Callable[[nn.Module], float], architecture: Architecture, seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return evaluate(architecture.build())
