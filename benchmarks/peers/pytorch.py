"""PyTorch by itself."""

import copy

import torch

from benchmarks.peers.registry import channels_last, peer


@peer("eager", suites=("demo", "models", "operators"))
def eager(problem, threads):
    return problem.module


@peer("eager channels_last", given=channels_last)
def eager_channels_last(problem, threads):
    return copy.deepcopy(problem.module).to(memory_format=torch.channels_last)


@peer("torch.compile freezing", suites=("demo", "models", "operators", "zoo"))
def compile_freezing(problem, threads):
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return torch.compile(copy.deepcopy(problem.module))


@peer("copy", suites=("operators",), is_model=False)
def copy_input(problem, threads):
    """One read and one write of a tensor of the input's size: what memory allows."""
    target = torch.empty_like(problem.inputs[0])
    return target.copy_


@peer("clone", suites=("operators",), is_model=False)
def clone_input(problem, threads):
    """The same into fresh memory, which all the others' outputs are: for small maps the allocator can take longer."""
    return torch.Tensor.clone
