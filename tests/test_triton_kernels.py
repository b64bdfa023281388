"""The Triton kernels against the float64 reference: on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``)."""

import importlib
import os
from contextlib import contextmanager
from functools import partial
from unittest import mock

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
def bfloat16_arithmetic(monkeypatch):
    """The interpreter keeps bfloat16 as integers, multiplies these, and cuts off what a GPU rounds."""
    if not INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    product, convert = builder.create_dot, interpreter._convert_float

    def rounded(input, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(input, source, target, mode)
        return torch.from_numpy(input.copy()).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)

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


def channels_of_larger(values, offset):
    """These values, if any, in channels from ``offset`` on of a channels_last image that is NaN elsewhere."""
    n, c, h, w = values.shape
    larger = torch.full((n, h, w, offset + c + 8), torch.nan, dtype=values.dtype, device=DEVICE).permute(0, 3, 1, 2)
    view = larger[:, offset : offset + c]
    view.copy_(values)
    return larger, view


@contextmanager
def no_copies(*operands):
    """Fails where one of these is copied into another layout."""
    contiguous = torch.Tensor.contiguous

    def checked(self, *args, **kwargs):
        assert not any(self is operand for operand in operands), "an operand is copied"
        return contiguous(self, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "contiguous", checked):
        yield


def run_in_place_of_channels(launcher, shape, offset, dtype, *operands):
    """What ``launcher(out=)`` writes into channels of a larger image, without a copy of operands, and nowhere else."""
    larger, out = channels_of_larger(torch.full(shape, torch.nan, dtype=dtype), offset)
    with no_copies(*operands):
        launcher(out=out)
    result = out.clone()
    out.fill_(torch.nan)
    assert larger.isnan().all()
    return result.cpu()


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


# Filters whose columns are a loop, and whose gradients are PyTorch's.
LARGE = [
    {"kernel": (9, 9), "layout": "channels_last", "dtype": torch.float16, "channels": 5, "map_size": (12, 9)},
    {"kernel": (3, 31), "layout": "contiguous", "channels": 3, "map_size": (5, 40), "stride": (2, 3)},
    {"kernel": (13, 5), "layout": "channels_last", "channels": 3, "map_size": (9, 8), "dilation": (1, 2)},
    {"kernel": (11, 11), "layout": "contiguous", "dtype": torch.bfloat16, "multiplier": 2, "map_size": (7, 8)},
]
SIDES = (0, 7, 2, 5), (3, 4, 3, 4), (8, 0, 1, 1)  # padding of the four sides


@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_large_depthwise_filters(case):
    run_and_check("depthwise_conv2d", depthwise_conv2d_cases.arguments(**case, activation="silu"))
    input, weight, _, *geometry, _, _ = depthwise_conv2d_cases.arguments(**case)
    leaves = [t.double().requires_grad_() for t in (input, weight)]
    output = F.conv2d(*leaves, None, *geometry, groups=input.size(1))
    grad = operand(tuple(output.shape), case["layout"], input.dtype, 5)
    expected = torch.autograd.grad(output, leaves, grad.double())
    for needed in ((True, True), (True, False), (False, True)):
        found = run("depthwise_conv2d_backward", (grad, input, weight, *geometry, *needed))
        for got, wanted, need in zip(found, expected, needed, strict=True):
            assert (got is not None) == need
            if need:
                assert got.dtype == input.dtype
                tolerance.assert_close(got.cpu(), wanted, 200, wanted.abs().max())


@pytest.mark.parametrize("padding", SIDES)
@pytest.mark.parametrize("stride", (1, 3))
def test_gradients_of_large_filters_with_four_paddings(padding, stride):
    input, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 14, 13), (3, 1, 8, 8)))
    leaves = [t.clone().requires_grad_() for t in (input, weight)]
    top, bottom, left, right = padding
    output = F.conv2d(F.pad(leaves[0], (left, right, top, bottom)), leaves[1], None, stride, groups=3)
    grad = torch.randn_like(output)
    found = run("depthwise_conv2d_backward", (grad, input, weight, (stride, stride), (top, left), (1, 1)))
    for got, wanted in zip(found, torch.autograd.grad(output, leaves, grad), strict=True):
        tolerance.assert_close(got.cpu(), wanted, 200, wanted.abs().max())


