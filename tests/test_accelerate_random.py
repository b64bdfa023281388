"""Random networks, on every instruction set; ``random_network`` draws as many more as one likes."""

import copy

import pytest
import torch
from helpers import poisoned_memory
from random_network import RandomNetwork

from mobilenet_fast import _C, accelerate
from mobilenet_fast.accelerate import module as accelerate_module


@pytest.mark.parametrize("seed", range(10))
def test_random_networks(isa, threads, monkeypatch, seed):
    monkeypatch.setattr(_C, "cpu_isa", lambda: isa)
    if seed % 2:  # blocks run as one step however small they are
        monkeypatch.setattr(_C, "l2_cache_bytes", lambda: 0)
    model = RandomNetwork(seed)
    n, c, h, w = model.input_shape
    x = torch.randn(n, c, h, 2 * w)[..., ::2] if seed % 3 else torch.randn(n, c, h, w)
    x = x.to(memory_format=torch.channels_last) if seed % 3 == 1 else x
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), poisoned_memory():
        fast = accelerate(model)
        fast(torch.full_like(x, float("nan")))  # what the next call finds in the arena
        results = []
        for count in (1, 2):
            threads(count)
            results.append(_flat(fast(x)))
        eager, exact = _flat(model(x.clone())), _flat(exact(x.double()))
    assert fast.explain().isa == isa
    for y, again, y32, y64 in zip(*results, eager, exact, strict=True):
        assert torch.equal(y, again) and y.shape == y32.shape
        error, eager_error = ((z.double() - y64).abs().max() for z in (y, y32))
        assert error <= max(4e-6 * y64.abs().max(), 4 * eager_error), model.names


def test_they_would_show_a_mistake(monkeypatch):
    """One weight that is off by a thousandth of the largest shows, unless an activation cuts off what it changes."""
    noticed, optimise = [], accelerate_module.optimise
    for seed in range(8):
        model = RandomNetwork(seed)
        x = torch.randn(model.input_shape)

        def mutant(graph, seed=seed):
            layers = [node for node in optimise(graph).nodes if "weights" in node.attrs]
            name = layers[seed % len(layers)].attrs["weights"].weight
            weight = graph.constants[name].clone()
            weight.view(-1)[seed % weight.numel()] += 0.001 * weight.abs().max()
            graph.constants[name] = weight
            return graph

        with torch.no_grad():
            fast = accelerate(model)
            plain = _flat(fast(x))
            with monkeypatch.context() as patch:
                patch.setattr(accelerate_module, "optimise", mutant)
                changed = _flat(fast.refresh()(x))
        noticed.append(any((a - b).abs().max() > 4e-6 * a.abs().max() for a, b in zip(plain, changed, strict=True)))
    assert sum(noticed) >= 6


def _flat(output):
    values, pooled = output
    return [*values, pooled]
