import pytest
import torch
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
    strides,
    vector,
)

from mobilenet_fast import _C, functional

CASES = pairwise(
    dtype=DTYPES,
    layout=LAYOUTS,
    weight_layout=("contiguous", "channels_last", "sliced"),
    channels=CHANNELS,
    squeeze=(1, 2, 3, 7, 8, 9, 16, 17, 33),
    map_size=MAPS + ((1, 5), (14, 14)),
    batch=(1, 2, 3, 0),
    bias1=(True, False),
    bias2=(True, False),
    squeeze_activation=ACTIVATIONS,
    gate_activation=ACTIVATIONS,
)


def arguments(
    channels=5,
    squeeze=3,
    map_size=(7, 7),
    batch=2,
    bias1=True,
    bias2=True,
    squeeze_activation="relu",
    gate_activation="hardsigmoid",
    layout="contiguous",
    weight_layout="contiguous",
    dtype=torch.float32,
):
    return (
        # A mean far from zero, so that all that follows depends on it.
        operand((batch, channels, *map_size), layout, dtype, 0).add_(0.7),
        operand((squeeze, channels, 1, 1), weight_layout, dtype, 1),
        vector(squeeze, dtype, 2) if bias1 else None,
        operand((channels, squeeze, 1, 1), weight_layout, dtype, 3),
        vector(channels, dtype, 4) if bias2 else None,
        squeeze_activation,
        gate_activation,
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_reference(isa, case):
    args = arguments(**case)
    actual = run_and_check("squeeze_excite", args, isa)
    if case["batch"]:
        assert strides(actual) == strides(skeleton(args[0]) * torch.ones(case["batch"], case["channels"], 1, 1))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize(
    "channels, squeeze, size", [(16, 8, 56), (72, 24, 28), (480, 120, 14), (960, 240, 7), (1025, 65, 3)]
)
def test_layers_of_real_networks(isa, channels, squeeze, size, layout):
    run_and_check("squeeze_excite", arguments(channels, squeeze, (size, size), 1, layout=layout), isa)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("operand", (1, 2, 3, 4))
def test_every_parameter_counts(isa, layout, operand):
    """Were a kernel to lose a single product or term, `check` would notice."""
    args = arguments(33, 5, layout=layout, squeeze_activation="sigmoid", gate_activation="none")
    for channel in range(33):
        lost = list(args)
        lost[operand] = args[operand].clone()
        lost[operand].view(-1)[channel % lost[operand].numel()] = 0
        with pytest.raises(AssertionError, match="elements are wrong"):
            check("squeeze_excite", _C.squeeze_excite(*lost, isa=isa), args)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_every_pixel_counts(isa, layout):
    args = arguments(17, 3, layout=layout, squeeze_activation="silu", gate_activation="sigmoid")
    for pixel in range(49):
        other = args[0].clone()
        other[:, 16, pixel // 7, pixel % 7] += 0.5
        gate = _C.squeeze_excite(other, *args[1:], isa=isa) / other
        with pytest.raises(AssertionError, match="elements are wrong"):
            check("squeeze_excite", args[0] * gate, args)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_where_torch_has_them(isa, dtype, activation, layout, value):
    args = arguments(
        19, 5, (13, 11), squeeze_activation=activation, gate_activation=activation, dtype=dtype, layout=layout
    )
    args[0][0, 17, 12, 10] = value
    run_and_check("squeeze_excite", args, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_activations_at_their_corners(isa, dtype):
    corners = torch.tensor([-3.0, 0.0, 3.0, -6.0, 6.0], dtype=dtype).repeat(7)
    input, weight1 = torch.ones(1, 35, 2, 2, dtype=dtype), torch.zeros(1, 35, 1, 1, dtype=dtype)
    weight2 = torch.zeros(35, 1, 1, 1, dtype=dtype)
    for activation, expected in (("hardswish", [0, 0, 3, 0, 6]), ("hardsigmoid", [0, 0.5, 1, 0, 1])):
        actual = _C.squeeze_excite(input, weight1, None, weight2, corners, "relu", activation, isa=isa)
        assert torch.equal(actual[0, :, 1, 1], torch.tensor(expected, dtype=dtype).repeat(7))


@pytest.mark.parametrize("expand", (0, 1, 2, 3))
def test_expanded_input(isa, expand):
    """A stride may be zero."""
    args = list(arguments(33))
    args[0] = args[0].narrow(expand, 0, 1).expand_as(args[0])
    run_and_check("squeeze_excite", args, isa)


@pytest.mark.parametrize("case", CASES[:40], ids=case_id)
def test_function_equals_kernel(case):
    args = arguments(**case)
    expected = _C.squeeze_excite(*args)
    for backend in (None, "cpp"):
        actual = functional.squeeze_excite(
            *args[:5], squeeze_activation=args[5], gate_activation=args[6], backend=backend
        )
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize("case", CASES[::6], ids=case_id)
def test_gradients(case):
    check_gradients(
        "squeeze_excite",
        lambda *a: functional.squeeze_excite(*a[:5], squeeze_activation=a[5], gate_activation=a[6], backend="cpp"),
        arguments(**case),
    )


def test_lazily_negated_input(isa):
    x, *others = arguments(9, 4)
    negated = torch._neg_view(x)
    assert negated.is_neg()
    assert torch.equal(_C.squeeze_excite(negated, *others, isa=isa), _C.squeeze_excite(-x, *others, isa=isa))
