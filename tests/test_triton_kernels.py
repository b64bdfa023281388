"""The Triton kernels against the float64 reference: on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``)."""

import importlib
import os

import pytest
import test_batch_norm_act as batch_norm_act_cases
import test_depthwise_conv2d as depthwise_conv2d_cases
import test_pointwise_conv2d as pointwise_conv2d_cases
import test_squeeze_excite as squeeze_excite_cases
import tolerance
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, case_id, check, double, operand, pairwise, poisoned_memory, skeleton, tensors

from mobilenet_fast import _C, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
tl = pytest.importorskip("triton.language")

from mobilenet_fast import triton_kernels  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_channels_last", "transposed")
CHANNELS = (1, 8, 13, 40)
# Around the tiles, small: the interpreter takes a millisecond for what a GPU does in no time.
MAPS = ((1, 1), (7, 7), (5, 4), (2, 17))
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as integers, and multiplies these."""
    if not INTERPRETED:
        return
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    product = builder.create_dot

    def widened(self, handle):
        return self.create_fp_ext(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    monkeypatch.setattr(
        builder, "create_dot", lambda self, a, b, *rest: product(self, widened(self, a), widened(self, b), *rest)
    )


@pytest.fixture(autouse=True)
def exact_products():
    """Without TF32, which has 10 bits."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def on_device(args):
    """The same tensors, strides and surroundings on the device."""

    def move(value):
        if not isinstance(value, torch.Tensor) or DEVICE == "cpu":
            return value
        memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(DEVICE)
        return memory.as_strided(value.size(), value.stride(), value.storage_offset())

    return [move(a) for a in args]


