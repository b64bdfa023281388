"""What a case is, and the list of them."""

import copy
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

CACHE = Path(__file__).parents[2] / "build" / "benchmarks"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def error_of(output: Tensor, exact: Tensor) -> float:
    """The largest error as a share of the largest output."""
    return ((output.double() - exact).abs().max() / exact.abs().max()).item()


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# All but the first are timed with the forward that they need: what a step of training spends on the layer.
DIRECTIONS = ("forward", "forward+input", "forward+weight", "forward+both", "training")


@dataclass(frozen=True)
class Setting:
    """What a case is run under. ``direction``: the forward alone, or followed by the gradients of the input, of the
    weight, or of both; "training" is a batch norm's by the statistics of its batch, with all gradients."""

    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    direction: str = "forward"

    @property
    def label(self) -> str:
        if self.device == "cpu":
            return f"{self.threads} thread(s) · batch {self.batch}"
        return f"{self.dtype} · batch {self.batch} · {self.direction}"


@dataclass
class Problem:
    """A plain PyTorch module of one input, which every peer takes as its starting point.

    Inputs are taken in turn, so that no peer finds the last call's in its caches. ``fused``, for operators, is the same
    computation by `mobilenet_fast.functional`, and ``layer`` makes the layer of this package that trains as the module.
    """

    module: nn.Module
    inputs: list[Tensor]
    fused: Callable[[Tensor], Tensor] | None = None
    layer: Callable[[], nn.Module] | None = None
    exact: list[Tensor] = field(init=False)  # float64 outputs of the first two inputs
    eager_error: float = field(init=False)
    macs: int = field(init=False, default=0)
    bytes: int = field(init=False, default=0)

    @torch.no_grad()
    def solve(self) -> "Problem":
        """Fills in what peers are held to, and the multiply-adds and traffic of convolutions and linear layers.

        Traffic is that of layer by layer, each reading its input and weight and writing its output once.
        """

        self.macs, self.bytes = traffic(self.module, self.inputs[0])
        double = copy.deepcopy(self.module).double()
        self.exact = [double(x.double()) for x in self.inputs[:2]]
        pairs = zip(self.inputs, self.exact, strict=False)  # of four inputs, two have exact outputs
        self.eager_error = max(error_of(self.module(x), exact) for x, exact in pairs)
        return self

    def error_of(self, outputs: list[Tensor]) -> float:
        """The largest error of the outputs of ``inputs``; NaN if any is."""
        errors = [error_of(output, exact) for output, exact in zip(outputs, self.exact, strict=False)]
        return torch.tensor(errors).max().item()

    def allowed(self, tolerance: float = 4) -> float:
        return max(1e-5, tolerance * self.eager_error)


@torch.no_grad()
def traffic(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """Multiply-adds of convolutions and linear layers, and the bytes of their inputs, weights and outputs."""
    macs = size = 0

    def count(layer, inputs, output):
        nonlocal macs, size
        macs += output.numel() * layer.weight[0].numel()
        size += output.element_size() * (inputs[0].numel() + layer.weight.numel() + output.numel())

    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    module(x)
    for hook in hooks:
        hook.remove()
    return macs, size


@dataclass(frozen=True)
class Case:
    suite: str
    name: str
    make: Callable[[int], Problem]  # batch size → problem
    recipe: str | None = None  # of a case kept on disk: the source it was made by
    models: tuple[str, ...] = ()  # of a layer: who has it
    devices: tuple[str, ...] = ("cpu", "cuda")
    directions: tuple[str, ...] = ("forward",)
    batches: tuple[int, ...] = ()  # those that it is for, whatever is asked
    dtypes: tuple[str, ...] = ()  # likewise

    def folder(self, batch: int) -> Path | None:
        """Where the problem and its conversions are kept; another folder once anything that it is made by changes."""
        if self.recipe is None:
            return None
        made_by = [self.recipe, *(f"{p}={version(p)}" for p in ("torch", "torchvision", "timm"))]
        return CACHE / f"{self.name}-batch{batch}-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:12]}"

    def problem(self, batch: int) -> Problem:
        """The same weights and inputs in every process. Networks come from disk: their statistics would else differ in
        the last bits with the number of threads, and float64 outputs take seconds."""
        folder = self.folder(batch)
        file = folder and folder / "problem.pt"
        if file and file.exists():
            from benchmarks import third_party

            if version("timm"):
                third_party.timm()
            return torch.load(file, weights_only=False)
        torch.manual_seed(0)
        problem = self.make(batch).solve()
        if file:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(problem, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
        return problem


CASES: dict[tuple[str, str], Case] = {}


def case(suite: str, name: str, recipe: str | None = None, directions: tuple[str, ...] = ("forward",)):
    def register(make):
        CASES[suite, name] = Case(suite, name, make, recipe, directions=directions)
        return make

    return register


def inputs(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(4)]
