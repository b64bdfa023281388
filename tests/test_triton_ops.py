"""The operators, functions and layers on the Triton kernels, in Triton's interpreter (``TRITON_INTERPRET=1``).

CPU tensors stand for CUDA's, with the kernels behind the operators, where the C++ kernels were.
"""

import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    LAYOUTS,
    OPERATIONS,
    arguments,
    check,
    check_gradients,
    function,
    operand,
    poisoned_memory,
    strides,
    tensors,
    vector,
)
from torch import nn
from triton_on_cpu import triton_on_cpu

from mobilenet_fast import cuda, functional
from mobilenet_fast import nn as fast

if not cuda.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from test_opcheck import OPTIONAL, leaves, require_gradients  # noqa: E402
from test_triton_kernels import DTYPES, bfloat16_arithmetic, exact_products  # noqa: E402, F401

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def triton_operators():
    with triton_on_cpu():
        yield


@pytest.fixture
def calls(monkeypatch):
    """The names of the launchers called, as they are called."""
    from mobilenet_fast import triton_kernels

    names = []

    def recorded(name, launcher):
        def run(*args, **kwargs):
            names.append(name)
            return launcher(*args, **kwargs)

        return run

    backwards = "depthwise_conv2d_backward", "batch_norm_act_backward", "sums_of_products"
    for name in (*OPERATIONS, "batch_norm_act_training", *backwards):
        monkeypatch.setattr(triton_kernels, name, recorded(name, getattr(triton_kernels, name)))
    return names


def mixed(operation, dtype, layout="contiguous"):
    """Arguments with what may be float32 beside half precision in float32."""
    args = arguments(operation, layout, dtype)
    stay = {"depthwise_conv2d": (2, 7), "pointwise_conv2d": (2, 6), "batch_norm_act": (1, 2, 3, 4)}.get(operation, ())
    return [a.float() if i in stay else a for i, a in enumerate(args)]


# Functions


# The kernels' own tests have the pairs of these.
@pytest.mark.parametrize(
    "dtype, layout",
    [(torch.float32, layout) for layout in LAYOUTS] + [(dtype, "channels_last") for dtype in DTYPES[1:]],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_functions(operation, layout, dtype, calls):
    args = arguments(operation, layout, dtype)
    with poisoned_memory():
        actual = function(operation, "triton")(*args)
    assert calls == [operation]
    assert actual.dtype == dtype
    check(operation, actual, args)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("operation", OPERATIONS[:3])
def test_float32_beside_half_precision(operation, dtype):
    args = mixed(operation, dtype)
    actual = function(operation, "triton")(*args)
    assert actual.dtype == function(operation, "reference")(*args).dtype == dtype
    check(operation, actual, args)
    for index, arg in enumerate(args):
        if isinstance(arg, torch.Tensor) and index and arg.dtype == torch.float32:
            wrong = [a.double() if i == index else a for i, a in enumerate(args)]
            for backend in ("triton", "reference"):
                with pytest.raises(
                    TypeError, match=rf"^{operation}: \w+ must be {dtype} as input is, got torch.float64"
                ):
                    function(operation, backend)(*wrong)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operands_of_any_strides(operation):
    """Every other element of a vector, broadcast images, transposed weights."""
    args = arguments(operation, size=(4, 4))
    spread = [
        torch.stack((a, torch.full_like(a, torch.nan)), -1)[..., 0] if isinstance(a, torch.Tensor) else a for a in args
    ]
    assert all(t.stride(-1) == 2 for t in tensors(spread))
    check(operation, function(operation, "triton")(*spread), args)
    for shape in ((2, 3, 1, 1), (1, 1, 4, 4), (1, 3, 1, 4)):
        args[0] = operand(shape).expand(2, 3, 4, 4)
        check(operation, function(operation, "triton")(*args), args)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_wrong_is_told(operation):
    run, args = function(operation, "triton"), arguments(operation)
    with pytest.raises(ValueError, match=rf"^{operation}: input must be \(N, C, H, W\), got \(3, 5, 4\)"):
        run(args[0][0], *args[1:])
    with pytest.raises(TypeError, match=rf"^{operation}: weight\w* must be|^{operation}: running_mean must be"):
        run(args[0], args[1].double(), *args[2:])
    with pytest.raises(TypeError, match=rf"^{operation}: input must be a tensor, got None"):
        run(None, *args[1:])
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'triton' .* got torch.int64"):
        run(args[0].long(), *args[1:])
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'triton' .* got torch.sparse_coo on cpu"):
        run(args[0].to_sparse(), *args[1:])
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'triton' .* got torch.strided on meta"):
        run(args[0].to("meta"), *args[1:])
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'triton' .* a call is only run"):
        run(args[0].requires_grad_(), *args[1:])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_batch(operation, triton_operators):
    args = arguments(operation)
    images = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() == 4 and i in (0, 4, 5)]
    args = [a[:0] if i in images else a for i, a in enumerate(args)]
    with torch.no_grad():
        assert function(operation)(*args).shape[0] == 0
    args = require_gradients(operation, args)
    function(operation)(*args).sum().backward()
    for leaf in leaves(args):
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


