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
ON_CUDA = ("models", "layers", "operators")


class Unsupported(Exception):
    """This peer has nothing that runs this case."""


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def numpy(tensor: torch.Tensor) -> Any:
    return tensor.numpy()


def as_tensor(output: Any) -> Any:
    """What a call gave as PyTorch's: one tensor, or those of a tuple."""
    return output if isinstance(output, tuple) else torch.as_tensor(output)


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
    tolerance: float  # how many times eager's own error in the same dtype its outputs may be off
    graph: bool = False  # replayed from CUDA graphs
    returned: Callable[[Any], Any] = as_tensor  # what a call gives as PyTorch's
    wait: Callable[[Any], Any] | None = None  # for what a call gives, of a runtime with a CUDA stream of its own

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
CUDA_PEERS: dict[str, Peer] = {}


def peers_of(device: str) -> dict[str, Peer]:
    return {"cpu": PEERS, "cuda": CUDA_PEERS}[device]


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


def cuda_peer(
    name: str,
    suites: tuple[str, ...] = ON_CUDA,
    needs: tuple[str, ...] = (),
    given: Callable[[torch.Tensor], Any] = same,
    ours: bool = False,
    is_model: bool = True,
    **options: Any,
):
    def register(prepare):
        CUDA_PEERS[name] = Peer(name, prepare, suites, needs, given, None, ours, is_model, 4, **options)
        return prepare

    return register
