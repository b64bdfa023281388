"""A block of convolutions, batch norms and activations as one function of autograd.

Layer by layer, PyTorch keeps the input of every convolution, batch norm and activation: of each expanded tensor three
or four copies. Here only what the convolutions give is kept. A convolution applies the norm, activation and gate before
it as it reads its input, in the forward pass and again for its weight's gradient, and takes the statistics of its output
while that is in cache; in the backward pass it applies what its own norm makes of a gradient as it reads that, and
gathers the sums that the norm before it needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import reference
from ..ops import ACTIVATION_GRADIENTS
from .batch_norm_act import uses_running_statistics

_ops = torch.ops.mobilenet_fast


class Stage(NamedTuple):
    """``activation(norm(conv(x)))``, each of which may be missing."""

    conv: nn.Conv2d | None
    norm: nn.BatchNorm2d | None
    activation: str
    padding: tuple[int, ...]
    is_pointwise: bool = False

    def parameters(self) -> tuple[Tensor | None, ...]:
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        return (None if self.conv is None else self.conv.weight, *norm)


class Gate(NamedTuple):
    """A squeeze-and-excitation."""

    fc1: nn.Conv2d
    squeeze: str
    fc2: nn.Conv2d
    gate: str

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias


class Reading(NamedTuple):
    """How a tensor is read: ``gate * activation(x * scale + shift)``."""

    x: Tensor
    folded: Tensor | None = None
    activation: str = "none"
    gate: Tensor | None = None


class Normalised(NamedTuple):
    """What the backward pass needs to know of a batch norm."""

    mean: Tensor
    inverse_deviation: Tensor
    folded: Tensor
    by_batch: bool


def run_block(stages: list[Stage | Gate], x: Tensor, adds_input: bool) -> Tensor:
    """The stages one after another, plus x if ``adds_input``; x is channels_last."""
    parameters = [p for stage in stages for p in stage.parameters()]
    return _Block.apply(stages, adds_input, x, *parameters)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stages, adds_input, x, *parameters):
        reading = Reading(x)
        tensors: list[Tensor | None] = [x, *parameters]
        position = 0
        ctx.by_batch = []
        for stage in stages:
            operands = parameters[position : position + len(stage.parameters())]
            position += len(operands)
            if isinstance(stage, Gate):
                gate, kept = _excite(stage, reading, *operands)
                reading = reading._replace(gate=gate)
                tensors += kept
            else:
                y, statistics = _convolve(stage, reading, operands[0])
                norm = None
                if stage.norm is not None:
                    norm = _normalise(stage.norm, y, statistics, *operands[1:])
                    ctx.by_batch.append(norm.by_batch)
                    tensors += norm[:3]
                folded = _identity(y) if norm is None and stage.activation != "none" else norm and norm.folded
                reading = Reading(y, folded, stage.activation)
                tensors += (y, folded)
        ctx.save_for_backward(*tensors)
        ctx.stages, ctx.adds_input = stages, adds_input
        residual = x if adds_input else None
        if reading.folded is None:
            return reading.x if residual is None else reading.x + residual
        return _ops.batch_norm_apply(*reading[:3], reading.gate, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        stages, (x, *tensors) = ctx.stages, ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        count = sum(len(stage.parameters()) for stage in stages)
        parameters, tensors = tensors[:count], tensors[count:]
        needed = ctx.needs_input_grad[2:]
        by_batch = list(ctx.by_batch)
        grads: list[Tensor | None] = [None] * count

        # What each stage read, and what it kept.
        readings, kept, operands = [Reading(x)], [], []
        for stage in stages:
            operands.append(parameters[: len(stage.parameters())])
            parameters = parameters[len(operands[-1]) :]
            if isinstance(stage, Gate):
                kept.append(tensors[:4])
                readings.append(readings[-1]._replace(gate=tensors[3]))
                tensors = tensors[4:]
            else:
                norm = None
                if stage.norm is not None:
                    norm = Normalised(*tensors[:3], by_batch.pop(0))
                    tensors = tensors[3:]
                y, folded = tensors[:2]
                kept.append(norm)
                readings.append(Reading(y, folded, stage.activation))
                tensors = tensors[2:]

        position = count
        added = grad if ctx.adds_input else None
        pooled = sums = None  # the gradient that comes by way of the gate; the sums for a norm, if they are known
        applied = False  # whether grad is already that at the activation's input
        for i in reversed(range(len(stages))):
            stage, output = stages[i], readings[i + 1]
            position -= len(operands[i])
            wanted = needed[1 + position : 1 + position + len(operands[i])]
            if isinstance(stage, Gate):
                if pooled is None:  # nothing behind the gate has found its gradient
                    pooled = _ops.batch_norm_pixel_sums(*readings[i][:3], grad)
                pooled, found = _excite_backward(stage, kept[i], pooled, operands[i], readings[i].x)
                grads[position : position + 4] = [g if w else None for g, w in zip(found, wanted, strict=True)]
                continue
            norm: Normalised | None = kept[i]
            gate = None
            if pooled is not None:
                gate = readings[i + 2].gate
            behind = (None, "none", None, None) if applied else (output.folded, output.activation, gate, pooled)
            coefficients = None
            if norm is not None:
                if sums is None:
                    sums = _ops.batch_norm_gradient_sums(grad, output.x, *behind, norm.mean)
                gamma = operands[i][1]
                coefficients, grad_gamma = _norm_coefficients(norm, gamma, sums, output.x)
                grads[position + 1] = grad_gamma if wanted[1] else None
                grads[position + 2] = sums[0] if wanted[2] else None
            pooled = sums = None
            applied = False
            before, first = readings[i], i == 0
            need_input = needed[0] if first else True
            if stage.conv is None:
                if need_input:
                    grad = _ops.batch_norm_gradient(grad, output.x, *behind, coefficients)
                continue
            previous = None if first or isinstance(stages[i - 1], Gate) else kept[i - 1]
            mean = None if previous is None else previous.mean
            at_y = grad, output.x, *behind, coefficients
            if stage.is_pointwise:
                fused = added if first else None
                grad, grads[position], sums, pooled = _ops.pointwise_conv2d_gradients(
                    *at_y, *before, mean, operands[i][0], fused, need_input, wanted[0]
                )
                if fused is not None:
                    added = None
            else:
                geometry = stage.conv.stride, stage.padding, stage.conv.dilation
                grad, grads[position], sums, pooled = _ops.depthwise_conv2d_gradients(
                    *at_y, *before[:3], mean, operands[i][0], *geometry, need_input, wanted[0]
                )
            if not wanted[0]:
                grads[position] = None
            applied = before.gate is None
            sums = None if mean is None else sums
            pooled = None if before.gate is None else pooled
        if not needed[0]:
            grad = None
        elif added is not None:
            grad = grad + added
        return None, None, grad, *grads


def _convolve(stage: Stage, reading: Reading, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if stage.conv is None:
        return reading.x, None
    if stage.is_pointwise:
        return _ops.pointwise_conv2d_forward(*reading, weight)
    if reading.gate is not None:
        raise AssertionError("a gate must be followed by a pointwise convolution")
    geometry = stage.conv.stride, stage.padding, stage.conv.dilation
    return _ops.depthwise_conv2d_forward(*reading[:3], weight, *geometry)


def _normalise(norm: nn.BatchNorm2d, y: Tensor, statistics: Tensor | None, weight, bias) -> Normalised:
    """The batch norm's scale and shift; running statistics are brought up to date as `nn.BatchNorm2d` does."""
    by_batch = not uses_running_statistics(norm)
    if by_batch:
        if statistics is None:
            statistics = _ops.batch_norm_statistics(y)
        mean, var = statistics.unbind()
        if norm.training and norm.track_running_stats:
            _track(norm, mean, var, y.numel() // y.size(1))
    else:
        mean, var = norm.running_mean, norm.running_var
    inverse = torch.rsqrt(var + norm.eps)
    scale = inverse if weight is None else inverse * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return Normalised(mean, inverse, torch.stack((scale, shift)), by_batch)


def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    if norm.running_mean is None:
        return
    factor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, factor)
    norm.running_var.lerp_(var * (count / max(count - 1, 1)), factor)


