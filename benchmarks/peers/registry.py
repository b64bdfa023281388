"""What a peer is, and the list of them."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Problem
from benchmarks.cases.registry import version

EVERYWHERE = ("demo", "models", "layers", "operators", "zoo")


class Unsupported(Exception):
    """This peer has nothing that runs this case."""


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def numpy(tensor: torch.Tensor) -> Any:
    return tensor.numpy()


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[..., Callable[[Any], Any]]  # problem, threads[, folder of the conversion] → what is timed
    suites: tuple[str, ...]
    needs: tuple[str, ...]  # packages as pip names them
    given: Callable[[torch.Tensor], Any]  # an input as its user has it: in its own layout and type
    convert: Callable[[Problem, Path], None] | None  # writes the model into a folder, once
    ours: bool
    is_model: bool  # False: not the same computation, only something to compare with
    tolerance: float  # how many times eager float32's own error its outputs may be off

    def missing(self) -> list[str]:
        return [package for package in self.needs if version(package) is None]

    def conversion(self, case: Case, batch: int) -> Path | None:
        """Where its model is kept, beside the problem; one for each version of its packages and way of converting."""
        folder = case.folder(batch)
        if self.convert is None or folder is None:
            return None
        way = hashlib.sha256(inspect.getsource(self.convert).encode()).hexdigest()[:8]
        return folder / "-".join([self.name, *(version(package) or "" for package in self.needs), way]).replace(
            " ", "_"
        )


PEERS: dict[str, Peer] = {}


def peer(
    name: str,
    suites: tuple[str, ...] = EVERYWHERE,
    needs: tuple[str, ...] = (),
    given: Callable[[torch.Tensor], Any] = same,
    convert: Callable[[Problem, Path], None] | None = None,
    ours: bool = False,
    is_model: bool = True,
    tolerance: float = 4,
):
    def register(prepare):
        PEERS[name] = Peer(name, prepare, suites, needs, given, convert, ours, is_model, tolerance)
        return prepare

    return register
