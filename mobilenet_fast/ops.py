"""What PyTorch must know of the operators that `_C` defines: shapes and strides for tracing, and gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _C, reference  # noqa: F401  importing _C defines the operators


def _empty_conv_output(input: Tensor, weight: Tensor, size: tuple) -> Tensor:
    # F.conv2d's rule: channels_last if either operand is.
    formats = suggest_memory_format(input), suggest_memory_format(weight)
    wanted = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=wanted)


def _check_dtype(operation: str, input: Tensor) -> None:
    """The operators are the kernels; the reference takes more."""
    if input.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operation}: input must be float32 or float64, got {input.dtype}")


@torch.library.register_fake("mobilenet_fast::depthwise_conv2d")
def _(input, weight, bias=None, stride=1, padding=0, dilation=1, activation="none", scale=None):
    _check_dtype("depthwise_conv2d", input)
    stride, padding, dilation = map(reference.pair, (stride, padding, dilation))
    reference.check_depthwise_conv2d(input, weight, bias, stride, padding, dilation, activation, scale)
    map_size = map(reference.conv_output_size, input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _empty_conv_output(input, weight, (input.size(0), weight.size(0), *map_size))


@torch.library.register_fake("mobilenet_fast::pointwise_conv2d")
def _(input, weight, bias=None, activation="none", gate=None, residual=None, scale=None):
    _check_dtype("pointwise_conv2d", input)
    reference.check_pointwise_conv2d(input, weight, bias, activation, gate, residual, scale)
    return _empty_conv_output(input, weight, (input.size(0), weight.size(0), *input.shape[2:]))


@torch.library.register_fake("mobilenet_fast::batch_norm_act")
def _(input, running_mean, running_var, weight=None, bias=None, eps=1e-5, activation="none"):
    _check_dtype("batch_norm_act", input)
    reference.check_batch_norm_act(input, running_mean, running_var, weight, bias, eps, activation)
    if input.size(0) == 0:
        return torch.empty_like(input)
    # F.batch_norm prefers contiguous where a shape fits both layouts, other than F.conv2d.
    wanted = torch.contiguous_format if input.is_contiguous() else suggest_memory_format(input)
    return torch.empty_like(input, memory_format=wanted)


@torch.library.register_fake("mobilenet_fast::squeeze_excite")
def _(input, weight1, bias1, weight2, bias2, squeeze_activation="relu", gate_activation="hardsigmoid"):
    _check_dtype("squeeze_excite", input)
    reference.check_squeeze_excite(input, weight1, bias1, weight2, bias2, squeeze_activation, gate_activation)
    return input * input.new_empty((*input.shape[:2], 1, 1))


def _register_autograd(operation: str) -> None:
    """Gradients of an operator: those of its reference, computed again in the backward pass."""
    formula = getattr(reference, operation)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx, grad):
        operands = [c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True)]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            for i in wanted:
                # An alias ends this small graph at the operand, and still leads on to it for a second derivative.
                operands[i] = operands[i].view_as(operands[i])
            output = formula(*operands)
        grads = iter(torch.autograd.grad(output, [operands[i] for i in wanted], grad, create_graph=twice))
        return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)

    torch.library.register_autograd(f"mobilenet_fast::{operation}", backward, setup_context=setup_context)


for _operation in ("depthwise_conv2d", "pointwise_conv2d", "batch_norm_act", "squeeze_excite"):
    _register_autograd(_operation)
