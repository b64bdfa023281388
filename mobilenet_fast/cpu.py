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


def excite(
    mean: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    squeeze_activation: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gate of a squeeze-and-excitation, (N, C), from the mean of each image, and what its layers gave."""
    ops = torch.ops.mobilenet_fast
    hidden = ops.pointwise_conv2d_forward(mean[:, :, None, None], None, "none", None, weight1)[0]
    excited = ops.pointwise_conv2d_forward(hidden, plus(bias1, hidden), squeeze_activation, None, weight2)[0]
    gate = ops.batch_norm_apply(excited, plus(bias2, excited), gate_activation, None, None)
    return gate.flatten(1), hidden, excited


def excite_backward(
    grad_gate: Tensor,
    mean: Tensor,
    hidden: Tensor,
    excited: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    squeeze_activation: str,
    gate_activation: str,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The gradients of `excite` at the mean, (N, C), and at weights and biases."""
    ops = torch.ops.mobilenet_fast
    unread = None, None, "none", None, None, None
    read = plus(bias2, excited), gate_activation, None, None, None
    grad = ops.batch_norm_gradient(grad_gate[:, :, None, None], excited, *read)
    grad_bias2 = grad.sum((0, 2, 3))
    read = hidden, plus(bias1, hidden), squeeze_activation, None, None
    grad, grad_weight2, _, _ = ops.pointwise_conv2d_gradients(grad, *unread, *read, weight2, None, True, True)
    grad_bias1 = grad.sum((0, 2, 3))
    read = mean[:, :, None, None], None, "none", None, None
    grad, grad_weight1, _, _ = ops.pointwise_conv2d_gradients(grad, *unread, *read, weight1, None, True, True)
    return grad.flatten(1), (grad_weight1, grad_bias1, grad_weight2, grad_bias2)


def plus(bias: Tensor | None, image: Tensor) -> Tensor:
    """Scale and shift that read an image's channels plus a bias."""
    one = image.new_ones(image.size(1))
    return torch.stack((one, torch.zeros_like(one) if bias is None else bias))


def squeeze_excite_backward(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    squeeze_activation: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `mobilenet_fast.functional.squeeze_excite`: of input, weights and biases."""
    if input.numel() == 0:
        zeros = (torch.zeros_like(weight) for weight in (weight1, weight1[:, 0, 0, 0], weight2, weight2[:, 0, 0, 0]))
        return torch.empty_like(input), *zeros
    ops = torch.ops.mobilenet_fast
    x, grad, pixels = channels_last(input), channels_last(grad_output), input.size(2) * input.size(3)
    layers, activations = (weight1, bias1, weight2, bias2), (squeeze_activation, gate_activation)
    unchanged = plus(None, x), "none"
    mean = ops.batch_norm_pixel_sums(x, *unchanged, None) / pixels
    gate, hidden, excited = excite(mean, *layers, *activations)
    grad_gate = ops.batch_norm_pixel_sums(x, *unchanged, grad)
    of_mean, of_layers = excite_backward(grad_gate, mean, hidden, excited, *layers, *activations)
    of_input = ops.batch_norm_gradient(grad, None, None, "none", gate, of_mean / pixels, None)
    return of_input.contiguous(memory_format=suggest_memory_format(input)), *of_layers


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
