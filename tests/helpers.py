"""What several test files need: operands of every layout, cases for all pairs, torchvision beside a CPU torch."""

import itertools
import math
import random
from contextlib import contextmanager
from unittest import mock

import tolerance
import torch

from mobilenet_fast import _C, functional, reference

OPERATIONS = ("depthwise_conv2d", "pointwise_conv2d", "batch_norm_act", "squeeze_excite")
DTYPES = (torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_channels_last", "transposed")
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid")
# Around one and four vectors of 4, 8 and 16 lanes, and primes.
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 37, 63, 65, 101)
MAPS = ((1, 1), (15, 7), (7, 7), (6, 13), (1, 9))

# Odd, so that what lies behind it is not aligned.
GUARD = 37


def operand(shape, layout="contiguous", dtype=torch.float32, seed=0, low=0.1, high=1.0):
    """Values of either sign, none near zero, so that each matters; NaN lies around and between them in memory."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low
    values *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return surrounded(values.to(dtype), layout)


def surrounded(values, layout="contiguous"):
    """The same values, in this layout, with NaN around them."""
    if values.dim() == 4:
        n, c, h, w = values.shape
        view = {
            "contiguous": lambda: _middle(n, c, h, w, like=values),
            "channels_last": lambda: _middle(n, h, w, c, like=values).permute(0, 3, 1, 2),
            "sliced": lambda: _nan(n + 1, c + 3, h + 2, 2 * w + 3, like=values)[1:, 2:-1, 1:-1, 1 : 2 * w + 1 : 2],
            "sliced_channels_last": lambda: _nan(n + 1, h + 2, w + 2, c + 3, like=values).permute(0, 3, 1, 2)[
                1:, 2:-1, 1:-1, 1:-1
            ],
            "transposed": lambda: _middle(n, c, w, h, like=values).transpose(2, 3),
        }[layout]()
    else:
        view = _middle(*values.shape, like=values)
    return view.copy_(values)


def _nan(*shape, like):
    return torch.full(shape, math.nan, dtype=like.dtype)


def _middle(*shape, like):
    size = math.prod(shape)
    return _nan(size + 2 * GUARD, like=like)[GUARD : GUARD + size].view(shape)


def vector(size, dtype=torch.float32, seed=0, positive=False):
    values = operand((size,), dtype=dtype, seed=seed)
    return surrounded(values.abs()) if positive else values


def pairwise(valid=lambda **case: True, **axes):
    """Few cases in which any two values of different axes meet, where that is valid. The same list in every run."""
    chooser = random.Random(0)
    names = list(axes)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    cases = []
    while missing:
        target = min(missing)
        best, best_found = None, set()
        for _ in range(30):
            picks = [chooser.randrange(len(axes[name])) for name in names]
            for axis, value in target:
                picks[axis] = value
            found = missing.intersection(itertools.combinations(enumerate(picks), 2))
            if len(found) > len(best_found) and valid(**{n: axes[n][i] for n, i in zip(names, picks, strict=True)}):
                best, best_found = picks, found
        missing -= best_found or {target}
        if best:
            cases.append({n: axes[n][i] for n, i in zip(names, best, strict=True)})
    return cases


def case_id(case):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


def arguments(operation, layout="contiguous", dtype=torch.float32, activation="hardswish", channels=3, size=(5, 4)):
    """The arguments of the operator, in its order."""
    input = operand((2, channels, *size), layout, dtype, 0)
    if operation == "depthwise_conv2d":
        weight, bias = operand((channels * 2, 1, 3, 2), "contiguous", dtype, 1), vector(channels * 2, dtype, 2)
        return [input, weight, bias, [2, 1], [1, 1], [1, 2], activation, vector(channels * 2, dtype, 3)]
    if operation == "pointwise_conv2d":
        weight, bias = operand((4, channels, 1, 1), "contiguous", dtype, 1), vector(4, dtype, 2)
        gate = operand((2, channels, 1, 1), "contiguous", dtype, 3)
        return [input, weight, bias, activation, gate, operand((2, 4, *size), layout, dtype, 4), vector(4, dtype, 5)]
    if operation == "batch_norm_act":
        return [input, *(vector(channels, dtype, i, positive=i == 2) for i in (1, 2, 3, 4)), 1e-3, activation]
    weight1, bias1 = operand((2, channels, 1, 1), "contiguous", dtype, 1), vector(2, dtype, 2)
    weight2, bias2 = operand((channels, 2, 1, 1), "contiguous", dtype, 3), vector(channels, dtype, 4)
    return [input, weight1, bias1, weight2, bias2, "silu", activation]


def function(operation, backend=None):
    """The user's function, called with the operator's arguments."""
    call = getattr(functional, operation)
    if operation == "depthwise_conv2d":
        return lambda *a: call(*a[:6], activation=a[6], scale=a[7], backend=backend)
    if operation == "pointwise_conv2d":
        return lambda *a: call(*a[:3], activation=a[3], gate=a[4], residual=a[5], scale=a[6], backend=backend)
    if operation == "batch_norm_act":
        return lambda *a: call(*a[:5], eps=a[5], activation=a[6], backend=backend)
    return lambda *a: call(*a[:5], squeeze_activation=a[5], gate_activation=a[6], backend=backend)


def tensors(args):
    return [a for a in args if isinstance(a, torch.Tensor)]


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def check(operation, actual, args):
    """Holds a result to the reference in float64."""
    exact = getattr(reference, operation)(*double(args))
    tolerance.assert_close(actual, exact, *getattr(tolerance, operation)(*args))


def run_and_check(operation, args, isa):
    """Runs the kernel for one instruction set: right, complete, and with its operands as they were."""
    before = [a.clone() for a in tensors(args)]
    with poisoned_memory():
        actual = getattr(_C, operation)(*args, isa=isa)
    check(operation, actual, args)
    assert actual.dtype == args[0].dtype and not actual.requires_grad
    for now, then in zip(tensors(args), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    return actual


def check_gradients(operation, function, args, constants=()):
    """Gradients of all operands but these, held to the reference's in float64."""

    def gradients(f, args, weigh=1.0):
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        leaves = [a.requires_grad_() for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i not in constants]
        output = f(*args)
        grad = torch.linspace(1, 2, max(1, output.numel()), dtype=output.dtype)[: output.numel()].view(output.shape)
        return torch.autograd.grad(output, leaves, grad * weigh)

    def scale(*args):
        return getattr(tolerance, operation)(*args)[1]

    formula = getattr(reference, operation)
    magnitudes = [a.double().abs() if isinstance(a, torch.Tensor) else a for a in args]
    largest = 1 + scale(*magnitudes)
    terms = gradients(scale, [torch.ones_like(a) if isinstance(a, torch.Tensor) else a for a in magnitudes])
    scales = gradients(scale, magnitudes, weigh=largest)
    actual, expected = gradients(function, args), gradients(formula, double(args))
    for got, wanted, count, size in zip(actual, expected, terms, scales, strict=True):
        # The derivative of the activation is taken at a result that itself errs by its number of terms.
        tolerance.assert_close(got, wanted, count + args[1][0].numel() + 2, size)


@contextmanager
def poisoned_memory():
    """New tensors come filled with NaN, so that an element which an operator forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def skeleton(tensor, dtype=torch.float32):
    """A tensor of ones with exactly these sizes and strides: torch's choice of a layout looks at nothing else."""
    if tensor is None:
        return None
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype).fill_(1)


def strides(tensor):
    """The strides that mean something: not those of a dimension with one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def import_torchvision():
    """torchvision, whose wheel expects CUDA torch: without it, the operators that it describes are missing.

    Its models need none of them, so their descriptions are passed over.
    """
    register_fake = torch.library.register_fake

    def lenient(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    with mock.patch.object(torch.library, "register_fake", lenient):
        import torchvision
    return torchvision


def import_transformers():
    import_torchvision()
    import transformers

    return transformers


def import_timm():
    """timm, which imports torchvision."""
    import_torchvision()
    import timm

    return timm
