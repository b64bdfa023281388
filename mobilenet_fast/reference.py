"""Every operation in plain PyTorch: any floating dtype, any device, differentiable. The specification of the kernels.

The checks are here as well, for what an operation refuses is a part of what it is; the kernels refuse the same.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}

# The gradient at an activation's input, from that at its output and the input.
ACTIVATION_GRADIENTS = {
    "none": lambda grad, x: grad,
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "relu6": lambda grad, x: torch.ops.aten.hardtanh_backward(grad, x, 0, 6),
    "hardswish": torch.ops.aten.hardswish_backward,
    "hardsigmoid": torch.ops.aten.hardsigmoid_backward,
    "silu": torch.ops.aten.silu_backward,
    "sigmoid": lambda grad, x: torch.ops.aten.sigmoid_backward(grad, x.sigmoid()),
}


def activation(x: Tensor, name: str) -> Tensor:
    """``x`` through the activation of that name, one of `ACTIVATIONS`."""
    check_activation("activation", name)
    return ACTIVATIONS[name](x)


def depthwise_conv2d(
    input, weight, bias=None, stride=1, padding=0, dilation=1, activation="none", scale=None
) -> Tensor:
    """``activation(F.conv2d(input, scale * weight, bias, stride, padding, dilation, groups=input.size(1)))``"""
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    check_depthwise_conv2d(input, weight, bias, stride, padding, dilation, activation, scale)
    groups = input.size(1)
    if len(padding) == 4:
        top, bottom, left, right = padding
        input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
    weight, bias = scaled(weight, scale), _like(weight, bias)
    return ACTIVATIONS[activation](F.conv2d(input, weight, bias, stride, padding, dilation, groups))


def pointwise_conv2d(input, weight, bias=None, activation="none", gate=None, residual=None, scale=None) -> Tensor:
    """``activation(F.conv2d(input * gate, scale * weight, bias) + residual)``"""
    check_pointwise_conv2d(input, weight, bias, activation, gate, residual, scale)
    output = F.conv2d(input if gate is None else input * gate, scaled(weight, scale), _like(weight, bias))
    return ACTIVATIONS[activation](output if residual is None else output + residual)


def batch_norm_act(input, running_mean, running_var, weight=None, bias=None, eps=1e-5, activation="none") -> Tensor:
    """``activation(F.batch_norm(input, running_mean, running_var, weight, bias, training=False, eps=eps))``"""
    check_batch_norm_act(input, running_mean, running_var, weight, bias, eps, activation)
    return ACTIVATIONS[activation](F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps))


def squeeze_excite(
    input, weight1, bias1, weight2, bias2, squeeze_activation="relu", gate_activation="hardsigmoid"
) -> Tensor:
    """``input * gate``: the gate is two 1x1 convolutions, each with its activation, of ``input``'s means over H, W"""
    check_squeeze_excite(input, weight1, bias1, weight2, bias2, squeeze_activation, gate_activation)
    squeezed = ACTIVATIONS[squeeze_activation](F.conv2d(input.mean((2, 3), keepdim=True), weight1, bias1))
    return input * ACTIVATIONS[gate_activation](F.conv2d(squeezed, weight2, bias2))


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The filters, each times its output channel's factor."""
    return weight if scale is None else _like(weight, weight * scale.view(-1, 1, 1, 1))


def _like(weight: Tensor, operand: Tensor | None) -> Tensor | None:
    """The operand, which may be float32 beside a half-precision weight, in the weight's dtype."""
    return operand if operand is None or operand.dtype == weight.dtype else operand.to(weight.dtype)


# Sizes computed from such numbers stay far from where 64 bits end.
_LARGEST = 2**31 - 1