# Operators


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation, layout, triton_operators):
    """Fakes have the sizes, dtypes and strides of what the kernels give, and gradients compile."""
    operator = getattr(torch.ops.mobilenet_fast, operation).default
    args = arguments(operation, layout, size=(3, 2))
    torch.library.opcheck(operator, require_gradients(operation, args))
    for others in (
        [None if i in OPTIONAL[operation] else a for i, a in enumerate(args)],
        mixed(operation, torch.float16, layout),
        arguments(operation, layout, torch.float64, size=(3, 2)),
    ):
        torch.library.opcheck(operator, others, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", LAYOUTS[2:])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_fakes_of_other_layouts(operation, layout, triton_operators):
    operator = getattr(torch.ops.mobilenet_fast, operation).default
    torch.library.opcheck(operator, arguments(operation, layout), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", [(2, 1, 3, 2), (2, 3, 1, 1), (1, 3, 3, 2), (0, 3, 3, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "transposed"))
def test_strides_where_a_shape_has_several_layouts(shape, layout, triton_operators):
    input = operand(shape, layout)
    channels = shape[1]
    operators = torch.ops.mobilenet_fast
    for operator, args in (
        (operators.depthwise_conv2d, (operand((channels, 1, 1, 1)),)),
        (operators.pointwise_conv2d, (operand((4, channels, 1, 1)),)),
        (operators.batch_norm_act, (vector(channels), vector(channels, positive=True))),
        (operators.squeeze_excite, (operand((2, channels, 1, 1)), None, operand((channels, 2, 1, 1)), None)),
    ):
        torch.library.opcheck(operator.default, (input, *args), test_utils=("test_schema", "test_faketensor"))


BACKWARDS = {
    "depthwise_conv2d_backward": lambda input, grad: (
        (grad, input, operand((3, 1, 3, 3), seed=1), (1, 1), (1, 1), (1, 1), *needed)
        for needed in ((True, True), (True, False), (False, True))
    ),
    "batch_norm_act_backward": lambda input, grad: (
        (grad, input, vector(3), vector(3, positive=True), weight, bias, 1e-3, "silu")
        for weight, bias in ((vector(3), vector(3)), (None, None))
    ),
    "pointwise_conv2d_backward": lambda input, grad: (
        (grad, input, operand((3, 3, 1, 1), seed=1), *needed) for needed in ((True, True), (True, False), (False, True))
    ),
    "squeeze_excite_backward": lambda input, grad: (
        (grad, input, operand((2, 3, 1, 1)), bias1, operand((3, 2, 1, 1)), bias2, "silu", "sigmoid")
        for bias1, bias2 in ((vector(2), vector(3)), (None, None))
    ),
}


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "transposed"))
@pytest.mark.parametrize("operation", BACKWARDS)
def test_opcheck_of_gradients(operation, layout, triton_operators):
    operator = getattr(torch.ops.mobilenet_fast, operation).default
    for args in BACKWARDS[operation](operand((2, 3, 5, 4), layout), operand((2, 3, 5, 4), "channels_last", seed=5)):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("padding", ((0, 1, 0, 1), (2, 0, 1, 3)))
