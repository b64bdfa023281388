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
    weight_layout=("contiguous", "channels_last", "sliced"),
    channels=CHANNELS,
    outputs=CHANNELS + (127, 129),
    map_size=MAPS + ((1, 5), (2, 3), (14, 14)),
    batch=(1, 2, 3, 0),
    bias=(True, False),
    activation=ACTIVATIONS,
    gate=(None, "contiguous", "sliced"),
    residual=(None, "contiguous", "channels_last", "sliced", "transposed"),
    scale=(False, True),
)


def arguments(
    channels=5,
    outputs=6,
    map_size=(7, 7),
    batch=2,
    bias=True,
    activation="none",
    gate=None,
    residual=None,
    scale=False,
    layout="contiguous",
    weight_layout="contiguous",
    dtype=torch.float32,
):
    input = operand((batch, channels, *map_size), layout, dtype, 0)
    weight = operand((outputs, channels, 1, 1), weight_layout, dtype, 1)
    bias = vector(outputs, dtype, 2) if bias else None
    gate = operand((batch, channels, 1, 1), gate, dtype, 3) if gate else None
    residual = operand((batch, outputs, *map_size), residual, dtype, 4) if residual else None
    scale = vector(outputs, dtype, 5) if scale else None
    return input, weight, bias, activation, gate, residual, scale


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_reference(isa, case):
    args = arguments(**case)
    actual = run_and_check("pointwise_conv2d", args, isa)
    if case["batch"]:
        assert actual.stride() == F.conv2d(skeleton(args[0]), skeleton(args[1])).stride()


# The shapes of the family's layers, and one past each block that a kernel may cut its sums or outputs into.
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize(
    "channels, outputs, size",
    [
        (16, 64, 28),
        (72, 24, 28),
        (40, 240, 14),
        (672, 112, 7),
        (960, 160, 7),
        (1280, 1000, 1),
        (257, 70, 5),
        (1025, 257, 3),
    ],
)
def test_layers_of_real_networks(isa, channels, outputs, size, layout):
    args = arguments(
        channels, outputs, (size, size), 1, activation="hardswish", gate="contiguous", residual=layout, layout=layout
    )
    run_and_check("pointwise_conv2d", args, isa)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("channels", (1, 17, 33))
def test_every_weight_counts(isa, layout, channels):
    """Were a kernel to lose a single product, `check` would notice."""
    args = arguments(channels, 37, layout=layout, gate="contiguous", residual="contiguous")
    for channel in range(channels):
        lost = args[1].clone()
        lost[36 - channel, channel] = 0
        with pytest.raises(AssertionError, match="elements are wrong"):
            check("pointwise_conv2d", _C.pointwise_conv2d(args[0], lost, *args[2:], isa=isa), args)


@pytest.mark.parametrize("poisoned", ("input", "gate", "residual"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_where_torch_has_them(isa, dtype, activation, layout, poisoned):
    args = arguments(
        19, 35, (5, 7), activation=activation, dtype=dtype, layout=layout, gate="contiguous", residual="contiguous"
    )
    target = {"input": args[0], "gate": args[4], "residual": args[5]}[poisoned]
    target[0, 2, -1, -1] = float("nan")
    target[0, 3, 0, 0] = float("inf")
    target[-1, 18, -1, 0] = -float("inf")
    target[-1, 5, -1, 0] = float("inf")
    run_and_check("pointwise_conv2d", args, isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 4))
def test_hardswish_at_its_corners(isa, dtype, size):
    corners = torch.tensor([-3.0, 0.0, 3.0, -6.0, 6.0], dtype=dtype).repeat(7)
    weight = corners.view(35, 1, 1, 1)
    actual = _C.pointwise_conv2d(torch.ones(1, 1, size, size, dtype=dtype), weight, activation="hardswish", isa=isa)
    expected = torch.tensor([0.0, 0.0, 3.0, 0.0, 6.0], dtype=dtype).repeat(7).view(1, 35, 1, 1)
    assert torch.equal(actual, expected.expand_as(actual))


@pytest.mark.parametrize("expanded", ("input", "gate", "residual"))
@pytest.mark.parametrize("axis", (0, 1, 2, 3))
def test_expanded_operands(isa, expanded, axis):
    """A stride may be zero."""
    args = list(arguments(33, 33, gate="contiguous", residual="contiguous"))
    index = {"input": 0, "gate": 4, "residual": 5}[expanded]
    args[index] = args[index].narrow(axis, 0, 1).expand_as(args[index])
    run_and_check("pointwise_conv2d", args, isa)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_is_the_input(isa, layout):
    """Operands may share memory."""
    args = list(arguments(24, 24, layout=layout))
    args[5] = args[0]
    run_and_check("pointwise_conv2d", args, isa)


@pytest.mark.parametrize("case", CASES[:40], ids=case_id)
def test_function_equals_kernel(case):
    input, weight, bias, activation, gate, residual, scale = args = arguments(**case)
    expected = _C.pointwise_conv2d(*args)
    for backend in (None, "cpp"):
        actual = functional.pointwise_conv2d(
            input, weight, bias, activation=activation, gate=gate, residual=residual, scale=scale, backend=backend
        )
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize("case", CASES[::6], ids=case_id)
def test_gradients(case):
    check_gradients(
        "pointwise_conv2d",
        lambda x, w, b, act, g, r, s: functional.pointwise_conv2d(
            x, w, b, activation=act, gate=g, residual=r, scale=s, backend="cpp"
        ),
        arguments(**case),
    )