def run(operation, args, **kwargs):
    """What the launcher gives for these operands, which it may not change, with NaN in what it forgets to write."""
    args = on_device(args)
    before = [a.clone() for a in tensors(args)]
    with poisoned_memory():
        result = getattr(triton_kernels, operation)(*args, **kwargs)
    for now, then in zip(tensors(args), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    return result


def run_and_check(operation, args):
    actual = run(operation, args)
    assert actual.dtype == args[0].dtype
    check(operation, actual.cpu(), args)
    return actual


def strides_on_cpu(operation, args):
    """Those of the C++ kernels' result, which are PyTorch's."""
    return getattr(_C, operation)(*(skeleton(a) if isinstance(a, torch.Tensor) else a for a in args)).stride()


WINDOWS = {
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "weight_layout": ("contiguous", "channels_last", "sliced"),
    "channels": CHANNELS,
    "multiplier": (1, 2),
    "kernel": ((1, 1), (2, 2), (3, 3), (5, 5), (3, 5), (4, 1)),
    "stride": ((1, 1), (2, 2), (3, 1), (1, 2)),
    "dilation": ((1, 1), (2, 2), (1, 3)),
    "padding": ("none", "half", "beyond", "uneven"),
    "map_size": MAPS,
    "batch": (1, 2, 0),
}
DEPTHWISE = pairwise(
    depthwise_conv2d_cases.fits,
    **WINDOWS,
    bias=(True, False),
    activation=("none", "hardswish", "silu"),
    scale=(False, True),
)
BACKWARD = pairwise(depthwise_conv2d_cases.fits, **WINDOWS, need=((True, True), (True, False), (False, True)))


@pytest.mark.parametrize("case", DEPTHWISE, ids=case_id)
def test_depthwise_conv2d(case):
    args = depthwise_conv2d_cases.arguments(**case)
    actual = run_and_check("depthwise_conv2d", args)
    if case["batch"]:
        assert actual.stride() == strides_on_cpu("depthwise_conv2d", args)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("kernel", (3, 5, 7))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("map_size", ((1, 1), (2, 5), (7, 7), (8, 14)))
def test_square_depthwise_kernels(layout, kernel, stride, map_size):
    args = depthwise_conv2d_cases.arguments(5, map_size, (kernel, kernel), stride=(stride, stride), layout=layout)
    run_and_check("depthwise_conv2d", args)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_every_depthwise_tap_counts(layout):
    args = depthwise_conv2d_cases.arguments(map_size=(4, 4), batch=1, layout=layout)
    for tap in range(9):
        lost = args[1].clone()
        lost[3].view(-1)[tap] = 0
        with pytest.raises(AssertionError, match="elements are wrong"):
            check("depthwise_conv2d", run("depthwise_conv2d", (args[0], lost, *args[2:])).cpu(), args)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("activation", ("none", "silu"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("size, channels", [((7, 7), 24), ((5, 9), 3)])
def test_depthwise_sums(layout, activation, dtype, size, channels):
    args = depthwise_conv2d_cases.arguments(channels, size, layout=layout, activation=activation, dtype=dtype)
    output, sums = run("depthwise_conv2d", args, with_sums=True)
    check("depthwise_conv2d", output.cpu(), args)
    exact = reference.depthwise_conv2d(*double(args))
    scale = tolerance.depthwise_conv2d(*args)[1].sum((2, 3))
    assert sums.dtype == torch.float32
    tolerance.assert_close(sums.sum(1).cpu(), exact.sum((2, 3)), 10 + size[0] * size[1], scale)


# Large windows are slow to interpret: a few cases, on few channels.
SQUARE = pairwise(
    dtype=(torch.float32, torch.float16),
    layout=("contiguous", "channels_last"),
    weight_layout=("contiguous",),
    channels=(3, 8),
    multiplier=(1,),
    kernel=((7, 7),),
    stride=((1, 1), (2, 2)),
    dilation=((1, 1),),
    padding=("half",),
    map_size=((7, 7), (5, 4)),
    batch=(1,),
    need=((True, True), (True, False), (False, True)),
)


@pytest.mark.parametrize("case", BACKWARD + SQUARE, ids=case_id)
def test_depthwise_conv2d_backward(case):
    window = {name: case[name] for name in WINDOWS}
    input, weight, _, *geometry, _, _ = depthwise_conv2d_cases.arguments(**window)
    output = F.conv2d(input.double(), weight.double(), None, *geometry, groups=input.size(1))
    grad = operand(tuple(output.shape), case["layout"], case["dtype"], 5)
    actual = run("depthwise_conv2d_backward", (grad, input, weight, *geometry, *case["need"]))

    def gradients(grad, input, weight):
        leaves = [t.double().requires_grad_() for t in (input, weight)]
        return torch.autograd.grad(F.conv2d(*leaves, None, *geometry, groups=input.size(1)), leaves, grad.double())

    expected = gradients(grad, input, weight)
    scales = gradients(grad.abs(), input.abs(), weight.abs())
    terms = weight[0].numel() * case["multiplier"], grad[:, 0].numel()
    for got, wanted, count, scale, needed in zip(actual, expected, terms, scales, case["need"], strict=True):
        if needed:
            assert got.dtype == case["dtype"]
            tolerance.assert_close(got.cpu(), wanted, count + 1, scale)
        else:
            assert got is None


POINTWISE = pairwise(
    dtype=DTYPES,
    layout=LAYOUTS,
    weight_layout=("contiguous", "channels_last", "sliced"),
    channels=CHANNELS + (129,),
    outputs=CHANNELS + (129,),
    map_size=MAPS,
    batch=(1, 2, 3, 0),
    bias=(True, False),
    activation=ACTIVATIONS,
    gate=(None, "contiguous", "sliced"),
    residual=(None, "contiguous", "channels_last", "sliced", "transposed"),
    scale=(False, True),
)


@pytest.mark.parametrize("case", POINTWISE, ids=case_id)
def test_pointwise_conv2d(case):
    args = pointwise_conv2d_cases.arguments(**case)
    actual = run_and_check("pointwise_conv2d", args)
    if case["batch"]:
        assert actual.stride() == strides_on_cpu("pointwise_conv2d", args)


BATCH_NORM = pairwise(
    dtype=DTYPES,
    layout=LAYOUTS,
    channels=CHANNELS,
    map_size=MAPS + ((9, 33),),
    batch=(1, 2, 0),
    weight=(True, False),
    bias=(True, False),
    eps=(1e-5, 1e-3, 0.5),
    activation=ACTIVATIONS,
)


# PyTorch wants two values a channel.
TRAINING = pairwise(
    lambda batch, map_size, **_: batch * map_size[0] * map_size[1] > 1,
    dtype=DTYPES,
    layout=LAYOUTS,
    channels=CHANNELS,
    map_size=MAPS,
    batch=(1, 2, 3),
    weight=(True, False),
    bias=(True, False),
    eps=(1e-5, 1e-3),
    activation=ACTIVATIONS,
    running=(True, False),
)


@pytest.mark.parametrize("case", BATCH_NORM, ids=case_id)
def test_batch_norm_act(case):
    run_and_check("batch_norm_act", batch_norm_act_cases.arguments(**case))


SQUEEZE_EXCITE = pairwise(
    dtype=DTYPES,
    layout=LAYOUTS,
    weight_layout=("contiguous", "channels_last", "sliced"),
    channels=CHANNELS,
    squeeze=(1, 3, 8, 17),
    map_size=MAPS,
    batch=(1, 2, 3, 0),
    bias1=(True, False),
    bias2=(True, False),
    squeeze_activation=ACTIVATIONS,
    gate_activation=ACTIVATIONS,
)


@pytest.mark.parametrize("case", SQUEEZE_EXCITE, ids=case_id)
def test_squeeze_excite(case):
    run_and_check("squeeze_excite", squeeze_excite_cases.arguments(**case))


@pytest.mark.parametrize("case", TRAINING, ids=case_id)
def test_batch_norm_act_training(case):
    """Held to PyTorch's batch norm in float64, whose inputs have a mean of many deviations: sums of squares alone would
    cancel. An input's rounding, and a mean's, count in deviations: ``condition`` times as much as a result's.
    """
    running = case["running"]
    values = {name: value for name, value in case.items() if name != "running"}
    input, mean, var, weight, bias, eps, activation = batch_norm_act_cases.arguments(**values)
    input.add_(20.0)
    momentum, count = 0.3, input.numel() // input.size(1)
    buffers = [t.to(torch.float32 if t.itemsize < 4 else t.dtype) for t in (mean, var)] if running else [None, None]
    exact = [None if t is None else t.double() for t in (*buffers, weight, bias)]
    leaves = [t.requires_grad_() for t in (input.double(), *exact[2:]) if t is not None]
    inner = F.batch_norm(leaves[0], *exact[:2], *exact[2:], True, momentum, eps)
    # PyTorch's own gradient of hardsigmoid has a sixth in float32.
    expected = F.relu6(inner + 3) / 6 if activation == "hardsigmoid" else reference.ACTIVATIONS[activation](inner)
    args = on_device((input, *buffers, weight, bias, momentum, eps, activation))
    with poisoned_memory():
        output, batch_mean, rstd = triton_kernels.batch_norm_act_training(*args)

    def channels(vector):
        return 1.0 if vector is None else vector.double().abs()[:, None, None]

    x, slope = input.double(), channels(weight)
    deviation = (x.var((0, 2, 3), correction=0, keepdim=True) + eps).rsqrt()[0]
    normal = (x - x.mean((0, 2, 3), keepdim=True)).abs() * deviation
    condition = 1 + x.abs().amax((0, 2, 3), keepdim=True)[0] * deviation
    scale = slope * (normal + 1) * condition + (0 if bias is None else channels(bias)) + 1
    tolerance.assert_close(output.cpu(), expected.detach(), 4, scale)
    if running:
        for got, wanted in zip(args[1:3], exact[:2], strict=True):
            size = wanted.abs() + (condition / deviation).flatten() ** 2
            tolerance.assert_close(got.cpu(), wanted, 4, size)

    grad = operand(tuple(input.shape), case["layout"], case["dtype"], 7)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    actual = triton_kernels.batch_norm_act_backward(
        *on_device((grad, input)), batch_mean, rstd, *on_device((weight, bias)), activation
    )
    # The activation's derivative, steeper than 1 nowhere by more than a half, is taken at the inner value.
    g = grad.double().abs() * (1.5 + slope * (normal + 1)) * condition
    means = [t.sum((0, 2, 3), keepdim=True) / count for t in (g, g * (normal + 1))]
    scales = [slope * deviation * (g + means[0] + (normal + 1) * means[1])]
    scales += [means[1].flatten() * count] * (weight is not None) + [means[0].flatten() * count] * (bias is not None)
    actual = [actual[0], *(a for a, t in zip(actual[1:], (weight, bias), strict=True) if t is not None)]
    for got, exact_gradient, size in zip(actual, wanted, scales, strict=True):
        tolerance.assert_close(got.cpu(), exact_gradient, 8, size)


INVERTED_RESIDUAL = pairwise(
    lambda form, residual, kernel, dilation, map_size, padding, **_: (
        (not residual or "project" in form)
        and all(dilation * (kernel - 1) < size + 2 * dilation * (kernel // 2) * padding for size in map_size)
    ),
    dtype=DTYPES,
    form=("expand", "project", "expand project"),
    channels=(3, 16, 24),
    hidden=(16, 40, 65),
    outputs=(8, 24, 33),
    kernel=(3, 5),
    stride=(1, 2),
    dilation=(1, 2),
    padding=(True, False),
    map_size=((1, 1), (7, 7), (9, 18)),
    batch=(1, 2, 0),
    residual=(False, True),
    activations=(("relu6", "relu6", "none"), ("hardswish", "hardswish", "none"), ("none", "silu", "relu")),
)


@pytest.mark.parametrize("case", INVERTED_RESIDUAL, ids=case_id)
def test_inverted_residual(case):
    dtype, form, kernel, stride = case["dtype"], case["form"], case["kernel"], case["stride"]
    hidden, pad = case["hidden"], case["dilation"] * (kernel // 2) * case["padding"]
    channels = case["channels"] if "expand" in form else hidden
    outputs = case["outputs"] if "project" in form else hidden
    input = operand((case["batch"], channels, *case["map_size"]), "channels_last", dtype)
    layers = {
        "expand": (operand((hidden, channels, 1, 1), dtype=dtype, seed=1), operand((hidden,), dtype=dtype, seed=2)),
        "depthwise": (
            operand((hidden, 1, kernel, kernel), dtype=dtype, seed=3),
            operand((hidden,), dtype=dtype, seed=4),
        ),
        "project": (operand((outputs, hidden, 1, 1), dtype=dtype, seed=5), operand((outputs,), dtype=dtype, seed=6)),
    }
    layers = {name: pair if name in (*form.split(), "depthwise") else None for name, pair in layers.items()}
    geometry = (stride, stride), (pad, pad), (case["dilation"], case["dilation"])

    def formula(input, layers, residual, activation):
        if layers["expand"]:
            input = activation(F.conv2d(input, *layers["expand"]), 0)
        input = activation(F.conv2d(input, *layers["depthwise"], *geometry, groups=hidden), 1)
        if layers["project"]:
            output = F.conv2d(input, *layers["project"])
            input = activation(output if residual is None else output + residual, 2)
        return input

    def convert(function, layers):
        return {name: pair and tuple(map(function, pair)) for name, pair in layers.items()}

    shape = formula(input.double(), convert(torch.Tensor.double, layers), None, lambda x, _: x).shape
    residual = operand(tuple(shape), "channels_last", dtype, 7) if case["residual"] else None
    wide = residual if residual is None else residual.double()
    exact = formula(
        input.double(),
        convert(torch.Tensor.double, layers),
        wide,
        lambda x, i: reference.activation(x, case["activations"][i]),
    )
    magnitudes = convert(lambda t: t.double().abs(), layers)
    scale = formula(input.double().abs(), magnitudes, None if wide is None else wide.abs(), lambda x, _: x)
    with_sums = "project" not in form
    with poisoned_memory():
        out = torch.empty(tuple(shape), dtype=dtype, device=DEVICE, memory_format=torch.channels_last)
        (move_input, move_residual), moved = on_device((input, residual)), convert(lambda t: on_device([t])[0], layers)
        result = triton_kernels.inverted_residual(
            move_input, *moved.values(), *geometry, case["activations"], move_residual, out=out, with_sums=with_sums
        )
    output, sums = result if with_sums else (result, None)
    terms = channels + kernel * kernel + hidden + 4
    tolerance.assert_close(output.cpu(), exact, terms, scale)
    if with_sums:
        terms += shape[2] * shape[3]
        tolerance.assert_close(sums.sum(1).cpu().to(dtype), exact.sum((2, 3)), terms, scale.sum((2, 3)))