def test_training_of_strided_statistics():
    memory = torch.zeros(2, 12, dtype=torch.float64)
    statistics = [t.clone() for t in memory[:, ::3]]
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64) + 1
    F.batch_norm(x, *statistics, training=True, momentum=0.3)
    args = on_device((x, *memory[:, ::3], None, None, 0.3, 1e-5, "none"))
    triton_kernels.batch_norm_act_training(*args)
    for moved, wanted in zip(args[1:3], statistics, strict=True):
        torch.testing.assert_close(moved.cpu(), wanted)
        assert moved.untyped_storage().nbytes() and moved.cpu().count_nonzero() == 4
    if DEVICE == "cpu":
        assert memory.count_nonzero() == 8
    with pytest.raises(ValueError, match="batch_norm_act_training: momentum None needs num_batches_tracked, got None"):
        triton_kernels.batch_norm_act_training(*args[:5], None, 1e-5, "none")


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


@pytest.mark.parametrize("programs", (1, 2, 1000))
@pytest.mark.parametrize("channels", (30, 70))
def test_any_number_of_programs_computes_all_of_a_product(channels, programs, monkeypatch):
    """As a tile that somebody kept may ask for, with one block of channels and several."""
    tile = triton_kernels.tiles.ProductTile(16, 16, 32, 4, 3, programs)
    module = importlib.import_module("mobilenet_fast.triton_kernels.pointwise_conv2d")
    monkeypatch.setattr(module, "pointwise_tile", lambda *_: tile)
    x, weight = torch.randn(2, channels, 5, 9), torch.randn(40, channels, 1, 1)
    x, weight = (tensor.to(DEVICE, torch.float64) for tensor in (x, weight))
    out = torch.full((2, 40, 5, 9), torch.nan, dtype=x.dtype, device=DEVICE)
    triton_kernels.pointwise_conv2d(x, weight, out=out)
    torch.testing.assert_close(out, F.conv2d(x, weight))


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
    momentum=(0.3, None),
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
    values = {name: value for name, value in case.items() if name not in ("running", "momentum")}
    input, mean, var, weight, bias, eps, activation = batch_norm_act_cases.arguments(**values)
    input.add_(20.0)
    batches = torch.tensor(3) if case["momentum"] is None else None
    momentum, count = 1 / 3 if batches is not None else 0.3, input.numel() // input.size(1)
    buffers = [t.to(torch.float32 if t.itemsize < 4 else t.dtype) for t in (mean, var)] if running else [None, None]
    exact = [None if t is None else t.double().clone() for t in (*buffers, weight, bias)]
    leaves = [t.requires_grad_() for t in (input.double(), *exact[2:]) if t is not None]
    inner = F.batch_norm(leaves[0], *exact[:2], *exact[2:], True, momentum, eps)
    # PyTorch's own gradient of hardsigmoid has a sixth in float32.
    expected = F.relu6(inner + 3) / 6 if activation == "hardsigmoid" else reference.ACTIVATIONS[activation](inner)
    args = on_device((input, *buffers, weight, bias, case["momentum"], eps, activation, batches))
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