def pair(value) -> tuple:
    """One value for both axes, or the two given, as plain integers where they stand for some, as numpy's do."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    values = tuple(map(_plain_integer, value if isinstance(value, (tuple, list)) else (value,)))
    return values * 2 if len(values) == 1 else values


def _plain_integer(value):
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value  # for the checks to refuse


def each_side(padding: tuple) -> tuple[tuple, tuple]:
    """Rows above and below, columns left and right, of padding as `check_depthwise_conv2d` takes it."""
    return (padding[:2], padding[2:]) if len(padding) == 4 else ((padding[0],) * 2, (padding[1],) * 2)


def conv_output_size(size: int, kernel: int, stride: int, padding: tuple, dilation: int) -> int:
    """``padding``: before and behind."""
    return (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1


def check_activation(operation: str, name: str, argument: str = "activation") -> None:
    if not isinstance(name, str):
        raise TypeError(f"{operation}: {argument} must be a string, got {_kind(name)}")
    if name not in ACTIVATIONS:
        raise ValueError(f"{operation}: {argument} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")


def check_depthwise_conv2d(input, weight, bias, stride, padding, dilation, activation, scale) -> None:
    """Four numbers of padding, `each_side`'s, are for `mobilenet_fast.nn.Conv2dSame` alone."""
    operation = "depthwise_conv2d"
    _check_input(operation, input, {"weight": weight}, {"bias": bias, "scale": scale}, ("bias", "scale"))
    channels = input.size(1)
    if weight.dim() != 4 or weight.size(1) != 1 or weight.size(0) == 0 or weight.size(0) % channels:
        raise ValueError(
            f"{operation}: weight must be (C, 1, kH, kW) with C={channels} (or a multiple), got {_shape(weight)}"
        )
    if min(weight.shape[2:]) == 0:
        raise ValueError(f"{operation}: weight must have kH and kW of at least 1, got {_shape(weight)}")
    _check_shape(operation, "bias", bias, (weight.size(0),))
    _check_shape(operation, "scale", scale, (weight.size(0),))
    for name, value, least in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0)):
        if len(value) != 2 and not (name == "padding" and len(value) == 4):
            raise ValueError(f"{operation}: {name} must be one number or two, got {len(value)}")
        if not all(isinstance(number, (int, torch.SymInt)) for number in value):
            raise TypeError(f"{operation}: {name} must be integers, got {tuple(value)}")
        if min(value) < least or max(value) > _LARGEST:
            raise ValueError(f"{operation}: {name} must be at least {least} and at most {_LARGEST}, got {tuple(value)}")
    padded = tuple(size + sum(p) for size, p in zip(input.shape[2:], each_side(padding), strict=True))
    spanned = tuple(d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
    if spanned[0] > padded[0] or spanned[1] > padded[1]:
        raise ValueError(f"{operation}: the dilated kernel must fit into the padded input {padded}, got {spanned}")
    check_activation(operation, activation)


def check_pointwise_conv2d(input, weight, bias, activation, gate, residual, scale) -> None:
    operation = "pointwise_conv2d"
    optional = {"bias": bias, "gate": gate, "residual": residual, "scale": scale}
    _check_input(operation, input, {"weight": weight}, optional, ("bias", "scale"))
    batch, channels, height, width = input.shape
    if weight.dim() != 4 or weight.size(0) == 0 or tuple(weight.shape[1:]) != (channels, 1, 1):
        raise ValueError(f"{operation}: weight must be (K, C, 1, 1) with C={channels}, got {_shape(weight)}")
    _check_shape(operation, "bias", bias, (weight.size(0),))
    _check_shape(operation, "scale", scale, (weight.size(0),))
    _check_shape(operation, "gate", gate, (batch, channels, 1, 1))
    _check_shape(operation, "residual", residual, (batch, weight.size(0), height, width))
    check_activation(operation, activation)


def check_batch_norm_act(input, running_mean, running_var, weight, bias, eps, activation) -> None:
    operation = "batch_norm_act"
    statistics = {"running_mean": running_mean, "running_var": running_var}
    parameters = {"weight": weight, "bias": bias}
    _check_input(operation, input, statistics, parameters, (*statistics, *parameters))
    for name, parameter in (statistics | parameters).items():
        _check_shape(operation, name, parameter, (input.size(1),))
    if not hasattr(eps, "__float__"):
        raise TypeError(f"{operation}: eps must be a number, got {_kind(eps)}")
    check_activation(operation, activation)


def check_squeeze_excite(input, weight1, bias1, weight2, bias2, squeeze_activation, gate_activation) -> None:
    operation = "squeeze_excite"
    _check_input(operation, input, {"weight1": weight1, "weight2": weight2}, {"bias1": bias1, "bias2": bias2})
    channels = input.size(1)
    if weight1.dim() != 4 or weight1.size(0) == 0 or tuple(weight1.shape[1:]) != (channels, 1, 1):
        raise ValueError(f"{operation}: weight1 must be (S, C, 1, 1) with C={channels}, got {_shape(weight1)}")
    squeeze = weight1.size(0)
    _check_shape(operation, "bias1", bias1, (squeeze,))
    _check_shape(operation, "weight2", weight2, (channels, squeeze, 1, 1))
    _check_shape(operation, "bias2", bias2, (channels,))
    check_activation(operation, squeeze_activation, "squeeze_activation")
    check_activation(operation, gate_activation, "gate_activation")


def _check_input(
    operation: str,
    input: Tensor,
    required: dict[str, Tensor],
    optional: dict[str, Tensor | None],
    keep_float32: tuple[str, ...] = (),
) -> None:
    for name, operand in ({"input": input} | required).items():
        if not isinstance(operand, Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor, got {_kind(operand)}")
    for name, operand in optional.items():
        if not isinstance(operand, (Tensor, type(None))):
            raise TypeError(f"{operation}: {name} must be a tensor or None, got {_kind(operand)}")
    if input.dim() != 4:
        raise ValueError(f"{operation}: input must be (N, C, H, W), got {_shape(input)}")
    if min(input.shape[1:]) == 0:
        raise ValueError(f"{operation}: input must have C, H and W of at least 1, got {_shape(input)}")
    if not input.dtype.is_floating_point:
        raise TypeError(f"{operation}: input must be of a floating-point dtype, got {input.dtype}")
    for name, operand in (required | optional).items():
        if operand is None:
            continue
        if operand.device != input.device:
            raise ValueError(f"{operation}: {name} must be on {input.device} as input is, got {operand.device}")
        # As in torch, the parameters of a half-precision batch norm may stay in float32; and what it is folded into.
        stays = name in keep_float32 and may_stay_float32(input, operand)
        if not (stays or operand.dtype == input.dtype) and not _is_autocast(input.device.type):
            raise TypeError(f"{operation}: {name} must be {input.dtype} as input is, got {operand.dtype}")


def may_stay_float32(input: Tensor, operand: Tensor) -> bool:
    """Whether the operand is float32 beside a half-precision input."""
    return operand.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check_shape(operation: str, name: str, operand: Tensor | None, shape: tuple) -> None:
    if operand is not None and tuple(operand.shape) != shape:
        raise ValueError(f"{operation}: {name} must be {shape}, got {_shape(operand)}")


def _kind(value) -> str:
    return "None" if value is None else type(value).__name__


def _shape(tensor: Tensor) -> tuple:
    return tuple(tensor.shape)
