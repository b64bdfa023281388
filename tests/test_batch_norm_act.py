import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    CHANNELS,
    DTYPES,
    LAYOUTS,
    MAPS,
    case_id,
    check,
    check_gradients,
    operand,
    pairwise,
    run_and_check,
    skeleton,
    vector,
)

from mobilenet_fast import _C, functional

CASES = pairwise(
    dtype=DTYPES,
    layout=LAYOUTS,
    channels=CHANNELS,
    map_size=MAPS + ((1, 5), (14, 14), (33, 65)),
    batch=(1, 2, 0),
    weight=(True, False),
    bias=(True, False),
    eps=(1e-5, 1e-3, 0.5),
    activation=ACTIVATIONS,
)


def arguments(
    channels=5,
    map_size=(7, 7),
    batch=2,
    weight=True,
    bias=True,
    eps=1e-5,
    activation="none",
    layout="contiguous",
    dtype=torch.float32,
):
    return (
        operand((batch, channels, *map_size), layout, dtype, 0, high=4.0),
        vector(channels, dtype, 1),
        vector(channels, dtype, 2, positive=True),
        vector(channels, dtype, 3) if weight else None,
        vector(channels, dtype, 4) if bias else None,
        eps,
        activation,
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_reference(isa, case):
    args = arguments(**case)
    actual = run_and_check("batch_norm_act", args, isa)
    if case["batch"]:
        ones = torch.ones(case["channels"])
        assert actual.stride() == F.batch_norm(skeleton(args[0]), ones, ones, ones, ones).stride()


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("channels, size", [(16, 112), (72, 56), (240, 14), (960, 7), (1025, 1)])
def test_layers_of_real_networks(isa, channels, size, layout):
    run_and_check("batch_norm_act", arguments(channels, (size, size), 1, layout=layout, activation="hardswish"), isa)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("operand", (1, 2, 3, 4))
def test_every_parameter_counts(isa, layout, operand):
    """Were a kernel to use one channel's parameter for another, `check` would notice."""
    args = arguments(37, layout=layout)
    for channel in range(37):
        other = list(args)
        other[operand] = args[operand].clone()
        other[operand][channel] = args[operand][channel - 1]
        with pytest.raises(AssertionError, match="elements are wrong"):
            check("batch_norm_act", _C.batch_norm_act(*other, isa=isa), args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_where_torch_has_them(isa, dtype, activation, layout):
    args = arguments(19, (13, 11), activation=activation, dtype=dtype, layout=layout)
    args[0][0, 2, 4, 4] = float("nan")
    args[0][0, 17, 0, 0] = float("inf")
    args[0][1, 18, 12, 10] = -float("inf")
    args[1][7] = float("nan")
    run_and_check("batch_norm_act", args, isa)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hardswish_at_its_corners(isa, dtype, layout):
    zeros, ones = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    input = operand((1, 2, 5, 7), layout, dtype)
    input.copy_(torch.tensor([-3.0, 0.0, 3.0, -6.0, 6.0], dtype=dtype).view(5, 1))
    actual = _C.batch_norm_act(input, zeros, ones, eps=0.0, activation="hardswish", isa=isa)
    assert torch.equal(actual, input.clamp(min=0))


@pytest.mark.parametrize("expand", (0, 1, 2, 3))
def test_expanded_input(isa, expand):
    """A stride may be zero."""
    args = list(arguments(33))
    args[0] = args[0].narrow(expand, 0, 1).expand_as(args[0])
    run_and_check("batch_norm_act", args, isa)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_is_fresh(activation):
    """Even where there is nothing to do, the output is not the input."""
    input, zeros, ones = torch.ones(1, 3, 4, 4), torch.zeros(3), torch.ones(3)
    assert functional.batch_norm_act(input, zeros, ones, eps=0.0, activation=activation).data_ptr() != input.data_ptr()


@pytest.mark.parametrize("case", CASES[:40], ids=case_id)
def test_function_equals_kernel(case):
    args = arguments(**case)
    expected = _C.batch_norm_act(*args)
    for backend in (None, "cpp"):
        actual = functional.batch_norm_act(*args[:5], eps=args[5], activation=args[6], backend=backend)
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize("case", CASES[::6], ids=case_id)
def test_gradients(case):
    check_gradients(
        "batch_norm_act",
        lambda *a: functional.batch_norm_act(*a[:5], eps=a[5], activation=a[6], backend="cpp"),
        arguments(**case),
        constants=(1, 2),
    )