OFFSETS = (0, 8, 24, 4, 3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("channels, size", [(16, (3, 4)), (13, (2, 3)), (8, (1, 1))])
def test_channels_of_larger_images(channels, size, offset, dtype):
    """Branches of a network read and write channels of what is concatenated."""
    shape = (2, channels, *size)
    input = operand(shape, "channels_last", dtype)
    _, x = channels_of_larger(input, offset)
    depthwise = (operand((channels, 1, 3, 3), dtype=dtype, seed=1), operand((channels,), dtype=dtype, seed=2))
    geometry = (1, 1), (1, 1), (1, 1)
    launcher = partial(triton_kernels.depthwise_conv2d, x, *on_device(depthwise), *geometry, "hardswish")
    output = run_in_place_of_channels(launcher, shape, offset, dtype, x)
    check("depthwise_conv2d", output, (input, *depthwise, *geometry, "hardswish"))

    pointwise = operand((24, channels, 1, 1), dtype=dtype, seed=3), operand((24,), dtype=dtype, seed=4)
    residual = operand((2, 24, *size), "channels_last", dtype, 5)
    _, r = channels_of_larger(residual, 16)
    launcher = partial(triton_kernels.pointwise_conv2d, x, *on_device(pointwise), "relu", None, r)
    output = run_in_place_of_channels(launcher, (2, 24, *size), offset, dtype, x, r)
    check("pointwise_conv2d", output, (input, *pointwise, "relu", None, residual))

    launcher = partial(
        triton_kernels.inverted_residual,
        *(x, None, on_device(depthwise), on_device(pointwise), *geometry, ("none", "relu6", "none"), r),
    )
    output = run_in_place_of_channels(launcher, (2, 24, *size), offset, dtype, x, r)
    wide = double((input, *depthwise, *pointwise, residual))
    exact = F.conv2d(F.relu6(F.conv2d(*wide[:3], padding=1, groups=channels)), *wide[3:5]) + wide[5]
    wide = [t.abs() for t in wide]
    scale = F.conv2d(F.conv2d(*wide[:3], padding=1, groups=channels), *wide[3:5]) + wide[5]
    tolerance.assert_close(output, exact, 9 + channels + 4, scale)


EPILOGUE = pairwise(
    dtype=DTYPES,
    layout=LAYOUTS,
    channels=CHANNELS,
    map_size=MAPS + ((9, 33),),
    batch=(1, 2, 3, 0),
    bias=(True, False),
    residual=(None, "contiguous", "channels_last", "sliced", "transposed"),
    gate=(None, "contiguous", "sliced"),
    activation=ACTIVATIONS,
    out=(None, "input", "channels"),
)


@pytest.mark.parametrize("case", EPILOGUE, ids=case_id)
def test_epilogue(case):
    dtype, (batch, channels) = case["dtype"], (case["batch"], case["channels"])
    shape = (batch, channels, *case["map_size"])
    input = operand(shape, case["layout"], dtype)
    bias = operand((channels,), dtype=dtype, seed=1) if case["bias"] else None
    residual = case["residual"] and operand(shape, case["residual"], dtype, 2)
    gate = case["gate"] and operand((batch, channels, 1, 1), case["gate"], dtype, 3)

    def formula(input, bias, residual, gate):
        input = input if gate is None else input * gate
        input = input if bias is None else input + bias[:, None, None]
        return input if residual is None else input + residual

    wide = [None if t is None else t.double() for t in (input, bias, residual, gate)]
    exact = reference.activation(formula(*wide), case["activation"])
    scale = formula(*(None if t is None else t.abs() for t in wide)) + tolerance.bounded(case["activation"])
    operands = (bias, residual, gate, case["activation"])
    if case["out"] is None:
        output = run("epilogue", (input, *operands))
    elif case["out"] == "channels":
        launcher = partial(triton_kernels.epilogue, *on_device((input, *operands)))
        output = run_in_place_of_channels(launcher, shape, 8, dtype)
    else:
        # In place, where pixels lie at equal distances.
        layout = {"sliced": "contiguous", "transposed": "contiguous"}.get(case["layout"], "channels_last")
        (x, *rest) = on_device((operand(shape, layout, dtype), *operands))
        output = triton_kernels.epilogue(x, *rest, out=x)
        assert output is x
    assert output.dtype == dtype
    tolerance.assert_close(output.cpu(), exact, 3, scale)


@pytest.mark.parametrize("activation", ("none", "relu6", "silu"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_epilogue_of_nan_and_infinities(layout, activation):
    input = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5]).reshape(1, 1, 2, 2).repeat(1, 8, 1, 1)
    input = input.to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    output = run("epilogue", (input, None, None, None, activation))
    tolerance.assert_close(output.cpu(), reference.activation(input.double(), activation), 1, 1.0)


POOLED = pairwise(
    dtype=DTYPES,
    layout=LAYOUTS,
    channels=CHANNELS,
    map_size=MAPS + ((9, 33), (24, 25)),
    batch=(1, 2, 0),
    known=(False, True),
)


@pytest.mark.parametrize("case", POOLED, ids=case_id)
def test_global_avg_pool(case):
    dtype, (batch, channels) = case["dtype"], (case["batch"], case["channels"])
    input = operand((batch, channels, *case["map_size"]), case["layout"], dtype)
    (x,) = on_device([input])
    with poisoned_memory():
        larger = torch.empty(batch, channels + 11, 1, 1, dtype=dtype, device=DEVICE)
        output = larger[:, 3 : 3 + channels]
        if case["known"]:
            pixels = x.shape[2] * x.shape[3]
            assert triton_kernels.mean_of_sums(triton_kernels.sum_pixels(x), pixels, out=output) is output
        else:
            assert triton_kernels.global_avg_pool(x, out=output) is output
        assert larger[:, :3].isnan().all() and larger[:, 3 + channels :].isnan().all()
    assert output.dtype == dtype
    exact, scale = input.double().mean((2, 3), keepdim=True), input.double().abs().mean((2, 3), keepdim=True)
    tolerance.assert_close(output.cpu(), exact, input.shape[2] * input.shape[3] + 1, scale)


def pool_fits(kernel, padding, dilation, map_size, kind, **_):
    return all(
        (dilation == 1 or kind == "max")
        and 2 * padding <= k
        and dilation * (k - 1) < size + 2 * padding
        and (dilation == 1 or padding < size)
        for k, size in zip(kernel, map_size, strict=True)
    )


POOL = pairwise(
    pool_fits,
    dtype=DTYPES,
    kind=("max", "mean", "mean of padding", "divided"),
    layout=LAYOUTS,
    channels=CHANNELS,
    kernel=((2, 2), (3, 3), (5, 5), (3, 5), (1, 4)),
    stride=((1, 1), (2, 2), (3, 1), (1, 2)),
    padding=(0, 1, 2),
    dilation=(1, 2),
    ceil_mode=(False, True),
    map_size=MAPS + ((9, 12),),
    batch=(1, 2, 0),
    out=("contiguous", "channels_last", "channels"),
)


@pytest.mark.parametrize("case", POOL, ids=case_id)
def test_pool2d(case):
    dtype, kernel, stride, padding, kind = (case[name] for name in ("dtype", "kernel", "stride", "padding", "kind"))
    shape = (case["batch"], case["channels"], *case["map_size"])
    input = operand(shape, case["layout"], dtype)
    mean, count_padding, divisor = kind != "max", kind == "mean of padding", 7 if kind == "divided" else 0

    def formula(x):
        if len(x) == 0:  # which PyTorch refuses
            return formula(x.new_zeros(1, *x.shape[1:]))[:0]
        if mean:
            return F.avg_pool2d(x, kernel, stride, padding, case["ceil_mode"], count_padding, divisor or None)
        return F.max_pool2d(x, kernel, stride, padding, case["dilation"], case["ceil_mode"])

    exact, scale = formula(input.double()), formula(input.double().abs())
    (x,) = on_device([input])
    window = kernel, stride, (padding, padding), (case["dilation"],) * 2, mean, count_padding, divisor
    launcher = partial(triton_kernels.pool2d, x, *window)
    if case["out"] == "channels":
        output = run_in_place_of_channels(launcher, tuple(exact.shape), 8, dtype)
    else:
        memory_format = torch.channels_last if case["out"] == "channels_last" else torch.contiguous_format
        output = torch.full_like(exact, torch.nan, dtype=dtype, device=DEVICE, memory_format=memory_format)
        launcher(out=output)
    # Maxima are exact.
    tolerance.assert_close(output.cpu(), exact, (kernel[0] * kernel[1] + 1) * mean, scale)


@pytest.mark.parametrize("mean", (False, True))
def test_pool2d_of_nan_and_infinities(mean):
    input = torch.linspace(-1, 1, 49).reshape(1, 1, 7, 7)
    input[0, 0, 1, 1], input[0, 0, 5, 5], input[0, 0, 5, 0] = torch.nan, torch.inf, -torch.inf
    output = torch.empty(1, 1, 7, 7, device=DEVICE)
    triton_kernels.pool2d(*on_device([input]), (3, 3), (1, 1), (1, 1), mean=mean, out=output)
    pool = partial(F.avg_pool2d, count_include_pad=False) if mean else F.max_pool2d
    tolerance.assert_close(output.cpu(), pool(input.double(), 3, 1, 1), 10, 1.0)


def test_pool2d_reads_channels_of_a_larger_image():
    input = operand((2, 16, 6, 5), "channels_last", torch.float16)
    for offset in OFFSETS:
        _, x = channels_of_larger(input, offset)
        launcher = partial(triton_kernels.pool2d, x, (3, 3), (2, 2))
        output = run_in_place_of_channels(launcher, (2, 16, 2, 2), offset, torch.float16, x)
        assert torch.equal(output, F.max_pool2d(input.float(), 3, 2).half())


def dense_fits(kernel, padding, dilation, map_size, **_):
    return all(dilation * (k - 1) < size + 2 * padding for k, size in zip(kernel, map_size, strict=True))


# Around the tiles: few channels, one block of them, a part of one, several.
DENSE = pairwise(
    dense_fits,
    dtype=DTYPES,
    layout=LAYOUTS,
    channels=(1, 3, 13, 16, 24, 40, 72),
    outputs=(1, 8, 16, 33, 72),
    kernel=((1, 1), (3, 3), (5, 5), (1, 7), (3, 2)),
    stride=((1, 1), (2, 2), (3, 1)),
    padding=(0, 1, 2),
    dilation=(1, 2),
    map_size=MAPS + ((9, 12),),
    batch=(1, 2, 3, 0),
    bias=(True, False),
    residual=(None, "contiguous", "channels_last", "sliced"),
    activation=ACTIVATIONS,
    out=("contiguous", "channels_last", "channels"),
)


@pytest.mark.parametrize("case", DENSE, ids=case_id)
def test_conv2d(case):
    dtype, kernel = case["dtype"], case["kernel"]
    input = operand((case["batch"], case["channels"], *case["map_size"]), case["layout"], dtype)
    weight = operand((case["outputs"], case["channels"], *kernel), dtype=dtype, seed=1)
    bias = operand((case["outputs"],), dtype=dtype, seed=2) if case["bias"] else None
    geometry = case["stride"], (case["padding"],) * 2, (case["dilation"],) * 2
    shape = F.conv2d(input.double(), weight.double(), None, *geometry).shape
    residual = case["residual"] and operand(tuple(shape), case["residual"], dtype, 3)

    def formula(input, weight, bias, residual):
        output = F.conv2d(input, weight, bias, *geometry)
        return output if residual is None else output + residual

    wide = [None if t is None else t.double() for t in (input, weight, bias, residual)]
    exact = reference.activation(formula(*wide), case["activation"])
    scale = formula(*(None if t is None else t.abs() for t in wide)) + tolerance.bounded(case["activation"])
    x, w, b, r = on_device((input, weight, bias, residual))
    packed = triton_kernels.pack_conv2d(w)
    launcher = partial(triton_kernels.conv2d, x, packed, b, kernel, *geometry, case["activation"], r)
    if case["out"] == "channels":
        output = run_in_place_of_channels(launcher, tuple(shape), 8, dtype, x)
    else:
        memory_format = torch.channels_last if case["out"] == "channels_last" else torch.contiguous_format
        output = torch.full_like(exact, torch.nan, dtype=dtype, device=DEVICE, memory_format=memory_format)
        with no_copies(x):
            launcher(out=output)
    tolerance.assert_close(output.cpu(), exact, weight[0].numel() + 2, scale)


@pytest.mark.parametrize("channels", (3, 16))
def test_every_tap_of_a_dense_convolution_counts(channels):
    input, weight = operand((1, channels, 5, 5)), operand((4, channels, 3, 3), seed=1)
    exact = F.conv2d(input.double(), weight.double(), padding=1)
    scale = F.conv2d(input.double().abs(), weight.double().abs(), padding=1)
    for tap in range(9):
        lost = weight.clone()
        lost[2, channels - 1].view(-1)[tap] = 0
        x, w, output = on_device((input, lost, torch.empty(1, 4, 5, 5)))
        triton_kernels.conv2d(x, triton_kernels.pack_conv2d(w), None, (3, 3), padding=(1, 1), out=output)
        with pytest.raises(AssertionError, match="elements are wrong"):
            tolerance.assert_close(output.cpu(), exact, 9 * channels, scale)


@pytest.mark.parametrize("channels", (3, 16))
def test_conv2d_pads_behind_the_last_row_and_column_as_out_asks(channels):
    """TensorFlow's "same" padding of even images: none before, one behind."""
    input, weight = operand((2, channels, 6, 8), "channels_last"), operand((8, channels, 3, 3), seed=1)
    exact = F.conv2d(F.pad(input.double(), (0, 1, 0, 1)), weight.double(), stride=2)
    scale = F.conv2d(F.pad(input.double().abs(), (0, 1, 0, 1)), weight.double().abs(), stride=2)
    x, w, output = on_device((input, weight, torch.empty(2, 8, 3, 4)))
    triton_kernels.conv2d(x, triton_kernels.pack_conv2d(w), None, (3, 3), (2, 2), out=output)
    tolerance.assert_close(output.cpu(), exact, 9 * channels, scale)


def test_conv2d_of_nan_and_infinities():
    """Zeros that pad a block of channels or of pixels meet none of them."""
    input = torch.linspace(-1, 1, 20 * 25).reshape(1, 20, 5, 5)
    input[0, 3, 1, 1], input[0, 19, 4, 4] = torch.nan, torch.inf
    weight = operand((8, 20, 3, 3), seed=1)
    x, w, output = on_device((input, weight, torch.empty(1, 8, 5, 5)))
    triton_kernels.conv2d(x, triton_kernels.pack_conv2d(w), None, (3, 3), padding=(1, 1), out=output)
    exact = F.conv2d(input.double(), weight.double(), padding=1)
    assert exact.isnan().any() and exact.isinf().any()
    tolerance.assert_close(output.cpu(), exact, 180, F.conv2d(input.double().abs(), weight.double().abs(), padding=1))
