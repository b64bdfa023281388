"""What an operation refuses, in the same words whichever way it is called: operation, rule, what came."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import OPERATIONS, arguments, function

from mobilenet_fast import _C, cuda, functional, reference


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# operation, index of the argument, the bad value, the error, its message
CASES = [
    ("depthwise_conv2d", 0, zeros(3, 5, 4), ValueError, r"input must .*\(3, 5, 4\)"),
    ("depthwise_conv2d", 0, zeros(2, 7, 5, 4), ValueError, r"weight must be \(C, 1, kH, kW\) with C=7.*\(6, 1, 3, 2\)"),
    ("depthwise_conv2d", 0, zeros(2, 0, 5, 4), ValueError, r"input must .*\(2, 0, 5, 4\)"),
    ("depthwise_conv2d", 0, zeros(2, 3, 0, 4), ValueError, r"input must .*\(2, 3, 0, 4\)"),
    ("depthwise_conv2d", 1, zeros(6, 2, 3, 2), ValueError, r"weight must be \(C, 1, kH, kW\) with C=3.*\(6, 2, 3, 2\)"),
    ("depthwise_conv2d", 1, zeros(4, 1, 3, 2), ValueError, r"weight must be \(C, 1, kH, kW\) with C=3.*\(4, 1, 3, 2\)"),
    ("depthwise_conv2d", 1, zeros(0, 1, 3, 2), ValueError, r"weight must be \(C, 1, kH, kW\) with C=3.*\(0, 1, 3, 2\)"),
    ("depthwise_conv2d", 1, zeros(6, 1, 3), ValueError, r"weight must .*\(6, 1, 3\)"),
    ("depthwise_conv2d", 1, zeros(6, 1, 0, 2), ValueError, r"weight must .*\(6, 1, 0, 2\)"),
    ("depthwise_conv2d", 4, [1, 1, 1], ValueError, r"padding must be one number or two, got 3"),
    ("depthwise_conv2d", 1, zeros(6, 1, 9, 2), ValueError, r"kernel .*padded input"),
    ("depthwise_conv2d", 2, zeros(5), ValueError, r"bias must .*6.*5"),
    ("depthwise_conv2d", 2, zeros(6, 1), ValueError, r"bias must .*\(6, 1\)"),
    ("depthwise_conv2d", 3, [0, 1], ValueError, r"stride must .*\(0, 1\)"),
    ("depthwise_conv2d", 3, [-1, 1], ValueError, r"stride must .*\(-1, 1\)"),
    ("depthwise_conv2d", 4, [-1, 0], ValueError, r"padding must .*\(-1, 0\)"),
    ("depthwise_conv2d", 5, [1, 0], ValueError, r"dilation must .*\(1, 0\)"),
    # The sizes that follow from these overflow.
    ("depthwise_conv2d", 3, [2**62, 1], ValueError, rf"stride must .*\({2**62}, 1\)"),
    ("depthwise_conv2d", 4, [2**63 - 1, 0], ValueError, rf"padding must .*\({2**63 - 1}, 0\)"),
    ("depthwise_conv2d", 4, [0, 2**31], ValueError, rf"padding must .*\(0, {2**31}\)"),
    ("depthwise_conv2d", 5, [2**63 - 1, 1], ValueError, rf"dilation must .*\({2**63 - 1}, 1\)"),
    ("depthwise_conv2d", 5, [9, 1], ValueError, r"kernel .*padded input"),
    ("depthwise_conv2d", 6, "swish", ValueError, r"activation must be one of none, relu, .*got 'swish'"),
    ("depthwise_conv2d", 7, zeros(3), ValueError, r"scale must .*6.*3"),
    ("depthwise_conv2d", 7, zeros(6, 1, 1, 1), ValueError, r"scale must .*\(6, 1, 1, 1\)"),
    ("pointwise_conv2d", 0, zeros(2, 3, 5), ValueError, r"input must .*\(2, 3, 5\)"),
    ("pointwise_conv2d", 0, zeros(2, 7, 5, 4), ValueError, r"weight must be \(K, C, 1, 1\) with C=7.*\(4, 3, 1, 1\)"),
    ("pointwise_conv2d", 1, zeros(4, 3, 3, 3), ValueError, r"weight must be \(K, C, 1, 1\) with C=3.*\(4, 3, 3, 3\)"),
    ("pointwise_conv2d", 1, zeros(4, 3), ValueError, r"weight must .*\(4, 3\)"),
    ("pointwise_conv2d", 1, zeros(0, 3, 1, 1), ValueError, r"weight must be \(K, C, 1, 1\) with C=3.*\(0, 3, 1, 1\)"),
    ("pointwise_conv2d", 2, zeros(3), ValueError, r"bias must .*4.*3"),
    ("pointwise_conv2d", 3, "RELU", ValueError, r"activation must be one of none, relu, .*got 'RELU'"),
    ("pointwise_conv2d", 4, zeros(1, 3, 1, 1), ValueError, r"gate must .*\(2, 3, 1, 1\).*\(1, 3, 1, 1\)"),
    ("pointwise_conv2d", 4, zeros(2, 3), ValueError, r"gate must .*\(2, 3\)"),
    ("pointwise_conv2d", 5, zeros(2, 4, 5, 5), ValueError, r"residual must .*\(2, 4, 5, 4\).*\(2, 4, 5, 5\)"),
    ("pointwise_conv2d", 5, zeros(1, 4, 5, 4), ValueError, r"residual must .*\(2, 4, 5, 4\).*\(1, 4, 5, 4\)"),
    ("pointwise_conv2d", 6, zeros(3), ValueError, r"scale must .*4.*3"),
    ("pointwise_conv2d", 6, zeros(1), ValueError, r"scale must .*4.*1"),
    ("batch_norm_act", 0, zeros(2, 3), ValueError, r"input must .*\(2, 3\)"),
    ("batch_norm_act", 1, zeros(4), ValueError, r"running_mean must .*3.*4"),
    ("batch_norm_act", 2, zeros(4), ValueError, r"running_var must .*3.*4"),
    ("batch_norm_act", 3, zeros(1), ValueError, r"weight must .*3.*1"),
    ("batch_norm_act", 4, zeros(3, 1), ValueError, r"bias must .*\(3, 1\)"),
    ("batch_norm_act", 6, "", ValueError, r"activation must be one of none, relu, .*got ''"),
    ("squeeze_excite", 0, zeros(2, 3, 5, 4, 1), ValueError, r"input must .*\(2, 3, 5, 4, 1\)"),
    ("squeeze_excite", 1, zeros(2, 4, 1, 1), ValueError, r"weight1 must be \(S, C, 1, 1\) with C=3.*\(2, 4, 1, 1\)"),
    ("squeeze_excite", 1, zeros(2, 3), ValueError, r"weight1 must .*\(2, 3\)"),
    ("squeeze_excite", 2, zeros(3), ValueError, r"bias1 must .*2.*3"),
    ("squeeze_excite", 3, zeros(3, 3, 1, 1), ValueError, r"weight2 must .*\(3, 3, 1, 1\)"),
    ("squeeze_excite", 3, zeros(2, 2, 1, 1), ValueError, r"weight2 must .*\(2, 2, 1, 1\)"),
    ("squeeze_excite", 4, zeros(2), ValueError, r"bias2 must .*3.*2"),
    ("squeeze_excite", 5, "gelu", ValueError, r"squeeze_activation must be one of none, relu, .*got 'gelu'"),
    ("squeeze_excite", 6, "gelu", ValueError, r"gate_activation must be one of none, relu, .*got 'gelu'"),
]
# Operands unlike the input, and inputs of no floating dtype.
for _operation, _names in (
    ("depthwise_conv2d", {1: "weight", 2: "bias", 7: "scale"}),
    ("pointwise_conv2d", {1: "weight", 2: "bias", 4: "gate", 5: "residual", 6: "scale"}),
    ("batch_norm_act", {1: "running_mean", 2: "running_var", 3: "weight", 4: "bias"}),
    ("squeeze_excite", {1: "weight1", 2: "bias1", 3: "weight2", 4: "bias2"}),
):
    for _dtype in (torch.int64, torch.bool, torch.complex64):
        CASES.append((_operation, 0, zeros(2, 3, 5, 4, dtype=_dtype), TypeError, r"input must "))
    for _index, _name in _names.items():
        _operand = arguments(_operation)[_index]
        CASES.append((_operation, _index, _operand.double(), TypeError, rf"{_name} must "))
        CASES.append((_operation, _index, _operand.to(torch.int32), TypeError, rf"{_name} must "))
        CASES.append((_operation, _index, _operand.to("meta"), ValueError, rf"{_name} must be on cpu as input is"))

CALLS = {
    "kernel": lambda operation: getattr(_C, operation),
    "operator": lambda operation: getattr(torch.ops.mobilenet_fast, operation),
    "reference": lambda operation: getattr(reference, operation),
    "function": lambda operation: function(operation),
}


def name(value):
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)}{str(value.dtype).removeprefix('torch.')}{value.device}".replace(" ", "")
    return getattr(value, "__name__", None) or (str(value) if not isinstance(value, tuple) else "Error")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("operation, index, value, error, message", CASES, ids=name)
def test_refuses(call, operation, index, value, error, message):
    args = arguments(operation)
    args[index] = value
    with pytest.raises(error, match=rf"(?s)^{operation}: .*{message}"):
        CALLS[call](operation)(*args)


# operation, index of the argument, a value of a wrong type, the message
WRONG_TYPES = [
    ("depthwise_conv2d", 3, 1.5, r"stride must be integers, got \(1.5, 1.5\)"),
    ("depthwise_conv2d", 3, [1, "a"], r"stride must be integers, got \(1, 'a'\)"),
    ("depthwise_conv2d", 4, None, r"padding must be integers, got \(None, None\)"),
    ("depthwise_conv2d", 5, {}, r"dilation must be integers, got \(\{\}, \{\}\)"),
    ("batch_norm_act", 5, "a", "eps must be a number, got str"),
    ("batch_norm_act", 5, None, "eps must be a number, got None"),
]
for _operation, _required, _optional, _activations in (
    ("depthwise_conv2d", {1: "weight"}, {2: "bias", 7: "scale"}, {6: "activation"}),
    ("pointwise_conv2d", {1: "weight"}, {2: "bias", 4: "gate", 5: "residual", 6: "scale"}, {3: "activation"}),
    ("batch_norm_act", {1: "running_mean", 2: "running_var"}, {3: "weight", 4: "bias"}, {6: "activation"}),
    (
        "squeeze_excite",
        {1: "weight1", 3: "weight2"},
        {2: "bias1", 4: "bias2"},
        {5: "squeeze_activation", 6: "gate_activation"},
    ),
):
    for _index, _name in {0: "input", **_required}.items():
        for _value, _kind in ((None, "None"), (np.ones((2, 3, 5, 4), "float32"), "ndarray"), ([1.0], "list")):
            WRONG_TYPES.append((_operation, _index, _value, f"{_name} must be a tensor, got {_kind}"))
    for _index, _name in _optional.items():
        WRONG_TYPES.append((_operation, _index, 1.0, f"{_name} must be a tensor or None, got float"))
    for _index, _name in _activations.items():
        for _value, _kind in ((None, "None"), (F.relu, "function"), ([], "list")):
            WRONG_TYPES.append((_operation, _index, _value, f"{_name} must be a string, got {_kind}"))


@pytest.mark.parametrize("gradients", (False, True))
@pytest.mark.parametrize("backend", (None, "cpp", "reference"))
@pytest.mark.parametrize("operation, index, value, message", WRONG_TYPES, ids=name)
def test_wrong_types_are_told_in_one_line(backend, gradients, operation, index, value, message):
    args = [a.requires_grad_(gradients) if isinstance(a, torch.Tensor) else a for a in arguments(operation)]
    args[index] = value
    with pytest.raises(TypeError, match=rf"^{operation}: {message}$") as error:
        function(operation, backend)(*args)
    assert error.value.__context__ is None  # nothing longer is printed above it


@pytest.mark.parametrize("backend", ("cpp", "reference"))
def test_integers_of_numpy(backend):
    run, args = function("depthwise_conv2d", backend), arguments("depthwise_conv2d")
    expected = run(*args)
    args[3:6] = (np.int64(2), np.int32(1)), [np.int64(1)], list(np.array([1, 2]))
    assert torch.equal(run(*args), expected)
    args[3] = np.int64(2)
    assert run(*args).shape == (2, 6, 3, 2)


@pytest.mark.parametrize("gradients", (False, True))
@pytest.mark.parametrize("backend", (None, "cpp", "reference"))
def test_four_paddings_are_no_argument_of_users(backend, gradients):
    args = arguments("depthwise_conv2d")
    args[1].requires_grad_(gradients)
    args[4] = [1, 0, 1, 0]
    with pytest.raises(ValueError, match="^depthwise_conv2d: padding must be one number or two, got 4$"):
        function("depthwise_conv2d", backend)(*args)


@pytest.mark.parametrize("call", ("kernel", "operator", "reference", "function"))
def test_kernel_that_just_fits(call):
    args = [torch.ones(1, 1, 2, 3), torch.ones(1, 1, 4, 4), None, [1, 1], [1, 1], [1, 1], "none", None]
    assert CALLS[call]("depthwise_conv2d")(*args).shape == (1, 1, 1, 2)
    args[5] = [2, 1]
    with pytest.raises(ValueError, match=r"^depthwise_conv2d: .*kernel .*padded input"):
        CALLS[call]("depthwise_conv2d")(*args)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_instruction_set(operation):
    with pytest.raises(ValueError, match=rf"^{operation}: isa.* must be one of .*scalar.*'sse9'"):
        getattr(_C, operation)(*arguments(operation), isa="sse9")
    other = "neon" if "neon" not in _C.available_isas() else "avx2"
    with pytest.raises(ValueError, match=rf"^{operation}: isa.* must be one of .*scalar.*'{other}'"):
        getattr(_C, operation)(*arguments(operation), isa=other)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_backend(operation):
    with pytest.raises(ValueError, match=rf"^{operation}: backend must be None, 'cpp', 'triton' or .*, got 'cudnn'$"):
        function(operation, "cudnn")(*arguments(operation))


@pytest.mark.skipif(cuda.INTERPRETED, reason="interpreted kernels take CPU tensors")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_triton_refuses_the_cpu(operation):
    args = arguments(operation)
    with pytest.raises(
        NotImplementedError,
        match=rf"^{operation}: backend 'triton' .*: they take strided CUDA tensors, got torch.strided on cpu$",
    ):
        function(operation, "triton")(*args)
    with pytest.raises(NotImplementedError, match=rf"^{operation}: the Triton kernels .* got torch.strided on cpu$"):
        getattr(cuda, operation)(*args)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.int64, torch.complex64))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_forced_kernels_refuse_other_dtypes(operation, dtype):
    args = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments(operation)]
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'cpp' .*{dtype}"):
        function(operation, "cpp")(*args)
    with pytest.raises((TypeError, NotImplementedError), match=rf"^{operation}: input must "):
        getattr(_C, operation)(*args)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_forced_kernels_refuse_other_devices_and_layouts(operation):
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments(operation)]
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'cpp' .*meta"):
        function(operation, "cpp")(*args)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"^{operation}: input must "):
        getattr(_C, operation)(*args)
    args = arguments(operation)
    args[0] = args[0].to_sparse()
    with pytest.raises(NotImplementedError, match=rf"^{operation}: backend 'cpp' .*sparse"):
        function(operation, "cpp")(*args)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"^{operation}: input must "):
        getattr(_C, operation)(*args)


def test_padding_by_name():
    input, weight, *_ = arguments("depthwise_conv2d")
    with pytest.raises(ValueError, match=r"^depthwise_conv2d: padding must be .*'full'"):
        functional.depthwise_conv2d(input, weight, padding="full")
    with pytest.raises(ValueError, match=r"^depthwise_conv2d: padding 'same' needs stride 1, got \(2, 2\)"):
        functional.depthwise_conv2d(input, weight, stride=2, padding="same")
    for operands, dilation, message in (
        ((None, weight), 1, "input must be a tensor, got None"),
        ((input, None), 1, "weight must be a tensor, got None"),
        ((input, weight), "a", r"dilation must be integers, got \('a', 'a'\)"),
    ):
        with pytest.raises(TypeError, match=f"^depthwise_conv2d: {message}$"):
            functional.depthwise_conv2d(*operands, padding="same", dilation=dilation)


def test_half_precision_batch_norm_keeps_float32_statistics():
    """As torch's: the parameters of a half-precision batch norm may stay in float32."""
    input, *parameters, eps, activation = arguments("batch_norm_act")
    actual = functional.batch_norm_act(input.bfloat16(), *parameters, eps=eps, activation=activation)
    assert actual.dtype == torch.bfloat16


def test_no_argument_at_all_and_none():
    for operation in OPERATIONS:
        with pytest.raises(TypeError):
            getattr(_C, operation)()
        args = arguments(operation)
        args[1] = None
        with pytest.raises(TypeError):
            getattr(_C, operation)(*args)


def test_unknown_activation_of_the_reference():
    with pytest.raises(ValueError, match=r"^activation: activation must be one of none, relu, .*got 'swish'"):
        reference.activation(torch.ones(1), "swish")