def test_padding_of_each_side(padding, triton_operators):
    input, weight = operand((2, 3, 6, 5)), operand((3, 1, 3, 3), seed=1)
    args = [input.double().requires_grad_(), weight.double().requires_grad_(), None, [2, 2], list(padding)]
    operator = torch.ops.mobilenet_fast.depthwise_conv2d
    top, bottom, left, right = padding
    expected = F.conv2d(F.pad(args[0], (left, right, top, bottom)), args[1], None, 2, groups=3)
    torch.testing.assert_close(operator(*args), expected)
    torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))
    grad = operand(tuple(expected.shape), dtype=torch.float64, seed=2)
    for actual, wanted in zip(
        torch.autograd.grad(operator(*args), args[:2], grad), torch.autograd.grad(expected, args[:2], grad), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


# Gradients


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradcheck(operation, triton_operators):
    args = arguments(operation, dtype=torch.float64, activation="silu", channels=2, size=(3, 2))
    # Along random directions: the interpreter is slow.
    assert torch.autograd.gradcheck(function(operation, "triton"), require_gradients(operation, args), fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_of_activations(operation, activation, triton_operators):
    args = [a * 4 if isinstance(a, torch.Tensor) else a for a in arguments(operation, activation=activation)]
    check_gradients(operation, function(operation), args, (1, 2) if operation == "batch_norm_act" else ())


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients(operation, layout, triton_operators, calls):
    args = arguments(operation, layout, activation="silu")
    check_gradients(operation, function(operation), args, (1, 2) if operation == "batch_norm_act" else ())
    own = {
        "depthwise_conv2d": [operation, operation, f"{operation}_backward"],
        "pointwise_conv2d": [operation, operation],
        "batch_norm_act": [operation, f"{operation}_backward"],
        "squeeze_excite": [operation, "sums_of_products"],
    }
    assert calls == own[operation]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_in_half_precision(operation, dtype, triton_operators):
    """Of the dtypes of their operands, no further from float64's than a few roundings of the largest."""
    args = require_gradients(operation, mixed(operation, dtype, "channels_last"))
    exact = require_gradients(operation, [a.double() if isinstance(a, torch.Tensor) else a for a in args])
    function(operation)(*args).sum().backward()
    function(operation, "reference")(*exact).sum().backward()
    for leaf, wanted in zip(leaves(args), leaves(exact), strict=True):
        assert leaf.grad.dtype == leaf.dtype
        error = (leaf.grad.double() - wanted.grad).abs().max()
        assert error <= 16 * torch.finfo(dtype).eps * wanted.grad.abs().max()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_the_gradients_asked_for(operation, triton_operators):
    for index, arg in enumerate(arguments(operation)):
        if not isinstance(arg, torch.Tensor):
            continue
        args, same = arguments(operation), arguments(operation)
        args[index], same[index] = args[index].clone().requires_grad_(), same[index].clone().requires_grad_()
        if operation == "batch_norm_act" and index in (1, 2):
            with pytest.raises(NotImplementedError, match="^batch_norm_act: running_mean and running_var must need no"):
                function(operation)(*args).sum().backward()
            continue
        function(operation)(*args).sum().backward()
        function(operation, "reference")(*same).sum().backward()
        assert [isinstance(a, torch.Tensor) and a.grad is not None for a in args].count(True) == 1
        torch.testing.assert_close(args[index].grad, same[index].grad)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_are_deterministic(operation, triton_operators):
    results = []
    for _ in range(2):
        args = require_gradients(operation, arguments(operation, size=(9, 8)))
        function(operation)(*args).square().sum().backward()
        results.append([leaf.grad for leaf in leaves(args)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_second_derivatives_go_through_the_reference(operation, triton_operators, calls):
    args = require_gradients(operation, arguments(operation, dtype=torch.float64, activation="silu"))
    (first,) = torch.autograd.grad(function(operation)(*args).square().sum(), args[0], create_graph=True)
    assert calls == [operation]
    (second,) = torch.autograd.grad(first.sum(), args[0])
    (wanted,) = torch.autograd.grad(function(operation, "reference")(*args).square().sum(), args[0], create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(wanted.sum(), args[0])[0])


# Autocast


def autocast_cases(operation):
    """Networks in training: float32 parameters; images of the lower dtype behind a convolution, of float32 else."""
    for image in (torch.bfloat16, torch.float32):
        args = arguments(operation)
        for index in {"pointwise_conv2d": (0, 4), "squeeze_excite": (0,)}.get(operation, (0,)):
            args[index] = args[index].to(image)
        yield args
    if operation == "pointwise_conv2d":
        args = arguments(operation)
        args[5] = args[5].bfloat16()  # the residual
        yield args
    yield arguments(operation, dtype=torch.float64)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast(operation, triton_operators, calls):
    for args in autocast_cases(operation):
        mine, same = require_gradients(operation, args), require_gradients(operation, args)
        exact = require_gradients(operation, [a.double() if isinstance(a, torch.Tensor) else a for a in args])
        del calls[:]
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = function(operation)(*mine), function(operation, "reference")(*same)
        assert calls or (operation == "squeeze_excite" and args[0].dtype == torch.float64)
        assert actual.dtype == expected.dtype
        wanted = function(operation, "reference")(*exact)
        for result in (actual, expected):
            result.float().sum().backward()
        wanted.sum().backward()
        near(actual, wanted, expected)
        for leaf, stock, truth in zip(leaves(mine), leaves(same), leaves(exact), strict=True):
            assert leaf.grad.dtype == stock.grad.dtype == leaf.dtype
            near(leaf.grad, truth.grad, stock.grad)


def near(actual, exact, stock):
    """As near to the truth as PyTorch is, or within a rounding to bfloat16 of the largest."""
    allowed = 2 * (stock.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (actual.double() - exact).abs().max() <= allowed


def test_autocast_of_odd_dtypes(triton_operators):
    args = arguments("squeeze_excite")
    args[0] = args[0].half()
    with torch.autocast("cpu", torch.bfloat16):
        actual = function("squeeze_excite")(*args)
        assert actual.dtype == torch.float32 and torch.equal(actual, function("squeeze_excite", "reference")(*args))


# Tracing


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_in_one_graph(operation, triton_operators):
    torch._dynamo.reset()
    args = arguments(operation, "channels_last")
    compiled = torch.compile(function(operation), fullgraph=True, backend="aot_eager")
    expected = function(operation)(*args)
    actual = compiled(*args)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()
    args, same = require_gradients(operation, args), require_gradients(operation, args)
    compiled(*args).square().sum().backward()
    function(operation)(*same).square().sum().backward()
    for a, b in zip(leaves(args), leaves(same), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_under_autocast(operation, triton_operators):
    torch._dynamo.reset()
    compiled = torch.compile(function(operation), fullgraph=True, backend="aot_eager")
    args = arguments(operation)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(*args), function(operation)(*args)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_fake_cuda_tensors(monkeypatch):
    """A network for a GPU can be traced where there is none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(cuda, "_found", {0: None})
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True), Seen(), torch.device("cuda"):
        x = torch.empty(2, 8, 9, 9, dtype=torch.float16).to(memory_format=torch.channels_last)
        y = functional.depthwise_conv2d(x, x.new_empty(8, 1, 3, 3), x.new_empty(8, dtype=torch.float32))
        assert (y.dtype, y.shape, y.device.type) == (torch.float16, (2, 8, 7, 7), "cuda")
        assert y.is_contiguous(memory_format=torch.channels_last)
        y = functional.pointwise_conv2d(torch.empty(2, 8, 9, 9), torch.empty(4, 8, 1, 1))
        assert (y.dtype, y.shape) == (torch.float32, (2, 4, 9, 9))
        with pytest.raises(NotImplementedError, match="^batch_norm_act: input must be one of float16, .*float8_e5m2"):
            torch.ops.mobilenet_fast.batch_norm_act(
                x.to(torch.float8_e5m2), *[x.new_empty(8, dtype=torch.float8_e5m2)] * 2
            )
    assert [name for name in seen if "mobilenet_fast" in name and "batch_norm" not in name] == [
        "mobilenet_fast.depthwise_conv2d.default",
        "mobilenet_fast.pointwise_conv2d.default",
    ]


# Layers


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        fast.ConvNormAct(3, 8, 3, 2, activation_layer="hardswish"),
        fast.InvertedResidual(8, 16, 8, squeeze_channels=4),
        fast.InvertedResidual(8, 24, 12, 5, stride=2, padding="same", activation_layer="relu"),
        fast.SeparableConv2d(12, 16, padding=1, activation="relu6"),
        fast.BatchNormAct2d(16, activation="silu"),
        fast.SqueezeExcitation(16, 4),
    )


def prepared(model):
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(operand(tuple(value.shape), seed=len(name)) * 0.5)
            if name.endswith("running_var"):
                value.abs_().add_(0.1)
    return model.eval()


def in_pytorch(model, x):
    from mobilenet_fast.nn import dispatch, fusion

    with pytest.MonkeyPatch.context() as patch:
        for module in (dispatch, fusion):
            patch.setattr(module, "takes_input", lambda input: False)
        return model(x)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_layers(layout, triton_operators, calls):
    model, x = prepared(network()), operand((2, 3, 12, 12), layout)
    with torch.no_grad():
        expected = in_pytorch(model, x)
        assert not calls
        actual = model(x)
    assert calls.count("depthwise_conv2d") == 3 and calls.count("squeeze_excite") == 2
    assert calls.count("pointwise_conv2d") == 5 and calls.count("batch_norm_act") == 2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert strides(actual) == strides(expected)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_layers_with_float32_norms(dtype, triton_operators, calls):
    model = prepared(network())
    exact = in_pytorch(model.double(), operand((2, 3, 12, 12)).double()).detach()
    for module in model.modules():
        if not isinstance(module, nn.BatchNorm2d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
        else:
            module.float()
    x = operand((2, 3, 12, 12)).to(dtype)
    with torch.no_grad():
        expected = in_pytorch(model, x)
        assert not calls
        actual = model(x)
    assert len(calls) == 12 and actual.dtype == expected.dtype == dtype
    error = (actual.double() - exact).abs().max()
    assert error <= 2 * (expected.double() - exact).abs().max()


@contextmanager
def pytorch_alone():
    """Layers run as PyTorch's."""
    from mobilenet_fast.nn import dispatch, training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_triton_serves", lambda input: False)
        patch.setattr(dispatch, "_KERNEL_DTYPES", ())
        patch.setattr(training.TrainingBlock, "_takes", lambda self, x, dtype: False)
        yield


def step(model, x):
    """What a step of training gives: the output, gradients, and buffers."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad), *model.buffers()]


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_layers_learn_by_kernels(layout, frozen, triton_operators, calls):
    """Depthwise convolutions, batch norms with their activations, and squeeze-excite; other layers are PyTorch's."""
    x, results = operand((2, 3, 12, 12), layout, torch.float64), []
    for context in (nullcontext(), pytorch_alone()):
        model = prepared(network().double()).train()
        if frozen:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        calls.clear()
        with context:
            results.append(step(model, x))
        ours = isinstance(context, nullcontext)
        assert calls.count("depthwise_conv2d") == calls.count("depthwise_conv2d_backward") == 3 * ours
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert calls.count("batch_norm_act" if frozen else "batch_norm_act_training") == norms * ours
        assert calls.count("batch_norm_act_backward") == norms * ours
        assert calls.count("squeeze_excite") == calls.count("sums_of_products") == 2 * ours
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.3, "affine": False},
        {"track_running_stats": False},
        {"eps": 0.1, "activation": "hardswish"},
        {"activation": "silu"},
    ],
    ids=str,
)
def test_batch_norms_learn_by_kernels(options, triton_operators, calls):
    """Over several steps: running statistics too, in training and, where there are none, in evaluation."""
    results = []
    for context in (nullcontext(), pytorch_alone()):
        layer = fast.BatchNormAct2d(5, **options).double()
        for i, parameter in enumerate(layer.parameters()):
            parameter.data = vector(5, torch.float64, seed=i)
        calls.clear()
        with context:
            steps = [step(layer, operand((2, 5, 4, 3), dtype=torch.float64, seed=i) + i) for i in range(3)]
            results.append([*steps[0], *steps[2], layer.eval()(operand((2, 5, 4, 3), dtype=torch.float64))])
        assert bool(calls) == isinstance(context, nullcontext)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_batch_norms_learn_in_half_precision_with_float32_parameters(triton_operators, calls):
    layer = fast.BatchNormAct2d(5, activation="relu")
    exact = fast.BatchNormAct2d(5, activation="relu").double()
    for dtype in HALF:
        x = operand((4, 5, 6, 3)).to(dtype)
        found = step(layer, x)
        with pytorch_alone():
            wanted = step(exact, x.double())
        assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
        for actual, expected in zip(found[:4], wanted[:4], strict=True):
            error = (actual.double() - expected).abs().max()
            assert error <= 16 * torch.finfo(dtype).eps * expected.abs().max()
    assert calls.count("batch_norm_act_training") == 2


def test_a_batch_norm_with_a_bias_alone(triton_operators, calls):
    results = []
    for context in (nullcontext(), pytorch_alone()):
        layer = fast.BatchNormAct2d(5, activation="relu").double()
        layer.weight, layer.bias.data = None, vector(5, torch.float64)
        with context:
            results.append(step(layer, operand((2, 5, 4, 3), dtype=torch.float64)))
    assert "batch_norm_act_training" in calls
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_gradients_of_a_batch_norm_that_no_kernel_reads(triton_operators):
    layer = fast.BatchNormAct2d(3, activation="silu").double()
    x = operand((2, 3, 4, 3), dtype=torch.float64).requires_grad_()
    y, grad = layer(x), operand((2, 3, 4, 3), dtype=torch.float64, seed=1)
    wanted = torch.autograd.grad(y, (x, layer.weight), grad, retain_graph=True)
    negated = torch.autograd.grad(y, (x, layer.weight), torch._neg_view(-grad), retain_graph=True)
    several = torch.stack([grad, 2 * grad])
    batched = torch.autograd.grad(y, (x, layer.weight), several, retain_graph=True, is_grads_batched=True)
    zeros = torch.autograd.grad(y, (x, layer.weight), torch._efficientzerotensor(y.shape, dtype=torch.float64))
    for expected, *found in zip(wanted, negated, batched, zeros, strict=True):
        torch.testing.assert_close(found[0], expected)
        torch.testing.assert_close(found[1], torch.stack([expected, 2 * expected]))
        assert not found[2].any()


def test_what_a_batch_norm_refuses_is_pytorchs_own(triton_operators):
    layer = fast.BatchNormAct2d(5)
    for shape in ((1, 5, 1, 1), (2, 4, 3, 3)):
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        with pytest.raises((ValueError, RuntimeError), match="more than 1 value|should contain 4 elements"):
            layer(operand(shape))
        for name, value in layer.state_dict().items():
            if "running" in name:
                assert torch.equal(value, before[name])
    layer.running_mean = None
    with pytest.raises(ValueError, match="running_mean and running_var must either both be None or neither"):
        layer(operand((2, 5, 3, 3)))


def test_second_derivatives_of_a_batch_norm_that_learns(triton_operators):
    layer = fast.BatchNormAct2d(2, activation="silu").double()
    layer.weight.data, layer.bias.data = vector(2, torch.float64), vector(2, torch.float64, seed=1)
    x = operand((2, 2, 3, 2), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x, atol=1e-4)


def test_folding_a_batch_norm():
    for channels in (1, 7, 300):
        mean, var, weight, bias = (vector(channels, seed=i, positive=i == 1) for i in range(4))
        for w, b in ((weight, bias), (None, None), (weight, None), (None, bias)):
            scale, shift = cuda.fold_batch_norm(mean, var, w, b, 0.1)
            x = operand((1, channels, 1, 2))
            expected = F.batch_norm(x, mean, var, w, b, eps=0.1)
            torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], expected)
        halves = [v.half() for v in (mean, var, weight, bias)]
        folded = cuda.fold_batch_norm(*halves, 0.1)
        assert folded.dtype == torch.float32
        torch.testing.assert_close(folded, cuda.fold_batch_norm(*(v.float() for v in halves), 0.1))


# Imports


def test_importing_brings_no_kernels():
    code = (
        "import sys\n"
        "import mobilenet_fast, torch\n"
        "assert not [name for name in sys.modules if 'triton_kernels' in name]\n"
        "mobilenet_fast.functional.batch_norm_act(torch.ones(1, 2, 3, 3), *[torch.ones(2)] * 2, backend='triton')\n"
        "assert 'mobilenet_fast.triton_kernels' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def test_without_triton():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import mobilenet_fast, torch\n"
        "from mobilenet_fast import cuda\n"
        "args = torch.ones(1, 2, 3, 3), *[torch.ones(2)] * 2\n"
        "mobilenet_fast.functional.batch_norm_act(*args)\n"
        "for call in (mobilenet_fast.functional.batch_norm_act, cuda.batch_norm_act):\n"
        "    try:\n"
        "        call(*args, **({} if call is cuda.batch_norm_act else {'backend': 'triton'}))\n"
        "    except NotImplementedError as error:\n"
        "        assert str(error).startswith('batch_norm_act: ')\n"
        "        assert str(error).endswith(': Triton is not installed'), error\n"
        "    else:\n"
        "        raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