def _norm_coefficients(norm: Normalised, gamma: Tensor | None, sums: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows mean, factor, slope and offset of what the norm makes of a gradient; the gradient of its weight."""
    inverse = norm.inverse_deviation
    grad_gamma = sums[1] * inverse
    factor = inverse if gamma is None else inverse * gamma
    if norm.by_batch:
        per_value = factor * (-y.size(1) / y.numel())
        slope, offset = per_value * grad_gamma * inverse, per_value * sums[0]
    else:
        slope = offset = torch.zeros_like(factor)
    return torch.stack((norm.mean, factor, slope, offset)), grad_gamma


def _identity(y: Tensor) -> Tensor:
    return torch.stack((y.new_ones(y.size(1)), y.new_zeros(y.size(1))))


def _excite(stage: Gate, reading: Reading, weight1, bias1, weight2, bias2) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gate, (N, C), and what its gradient needs."""
    x, folded = reading.x, reading.folded
    if folded is None:
        folded = _identity(x)
    mean = _ops.batch_norm_pixel_sums(x, folded, reading.activation, None).div_(x.size(2) * x.size(3))
    hidden = F.linear(mean, weight1.flatten(1), bias1)
    excited = F.linear(reference.ACTIVATIONS[stage.squeeze](hidden), weight2.flatten(1), bias2)
    gate = reference.ACTIVATIONS[stage.gate](excited)
    return gate, (mean, hidden, excited, gate)


def _excite_backward(stage: Gate, kept, grad_gate, operands, x) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The gradient of each pixel of what was pooled, and those of weights and biases."""
    mean, hidden, excited, _ = kept
    weight1, bias1, weight2, bias2 = operands
    grad = ACTIVATION_GRADIENTS[stage.gate](grad_gate, excited)
    squeezed = reference.ACTIVATIONS[stage.squeeze](hidden)
    grad_weight2 = (grad.t() @ squeezed).view_as(weight2)
    grad_bias2 = None if bias2 is None else grad.sum(0)
    grad = ACTIVATION_GRADIENTS[stage.squeeze](grad @ weight2.flatten(1), hidden)
    grad_weight1 = (grad.t() @ mean).view_as(weight1)
    grad_bias1 = None if bias1 is None else grad.sum(0)
    pooled = (grad @ weight1.flatten(1)).div_(x.size(2) * x.size(3))
    return pooled, (grad_weight1, grad_bias1, grad_weight2, grad_bias2)
