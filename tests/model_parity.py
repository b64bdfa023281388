"""Comparing networks so that a difference can show.

A network with default initialisation and made-up statistics forgets its input: any other would give the same logits.
"""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def randomise_batch_norm(model, seed, shape=(8, 3, 96, 96)):
    """Random weight and bias for every batch norm, and the running statistics of random pictures of that shape.

    Returns the model, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        if norm.affine:
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.normal_(0, 0.3, generator=generator)
        norm.reset_running_stats()
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.momentum = None  # the average of all batches
    with torch.no_grad():
        for _ in range(2):
            model(pictures(*shape, seed=generator).to(next(model.parameters())))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def pictures(*shape, seed=0):
    """Noise of several scales, each picture with a brightness and contrast of its own."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    picture = torch.zeros(shape)
    for scale in (1, 4, 16):
        noise = torch.randn(n, c, -(-h // scale), -(-w // scale), generator=generator)
        picture += nn.functional.interpolate(noise, scale_factor=scale)[..., :h, :w]
    return picture * (0.5 + torch.rand(n, 1, 1, 1, generator=generator)) + torch.randn(n, c, 1, 1, generator=generator)


def assert_parity(model, fast, inputs):
    """``fast`` computes what ``model`` computes in float64, as well as float32 can.

    ``inputs`` is a batch of at least two different pictures, or a list of inputs. Their outputs must differ by a tenth
    of the largest, and ``fast`` may err by 1e-5 of the largest or four times what eager float32 errs.
    """
    batches = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    doubled = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = [tree_leaves(doubled(x.double())) for x in batches]
        eager = [tree_leaves(model(x.clone())) for x in batches]
        actual = [tree_leaves(fast(x.clone())) for x in batches]
    first = exact[0][0] if len(batches) == 1 else torch.cat([leaves[0] for leaves in exact])
    spread = (first[0] - first[1:]).abs().max() / first.abs().max()
    assert spread >= 0.1, f"the model forgets its input: outputs of two inputs differ by {spread:.1e} of the largest"
    for y64s, eagers, ys in zip(exact, eager, actual, strict=True):
        for y64, y32, y in zip(y64s, eagers, ys, strict=True):
            assert y.shape == y32.shape and y.dtype == y32.dtype, (y.shape, y.dtype, y32.shape, y32.dtype)
            largest = y64.abs().max()
            error, eager_error = ((z.double() - y64).abs().max() / largest for z in (y, y32))
            allowed = max(1e-5, 4 * eager_error)
            assert error <= allowed, f"errs by {error:.2e} of the largest output, allowed is {allowed:.2e}"
