"""This package: what users call."""

import copy

import torch

from benchmarks.peers.registry import Unsupported, channels_last, peer


@peer("replace_layers", suites=("models",), given=channels_last, ours=True)
def replace_layers(problem, threads):
    import mobilenet_fast

    return mobilenet_fast.replace_layers(copy.deepcopy(problem.module).to(memory_format=torch.channels_last))


# Networks get the image as users have it; between layers maps are channels_last.
@peer("accelerate", suites=("demo", "models", "zoo"), ours=True)
@peer("accelerate channels_last", suites=("layers",), given=channels_last, ours=True)
def accelerate(problem, threads):
    import mobilenet_fast

    return mobilenet_fast.accelerate(problem.module, (problem.inputs[0],))


def fused(problem, threads):
    if problem.fused is None:
        raise Unsupported("no function of this operation")
    return problem.fused


peer("functional", suites=("operators",), ours=True)(fused)
peer("functional channels_last", suites=("layers", "operators"), given=channels_last, ours=True)(fused)
