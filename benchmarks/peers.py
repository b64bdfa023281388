"""Who runs a case. A peer turns a problem into a call without arguments that returns the output as a torch tensor.

A peer of another runtime is one more function here: ``needs`` names the module it can't do without, and its
preparation (conversion, compilation) belongs before the ``return``. Its thread count is ``threads``, as is
OMP_NUM_THREADS.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases import Problem


@dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[[Problem, int], Callable[[], torch.Tensor]]
    suites: tuple[str, ...]
    needs: str | None
    is_model: bool  # False: not the same computation, only something to compare with

    def available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


PEERS: dict[str, Peer] = {}
EVERYWHERE = ("demo", "models", "operators")


def peer(name: str, suites=EVERYWHERE, needs: str | None = None, is_model: bool = True):
    def register(prepare):
        PEERS[name] = Peer(name, prepare, suites, needs, is_model)
        return prepare

    return register


def channels_last(tensors):
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)


@peer("eager")
def eager(problem, threads):
    return lambda: problem.module(*problem.inputs)


@peer("eager channels_last")
def eager_channels_last(problem, threads):
    module = copy.deepcopy(problem.module).to(memory_format=torch.channels_last)
    inputs = channels_last(problem.inputs)
    return lambda: module(*inputs)


@peer("torch.compile freezing")
def compile_freezing(problem, threads):
    import torch._inductor.config

    torch._inductor.config.freezing = True
    compiled = torch.compile(copy.deepcopy(problem.module))
    compiled(*problem.inputs)
    return lambda: compiled(*problem.inputs)


@peer("replace_layers", suites=("models",), needs="mobilenet_fast")
def replace_layers(problem, threads):
    import mobilenet_fast

    module = copy.deepcopy(problem.module).to(memory_format=torch.channels_last)
    module = mobilenet_fast.replace_layers(module)
    inputs = channels_last(problem.inputs)
    return lambda: module(*inputs)


@peer("accelerate", suites=("demo", "models"), needs="mobilenet_fast")
def accelerate(problem, threads):
    import mobilenet_fast

    fast = mobilenet_fast.accelerate(problem.module, problem.inputs)
    return lambda: fast(*problem.inputs)


@peer("functional", suites=("operators",), needs="mobilenet_fast")
def functional(problem, threads):
    return lambda: problem.fused(*problem.inputs)


@peer("functional channels_last", suites=("operators",), needs="mobilenet_fast")
def functional_channels_last(problem, threads):
    inputs = channels_last(problem.inputs)
    return lambda: problem.fused(*inputs)


@peer("copy", suites=("operators",), is_model=False)
def copy_input(problem, threads):
    """One read and one write of a tensor of the input's size: what memory allows."""
    target = torch.empty_like(problem.inputs[0])
    return lambda: target.copy_(problem.inputs[0])


@peer("clone", suites=("operators",), is_model=False)
def clone_input(problem, threads):
    """The same into fresh memory, which all the others' outputs are: for small maps the allocator can take longer."""
    return lambda: problem.inputs[0].clone()
