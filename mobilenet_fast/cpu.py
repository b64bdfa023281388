"""Gradients on the CPU, by the C++ steps of training: these take images that are dense and channels_last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import reference


def channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def depthwise_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride,
    padding,
    dilation,
    need_input: bool,
    need_weight: bool,
) -> list[Tensor]:
    """`mobilenet_fast.cuda.depthwise_conv2d_backward`, here."""
    multiplier = weight.size(0) // input.size(1)
    x = input if multiplier == 1 else input.repeat_interleave(multiplier, 1)
    geometry = reference.pair(stride), reference.pair(padding), reference.pair(dilation)
    if input.size(0) == 0:
        of_input, of_weight = torch.empty_like(x), torch.zeros_like(weight)
    else:
        unread = None, None, "none", None, None, None
        arguments = channels_last(x), None, "none", None, weight, *geometry, need_input, need_weight
        found = torch.ops.mobilenet_fast.depthwise_conv2d_gradients(channels_last(grad_output), *unread, *arguments)
        of_input, of_weight = found[:2]
    if need_input and multiplier > 1:
        of_input = of_input.unflatten(1, (-1, multiplier)).sum(2)
    return _wanted(of_input, of_weight, input, weight, need_input, need_weight)


def pointwise_conv2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, need_input: bool, need_weight: bool
) -> list[Tensor]:
    """Gradients of ``F.conv2d(input, weight)`` for weight (K, C, 1, 1): of input and weight, those that are needed."""
    if input.size(0) == 0:
        of_input, of_weight = torch.empty_like(input), torch.zeros_like(weight)
    else:
        unread = None, None, "none", None, None, None
        arguments = channels_last(input), None, "none", None, None, weight, None, need_input, need_weight
        found = torch.ops.mobilenet_fast.pointwise_conv2d_gradients(channels_last(grad_output), *unread, *arguments)
        of_input, of_weight = found[:2]
    return _wanted(of_input, of_weight, input, weight, need_input, need_weight)


def _wanted(of_input, of_weight, input, weight, need_input: bool, need_weight: bool) -> list[Tensor]:
    """The gradients that are needed, in the layouts that PyTorch gives them."""
    grads = []
    if need_input:
        formats = map(suggest_memory_format, (input, weight))
        wanted = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
        grads.append(of_input.contiguous(memory_format=wanted))
    if need_weight:
        grads.append(of_weight.contiguous())
    return grads


def batch_norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mobilenet_fast.cuda.batch_norm_act_backward`, here; all in the input's dtype."""
    inverse = torch.rsqrt(running_var + eps)
    factor = inverse if weight is None else inverse * weight
    if input.numel() == 0:
        return torch.empty_like(input), torch.zeros_like(factor), torch.zeros_like(factor)
    shift = -running_mean * factor if bias is None else torch.addcmul(bias, running_mean, factor, value=-1)
    zeros = torch.zeros_like(factor)
    read = channels_last(input), torch.stack((factor, shift)), activation, None, None
    grad = channels_last(grad_output)
    sums = torch.ops.mobilenet_fast.batch_norm_gradient_sums(grad, *read, running_mean.contiguous())
    coefficients = torch.stack((running_mean, factor, zeros, zeros))
    of_input = torch.ops.mobilenet_fast.batch_norm_gradient(grad, *read, coefficients)
    wanted = torch.contiguous_format if input.is_contiguous() else suggest_memory_format(input)
    return of_input.contiguous(memory_format=wanted), sums[1] * inverse, sums[0].clone()
