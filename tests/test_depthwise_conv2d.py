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


def paddings(kernel, dilation):
    half = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    beyond = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    return {"none": (0, 0), "half": half, "beyond": beyond, "uneven": (half[0], half[1] + 1)}


def fits(kernel, dilation, padding, map_size, **_):
    padded = [s + 2 * p for s, p in zip(map_size, paddings(kernel, dilation)[padding], strict=True)]
    return all(d * (k - 1) < size for k, d, size in zip(kernel, dilation, padded, strict=True))


CASES = pairwise(
    fits,
    dtype=DTYPES,
    layout=LAYOUTS,
    weight_layout=("contiguous", "channels_last", "sliced"),
    channels=CHANNELS,
    multiplier=(1, 2, 3),
    kernel=((1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (3, 5), (1, 7), (4, 1)),
    stride=((1, 1), (2, 2), (3, 1), (1, 2)),
    dilation=((1, 1), (2, 2), (1, 3)),
    padding=("none", "half", "beyond", "uneven"),
    map_size=MAPS + ((14, 14), (9, 40)),
    batch=(1, 2, 0),
    bias=(True, False),
    activation=ACTIVATIONS,
    scale=(False, True),
)


def arguments(
    channels=5,
    map_size=(7, 7),
    kernel=(3, 3),
    multiplier=1,
    stride=(1, 1),
    padding="half",
    dilation=(1, 1),
    batch=2,
    bias=True,
    activation="none",
    scale=False,
    layout="contiguous",
    weight_layout="contiguous",
    dtype=torch.float32,
    seed=0,
):
    input = operand((batch, channels, *map_size), layout, dtype, seed)
    weight = operand((channels * multiplier, 1, *kernel), weight_layout, dtype, seed + 1)
    bias = vector(channels * multiplier, dtype, seed + 2) if bias else None
    scale = vector(channels * multiplier, dtype, seed + 3) if scale else None
    return input, weight, bias, stride, paddings(kernel, dilation)[padding], dilation, activation, scale


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_reference(isa, case):
    args = arguments(**case)
    actual = run_and_check("depthwise_conv2d", args, isa)
    if case["batch"]:
        own = F.conv2d(skeleton(args[0]), skeleton(args[1]), None, *args[3:6], groups=case["channels"])
        assert actual.stride() == own.stride()


# What nearly every layer is, in full: the kernels may have code of their own for these.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", (3, 5, 7))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("channels", (1, 16, 19, 65))
@pytest.mark.parametrize("map_size", ((1, 1), (2, 5), (7, 7), (8, 14), (15, 7)))
def test_square_kernels(isa, layout, kernel, stride, channels, map_size):
    args = arguments(channels, map_size, (kernel, kernel), stride=(stride, stride), layout=layout)
    run_and_check("depthwise_conv2d", args, isa)


# The shapes of the family's layers: more channels than a tile, more rows than a block.
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize(
    "channels, size, kernel, stride",
    [(32, 56, 3, 1), (96, 28, 3, 2), (240, 14, 5, 1), (512, 14, 3, 1), (672, 7, 5, 1), (1025, 7, 3, 2)],
)
def test_layers_of_real_networks(isa, channels, size, kernel, stride, layout):
    args = arguments(
        channels,
        (size, size),
        (kernel, kernel),
        stride=(stride, stride),
        batch=1,
        layout=layout,
        activation="hardswish",
    )
    run_and_check("depthwise_conv2d", args, isa)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("kernel", ((3, 3), (5, 5), (2, 7)))
def test_every_tap_counts(isa, layout, kernel):
    """Were a kernel to lose a single tap, `check` would notice."""
    args = arguments(kernel=kernel, layout=layout)
    for tap in range(kernel[0] * kernel[1]):
        lost = args[1].clone()
        lost[3].view(-1)[tap] = 0
        with pytest.raises(AssertionError, match="elements are wrong"):
            check("depthwise_conv2d", _C.depthwise_conv2d(args[0], lost, *args[2:], isa=isa), args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", ((1, 1), (2, 2)))
def test_nan_and_infinity_stay_where_torch_has_them(isa, dtype, activation, layout, stride):
    args = arguments(channels=19, map_size=(13, 11), stride=stride, activation=activation, dtype=dtype, layout=layout)
    args[0][0, 2, 4, 4] = float("nan")
    args[0][0, 17, 0, 0] = float("inf")
    args[0][1, 18, 12, 10] = -float("inf")
    args[0][1, 5, 7, 7] = float("inf")
    args[0][1, 5, 7, 8] = float("inf")
    run_and_check("depthwise_conv2d", args, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hardswish_at_its_corners(isa, dtype):
    corners = torch.tensor([-3.0, 0.0, 3.0, -6.0, 6.0], dtype=dtype).repeat(7)
    actual = _C.depthwise_conv2d(
        corners.view(1, 35, 1, 1), torch.ones(35, 1, 1, 1, dtype=dtype), activation="hardswish", isa=isa
    )
    assert torch.equal(actual.flatten(), torch.tensor([0.0, 0.0, 3.0, 0.0, 6.0], dtype=dtype).repeat(7))


@pytest.mark.parametrize("expand", (0, 1, 2, 3))
def test_expanded_input(isa, expand):
    """A stride may be zero."""
    args = list(arguments(map_size=(9, 9)))
    args[0] = args[0].narrow(expand, 0, 1).expand_as(args[0])
    run_and_check("depthwise_conv2d", args, isa)


@pytest.mark.parametrize("case", CASES[:40], ids=case_id)
def test_function_equals_kernel(case):
    args = arguments(**case)
    expected = _C.depthwise_conv2d(*args)
    for backend in (None, "cpp"):
        actual = functional.depthwise_conv2d(*args[:6], activation=args[6], scale=args[7], backend=backend)
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize("kernel", ((1, 1), (2, 2), (3, 3), (4, 3), (2, 5)))
@pytest.mark.parametrize("dilation", (1, 2, (3, 1)))
@pytest.mark.parametrize("padding", ("same", "valid"))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_by_name(kernel, dilation, padding):
    input, weight, bias, *_ = arguments(kernel=kernel, map_size=(15, 9), dtype=torch.float64)
    actual = functional.depthwise_conv2d(input, weight, bias, padding=padding, dilation=dilation, backend="cpp")
    expected = F.conv2d(input, weight, bias, padding=padding, dilation=dilation, groups=input.size(1))
    torch.testing.assert_close(actual, expected)


def test_numbers_for_both_axes():
    input, weight, bias, *_ = arguments()
    actual = functional.depthwise_conv2d(input, weight, bias, 2, 1, 1)
    assert torch.equal(actual, functional.depthwise_conv2d(input, weight, bias, (2, 2), [1, 1], (1, 1)))
    assert torch.equal(actual, torch.ops.mobilenet_fast.depthwise_conv2d(input, weight, bias, 2, 1))


@pytest.mark.parametrize("case", CASES[::6], ids=case_id)
def test_gradients(case):
    args = arguments(**case)
    check_gradients(
        "depthwise_conv2d",
        lambda *a: functional.depthwise_conv2d(*a[:6], activation=a[6], scale=a[7], backend="cpp"),
        args,
    )
