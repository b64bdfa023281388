"""Each activation, on a sweep of arguments, through a batch norm that changes nothing."""

import pytest
import tolerance
import torch
from helpers import ACTIVATIONS, DTYPES, surrounded

from mobilenet_fast import _C, reference

FORMULAS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "silu": lambda x: x / (1 + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


def sweep(dtype):
    tiny = torch.finfo(dtype).tiny
    near = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    far = torch.logspace(0, 2.9, 400, dtype=torch.float64)
    special = torch.tensor([0.0, tiny, 1e-30, 1e-8, 1e30], dtype=torch.float64)
    corners = torch.tensor([3.0, 6.0, 88.0, 89.0, 103.0, 104.0, 105.0, 709.0, 710.0, 745.0, 746.0], dtype=torch.float64)
    positive = torch.cat([far, special, corners, corners.to(dtype).nextafter(torch.tensor(0.0, dtype=dtype)).double()])
    return torch.cat([near, positive, -positive]).to(dtype)


def activate(x, activation, isa, layout="contiguous"):
    shape = (1, 1, 1, -1) if layout == "contiguous" else (1, -1, 1, 1)
    input = surrounded(x.view(shape), layout)
    zeros, ones = torch.zeros(input.size(1), dtype=x.dtype), torch.ones(input.size(1), dtype=x.dtype)
    return _C.batch_norm_act(input, zeros, ones, eps=0.0, activation=activation, isa=isa).flatten()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation):
    x = sweep(torch.float64)
    torch.testing.assert_close(reference.activation(x, activation), FORMULAS[activation](x), rtol=1e-14, atol=1e-15)
    assert set(reference.ACTIVATIONS) == set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_in_half_precision(activation, dtype):
    x = torch.linspace(-8, 8, 161).to(dtype)
    expected = FORMULAS[activation](x.double())
    tolerance.assert_close(reference.activation(x, activation), expected, 1, x.double().abs() + 1)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_on_a_sweep(isa, activation, dtype, layout):
    x = sweep(dtype)
    expected = reference.activation(x.double(), activation)
    # All in proportion to the result, but that x + 3 rounds at the size of x or 3, and that exp(-x) may overflow a
    # little before silu(x), at about x = -88 or -709, is too small for a normal number.
    scale = expected.abs() + x.double().abs().clamp(max=1000) * torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    if activation in ("hardswish", "hardsigmoid"):
        scale = scale + (x.double().abs().clamp(max=6) if activation == "hardswish" else 1)
    tolerance.assert_close(activate(x, activation, isa, layout), expected, 2, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity(isa, activation, dtype):
    for count in (3, 19, 67):
        x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], dtype=dtype).repeat(17)[:count]
        expected = reference.activation(x, activation)
        tolerance.assert_close(activate(x, activation, isa), expected, 1, expected.double().abs())
