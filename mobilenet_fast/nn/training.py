"""A block of convolutions, batch norms and activations as one function of autograd.

Layer by layer, PyTorch keeps the input of every convolution, batch norm and activation: of each expanded tensor three
or four copies. Here only what the convolutions give is kept. A convolution applies the norm, activation and gate before
it as it reads its input, in the forward pass and again for its weight's gradient, and takes the statistics of its
output while that is in cache; in the backward pass it applies what its own norm makes of a gradient as it reads that,
and gathers the sums that the norm before it needs. docs/training.md says more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _C, cpu, ops, reference
from ..functional import _KERNEL_DTYPES, _PLAIN_TYPES
from .batch_norm_act import normalised, uses_running_statistics
from .conv2d_same import Conv2dSame
from .depthwise import is_depthwise
from .dispatch import activation_name, is_known, runs_triton, takes_input, unhooked
from .pointwise import is_pointwise
from .squeeze_excite import SqueezeExcitation
from .steps import Step, has_kernel, keeps_parameters, named_padding

_ops = torch.ops.mobilenet_fast
_STEM_WEIGHTS = 2**15
# Of expansions that are computed again in the backward pass: how many times as many channels as they read, and how many
# those may be, which say what that costs.
_EXPANSION = 3
_FEW_CHANNELS = 96


class Stage(NamedTuple):
    """``activation(norm(conv(x)))``, each of which may be missing."""

    conv: nn.Conv2d | None = None
    norm: nn.BatchNorm2d | None = None
    activation: str = "none"
    kind: str = ""
    """of the convolution: "pointwise", "depthwise", "dense", or nothing where there is none"""

    def parameters(self) -> tuple[Tensor | None, ...]:
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        return (None if self.conv is None else self.conv.weight, *norm)

    def statistics(self) -> tuple[Tensor | None, ...]:
        return () if self.norm is None else (self.norm.running_mean, self.norm.running_var)

    def geometry(self, x: Tensor) -> tuple[tuple[int, ...], ...]:
        """Stride, padding and dilation of a convolution of x that is not pointwise."""
        conv = self.conv
        if isinstance(conv, Conv2dSame):
            padding = conv.same_padding(x)
        elif isinstance(conv.padding, str):
            padding = named_padding(conv)
        else:
            padding = conv.padding
        return conv.stride, padding, conv.dilation

    @property
    def is_linear(self) -> bool:
        return self.norm is None and self.activation == "none"


class Gate(NamedTuple):
    """A squeeze-and-excitation."""

    module: SqueezeExcitation
    fc1: nn.Conv2d
    squeeze: str
    fc2: nn.Conv2d
    gate: str

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def statistics(self) -> tuple[Tensor | None, ...]:
        return ()


class Pool(NamedTuple):
    """`F.max_pool2d` with these arguments."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def parameters(self) -> tuple[Tensor | None, ...]:
        return ()

    def statistics(self) -> tuple[Tensor | None, ...]:
        return ()


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


class TrainingBlock(Step):
    """Stages one after another, plus their input if ``adds_input``."""

    fuses = True

    def __init__(self, stages: list[Stage | Gate | Pool], modules: list[nn.Module], adds_input: bool = False) -> None:
        super().__init__(*modules)
        self.stages, self.adds_input = stages, adds_input
        self.convs = [stage.conv for stage in stages if isinstance(stage, Stage) and stage.conv is not None]

    def plus_input(self) -> TrainingBlock | None:
        return None if self.adds_input else TrainingBlock(self.stages, list(self.modules), True)

    def plain(self, x, residual: Tensor | None = None):
        y = super().plain(x, x if self.adds_input else None)
        return y if residual is None else y + residual

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if runs_triton(x):
            return self._by_layers(x, residual)
        if x.is_cpu and torch.is_autocast_enabled("cpu"):
            return self._under_autocast(x, residual)
        if not self._takes(x, x.dtype):
            return self.plain(x, residual)
        y = self._run(x)
        return y if residual is None else y + residual

    def _run(self, x: Tensor, stored: torch.dtype | None = None) -> Tensor:
        y = run_block(self.stages, x.contiguous(memory_format=torch.channels_last), self.adds_input, stored)
        if not any(map(suggests_channels_last, (x, *(conv.weight for conv in self.convs)))):
            y = y.contiguous()
        return y

    def _by_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """On a GPU: convolution, norm and activation, squeeze-and-excitation, each by its own kernels."""
        y = x
        for stage in self.stages:
            if isinstance(stage, Gate):
                y = stage.module(y)
                continue
            if isinstance(stage, Pool):
                y = F.max_pool2d(y, *stage)
                continue
            layer = stage.conv
            if stage.conv is not None:
                y = stage.conv(y)
            if stage.norm is not None:
                layer, z = stage.norm, normalised(stage.norm, y, stage.activation)
                if z is not None:
                    y = z
                    continue
                y = stage.norm(y)
            if stage.activation != getattr(layer, "activation", "none"):  # that of a module behind it
                y = reference.ACTIVATIONS[stage.activation](y)
        if self.adds_input:
            y = y + x
        return y if residual is None else y + residual

    def _under_autocast(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """In float32, from and to the lower dtype; what is kept for the backward pass is bfloat16 where that is it.

        (float16 has too few exponents for what no GradScaler has scaled.)
        """
        dtype = torch.get_autocast_dtype("cpu")
        if x.dtype not in (torch.float32, dtype) or not self._takes(x, torch.float32):
            return self.plain(x, residual)
        stored = dtype if dtype == torch.bfloat16 else None
        if self.adds_input or not self.convs:  # sums have the wider dtype, norms the input's
            dtype = x.dtype
        with torch.autocast("cpu", enabled=False):
            y = self._run(x, stored).to(dtype)
        return y if residual is None else y + residual

    def _takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the stages can be run in ``dtype``, which the parameters have as well."""
        if not (takes_input(x, dtype) and x.is_cpu and dtype in _KERNEL_DTYPES and x.numel() > 0):
            return False
        first = self.stages[0]
        if first.conv is not None and first.conv.in_channels != x.size(1):
            return False
        if first.norm is not None and first.conv is None and first.norm.num_features != x.size(1):
            return False
        for stage in self.stages:
            if isinstance(stage, Stage) and stage.norm is not None and not _is_usual(stage.norm):
                return False
            for tensor in (*stage.parameters(), *stage.statistics()):
                if tensor is not None and (
                    type(tensor) not in _PLAIN_TYPES or tensor.dtype != dtype or tensor.is_neg()
                ):
                    return False
        return True


def why_not_trained(module: nn.Module) -> str:
    """Why the module is part of no block, in words."""
    kind = type(module)
    if not unhooked(module):
        return "a hook wants to see it called"
    if isinstance(module, nn.Conv2d) and is_known(module, nn.Conv2d):
        if module._parameters.get("bias") is not None:
            return "it has a bias"
        if is_depthwise(module) and module.out_channels != module.in_channels:
            return "it has a channel multiplier"
        if not (is_pointwise(module) or is_depthwise(module) or _is_small_dense(module)):
            return "it is neither depthwise nor 1x1 nor small"
        if not has_kernel(module):
            return "no kernel has its padding or its parameters"
    elif is_known(module, nn.BatchNorm2d):
        return "its activation has no kernel" if keeps_parameters(module) else "it keeps its parameters elsewhere"
    elif is_known(module, SqueezeExcitation):
        plain = module.kernel_parts() is not None
        return "it stands before no 1x1 convolution" if plain else "it is not the usual one, or a part of it has a hook"
    elif activation_name(module) is not None:
        if getattr(module, "inplace", False):
            return "it writes to its input, and there is no convolution or norm before it"
        return "there is no convolution or norm before it"
    return f"{kind.__name__} is not known"


def run_block(
    stages: list[Stage | Gate | Pool], x: Tensor, adds_input: bool, stored: torch.dtype | None = None
) -> Tensor:
    """The stages one after another, plus x if ``adds_input``, in float32 or, if x is that, float64; x is channels_last.
    For the backward pass images are kept as ``stored``, if that is given, and x as it is.
    """
    parameters = [p for stage in stages for p in stage.parameters()]
    return _Block.apply(stages, adds_input, stored, x, *parameters)


def training_parts(modules: list[nn.Module | Step]) -> list[Step]:
    """Blocks of as many modules as one function can run, and between them those that it can't.

    A norm or an activation that follows no convolution begins a block: what it reads is kept in any case.
    """
    parts: list[Step] = []
    stages: list[Stage | Gate | Pool] = []
    used: list[nn.Module] = []

    def close() -> None:
        nonlocal stages, used
        works = any(isinstance(s, Stage) and (s.conv is not None or s.norm is not None) for s in stages)
        parts.extend([TrainingBlock(stages, used)] if works else map(Step, used))
        stages, used = [], []

    position = 0
    while position < len(modules):
        stage, end = _make_stage(modules, position, stages)
        if stage is None:
            close()
            module = modules[position]
            parts.append(module if isinstance(module, Step) else Step(module))
        else:
            if isinstance(stage, Stage) and stage.conv is None and stages:
                close()
            stages.append(stage)
            used += modules[position:end]
        position = end
    close()
    return parts


def _make_stage(modules: list[nn.Module | Step], start: int, before: list) -> tuple[Stage | Gate | Pool | None, int]:
    """The stage that begins with modules[start], and where the next begins; None if there is none."""
    module, end = modules[start], start + 1
    if isinstance(module, Step):
        return None, end
    if is_known(module, SqueezeExcitation):
        parts = module.kernel_parts()
        is_read = before and isinstance(before[-1], Stage) and (before[-1].norm or before[-1].activation != "none")
        if parts is None or not is_read or end == len(modules) or not _is_plain_pointwise(modules[end]):
            return None, end
        return Gate(module, *parts), end
    if is_known(module, nn.MaxPool2d):
        follows = before and isinstance(before[-1], Stage)
        plain = not (module.ceil_mode or module.return_indices)
        return (Pool(*map(reference.pair, _window(module))) if follows and plain else None), end
    conv = norm = None
    activation = "none"
    kind = _kind(module)
    if kind:
        conv, activation = module, getattr(module, "activation", "none")
        if activation == "none" and end < len(modules) and _is_trainable_norm(modules[end]):
            norm = modules[end]
            end += 1
    elif _is_trainable_norm(module):
        norm = module
    elif (activation := activation_name(module) or "none") == "none":
        return None, end
    elif not before and getattr(module, "inplace", False):
        return None, end  # what it writes to is not the block's own
    if norm is not None:
        activation = getattr(norm, "activation", "none")
    if activation == "none" and end < len(modules) and not isinstance(modules[end], Step):
        follows = activation_name(modules[end])
        if follows is not None:
            activation = follows
            end += 1
    return Stage(conv, norm, activation, kind), end


def _window(pool: nn.MaxPool2d) -> tuple:
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation


def _is_plain_pointwise(module) -> bool:
    return not isinstance(module, Step) and _kind(module) == "pointwise"


def _kind(conv: nn.Module) -> str:
    """What kind of stage the convolution makes; empty if it makes none."""
    if not (is_known(conv, nn.Conv2d) and keeps_parameters(conv) and conv._parameters["bias"] is None):
        return ""
    if not has_kernel(conv):
        return "dense" if _is_small_dense(conv) else ""
    if is_pointwise(conv):
        return "pointwise"
    return "depthwise" if is_depthwise(conv) and conv.out_channels == conv.in_channels else ""


def _is_small_dense(conv: nn.Conv2d) -> bool:
    """Whether it is a stem, whose cost is in its images, or a strided 1x1 convolution. Larger ones are PyTorch's."""
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str) or is_pointwise(conv):
        return False
    reach = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if any(p > r for p, r in zip(conv.padding, reach, strict=True)):
        return False
    return not any(reach) or math.prod((conv.out_channels, conv.in_channels, *conv.kernel_size)) <= _STEM_WEIGHTS


def _is_trainable_norm(norm: nn.Module) -> bool:
    return (
        not isinstance(norm, Step)
        and is_known(norm, nn.BatchNorm2d)
        and keeps_parameters(norm)
        and getattr(norm, "activation", "none") is not None
    )


def _is_usual(norm: nn.BatchNorm2d) -> bool:
    """Whether it has both statistics or neither, where `nn.BatchNorm2d` keeps them, of its size and such as it may
    write to, and an eps that it may have. Of others PyTorch says what is wrong, if anything is.
    """
    buffers = norm._buffers
    if not (norm.eps > 0 and "running_mean" in buffers and "running_var" in buffers):
        return False
    mean, var = buffers["running_mean"], buffers["running_var"]
    if mean is None or var is None:
        return mean is var
    size = (norm.num_features,)
    return not any(t.shape != size or t.requires_grad or t.is_inference() for t in (mean, var))


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stages, adds_input, stored, x, *parameters):
        ctx.dtype = torch.promote_types(x.dtype, torch.float32)
        tensors: list[Tensor | None] = [x, *parameters]
        x = _converted(x, ctx.dtype)
        reading = Reading(x)
        position = 0
        ctx.by_batch = []
        for i, stage in enumerate(stages):
            operands = parameters[position : position + len(stage.parameters())]
            position += len(operands)
            if isinstance(stage, Gate):
                gate, kept = _excite(stage, reading, *operands)
                reading = reading._replace(gate=gate)
                tensors += kept
            elif isinstance(stage, Pool):
                reading = Reading(_ops.max_pool2d_forward(*reading[:3], *stage))
                tensors.append(None if stage is stages[-1] else _converted(reading.x, stored))
            else:
                y, statistics = _convolve(stage, reading, operands[0])
                norm = None
                if stage.norm is not None:
                    norm = _normalise(stage.norm, y, statistics, *operands[1:])
                    ctx.by_batch.append(norm.by_batch)
                    tensors += norm[:3]
                folded = cpu.plus(None, y) if norm is None and stage.activation != "none" else norm and norm.folded
                reading = Reading(y, folded, stage.activation)
                tensors += (_converted(y, stored) if _is_kept(stages, i) else None, folded)
        ctx.save_for_backward(*tensors)
        ctx.stages, ctx.adds_input = stages, adds_input
        residual = x if adds_input else None
        if reading.folded is None:
            return reading.x if residual is None else reading.x + residual
        return _ops.batch_norm_apply(*reading[:3], reading.gate, residual)

    @staticmethod
    def backward(ctx, grad):
        stages, (x, *tensors) = ctx.stages, ctx.saved_tensors
        count = sum(len(stage.parameters()) for stage in stages)
        parameters, tensors = tensors[:count], tensors[count:]
        # Hooks on what autograd saves may have given images another layout.
        x, *tensors = map(_in_channels_last, (x, *tensors))
        needed = ctx.needs_input_grad[3:]
        if ops.runs_in_pytorch(grad):
            return None, None, None, *_differentiable_gradients(ctx, needed, grad, x, parameters, tensors)
        # What is kept goes stage by stage, unless the graph is to be used again.
        ctx.maybe_clear_saved_tensors()
        grad = grad.contiguous(memory_format=torch.channels_last)
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
            elif isinstance(stage, Pool):
                kept.append(None)
                readings.append(Reading(tensors[0]))
                tensors = tensors[1:]
            else:
                norm = None
                if stage.norm is not None:
                    norm = Normalised(*tensors[:3], by_batch.pop(0))
                    tensors = tensors[3:]
                y, folded = tensors[:2]
                kept.append(norm)
                readings.append(Reading(y, folded, stage.activation))
                tensors = tensors[2:]

        dtype, x = x.dtype, None
        y = folded = tensors = None
        position = count
        added = grad if ctx.adds_input else None
        gate = pooled = None  # a gate behind the stage, and the gradient that comes by way of it
        sums = None  # those for a norm, if they are known
        applied = False  # whether grad is already that at the activation's input
        for i in reversed(range(len(stages))):
            stage, output, mine = stages[i], _widened(readings.pop(), ctx.dtype), kept.pop()
            position -= len(operands[i])
            wanted = needed[1 + position : 1 + position + len(operands[i])]
            if isinstance(stage, Gate):
                gate = output.gate
                if pooled is None:  # nothing behind the gate has found its gradient
                    pooled = _ops.batch_norm_pixel_sums(*output[:3], grad)
                pooled, found = _excite_backward(stage, mine, pooled, operands[i], output.x)
                grads[position : position + 4] = [g if w else None for g, w in zip(found, wanted, strict=True)]
                readings[-1] = readings[-1]._replace(x=output.x)
                continue
            before = readings[-1] = _widened(readings[-1], ctx.dtype)
            first = i == 0
            previous = None if first or isinstance(stages[i - 1], Gate) else kept[i - 1]
            mean = None if previous is None else previous.mean
            if isinstance(stage, Pool):
                grad, sums = _ops.max_pool2d_gradients(grad, *before[:3], mean, *stage)
                sums, gate, pooled, applied = None if mean is None else sums, None, None, True
                continue
            norm: Normalised | None = mine
            behind = (None, "none", None, None) if applied else (output.folded, output.activation, gate, pooled)
            coefficients = None
            if norm is not None:
                if sums is None:
                    sums = _ops.batch_norm_gradient_sums(grad, output.x, *behind, norm.mean)
                coefficients, grad_gamma = _C.batch_norm_coefficients(
                    norm.mean,
                    norm.inverse_deviation,
                    operands[i][1],
                    sums,
                    output.x.numel() // sums.size(1),
                    norm.by_batch,
                )
                grads[position + 1] = grad_gamma if wanted[1] else None
                grads[position + 2] = sums[0] if wanted[2] else None
            gate = pooled = sums = None
            need_input = needed[0] if first else True
            if stage.conv is None:
                if need_input and not (applied and norm is None):
                    grad = _ops.batch_norm_gradient(grad, output.x, *behind, coefficients)
                continue
            if before.x is None:  # what was not kept
                readings[-2] = _widened(readings[-2], ctx.dtype)
                before = before._replace(x=_convolve(stages[i - 1], readings[-2], operands[i - 1][0])[0])
                if not stages[i - 1].is_linear:
                    readings[-1] = before
            at_y = grad, output.x, *behind, coefficients
            if stage.kind == "pointwise":
                fused = added if first else None
                grad, grads[position], sums, pooled = _ops.pointwise_conv2d_gradients(
                    *at_y, *before, mean, operands[i][0], fused, need_input, wanted[0]
                )
                if fused is not None:
                    added = None
            elif stage.kind == "dense":
                grad, grads[position], sums, pooled = _ops.conv2d_gradients(
                    *at_y, *before, mean, operands[i][0], *stage.geometry(before.x), need_input, wanted[0]
                )
            else:
                grad, grads[position], sums, pooled = _ops.depthwise_conv2d_gradients(
                    *at_y, *before[:3], mean, operands[i][0], *stage.geometry(before.x), need_input, wanted[0]
                )
            if not wanted[0]:
                grads[position] = None
            del at_y, before
            is_gated = readings[-1].gate is not None
            applied = not is_gated
            sums = None if mean is None else sums
            pooled = pooled if is_gated else None
        if not needed[0]:
            grad = None
        elif added is not None:
            grad = grad + added
        return None, None, None, None if grad is None else grad.to(dtype), *grads


def _differentiable_gradients(ctx, needed, grad, x, parameters, tensors) -> tuple[Tensor | None, ...]:
    """The gradients by PyTorch's operators, from the block computed again."""
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases end this small graph at the operands, and still lead on to them.
        operands = [None if t is None else t.view_as(t) for t in (x, *parameters)]
        x, *parameters = operands
        x = x.to(ctx.dtype)
        z, by_batch = x, iter(ctx.by_batch)
        for stage in ctx.stages:
            mine, parameters = parameters[: len(stage.parameters())], parameters[len(stage.parameters()) :]
            if isinstance(stage, Gate):
                weight1, bias1, weight2, bias2 = mine
                z = reference.squeeze_excite(z, weight1, bias1, weight2, bias2, stage.squeeze, stage.gate)
                tensors = tensors[4:]
                continue
            if isinstance(stage, Pool):
                z, tensors = F.max_pool2d(z, *stage), tensors[1:]
                continue
            weight, gamma, beta = mine
            if stage.kind == "pointwise":
                z = F.conv2d(z, weight)
            elif stage.kind == "dense":
                z = F.conv2d(z, weight, None, *stage.geometry(z))
            elif stage.conv is not None:
                z = reference.depthwise_conv2d(z, weight, None, *stage.geometry(z))
            if stage.norm is not None:
                mean, inverse = tensors[:2]
                tensors = tensors[3:]
                if next(by_batch):
                    z = F.batch_norm(z, None, None, gamma, beta, True, eps=stage.norm.eps)
                else:
                    variance = inverse**-2 - stage.norm.eps
                    z = F.batch_norm(z, mean, variance, gamma, beta, False, eps=stage.norm.eps)
            z = reference.ACTIVATIONS[stage.activation](z)
            tensors = tensors[2:]
        if ctx.adds_input:
            z = z + x
    wanted = [t for t, need in zip(operands, needed, strict=True) if need]
    found = iter(torch.autograd.grad(z, wanted, grad, create_graph=twice))
    return tuple(next(found) if need else None for need in needed)


def _converted(image: Tensor, dtype: torch.dtype | None) -> Tensor:
    return image if dtype in (None, image.dtype) else _ops.converted(image, dtype)


def _widened(reading: Reading, dtype: torch.dtype) -> Reading:
    return reading if reading.x is None else reading._replace(x=_converted(reading.x, dtype))


def _is_kept(stages: list[Stage | Gate | Pool], i: int) -> bool:
    """Whether the backward pass finds what the convolution gave.

    Its norm and activation need it, and the weight of the next stage. Two are computed again: a depthwise convolution
    of which only that weight needs it, as in Xception's separable convolutions, and the expansion of few channels on
    the map before a stride, which is the largest image of its block, and most of what some networks would keep.
    """
    stage = stages[i]
    if i + 1 == len(stages):
        return not stage.is_linear
    after = stages[i + 1] if isinstance(stages[i + 1], Stage) else Stage()
    if stage.is_linear:
        return stage.kind != "depthwise" or after.kind != "pointwise"
    if stage.kind != "pointwise" or after.kind != "depthwise" or after.is_linear:
        return True
    if min(reference.pair(after.conv.stride)) == 1 or (i > 0 and not _is_kept_image(stages, i - 1)):
        return True
    channels = stage.conv.in_channels
    return not (channels <= _FEW_CHANNELS and _EXPANSION * channels <= stage.conv.out_channels)


def _is_kept_image(stages: list[Stage | Gate | Pool], i: int) -> bool:
    """Whether the backward pass finds what the stage after this one reads, without a gate."""
    return isinstance(stages[i], Pool) or (isinstance(stages[i], Stage) and _is_kept(stages, i))


def _convolve(stage: Stage, reading: Reading, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if stage.conv is None:
        return reading.x, None
    if stage.kind == "pointwise":
        return _ops.pointwise_conv2d_forward(*reading, weight)
    if stage.kind == "dense":
        return _ops.conv2d_forward(*reading, weight, *stage.geometry(reading.x))
    return _ops.depthwise_conv2d_forward(*reading[:3], weight, *stage.geometry(reading.x))


def _normalise(norm: nn.BatchNorm2d, y: Tensor, statistics: Tensor | None, weight, bias) -> Normalised:
    """The batch norm's scale and shift; running statistics are brought up to date as `nn.BatchNorm2d` does."""
    by_batch = not uses_running_statistics(norm)
    tracked, momentum = (None, None), 0.0
    if by_batch:
        F._verify_batch_size(y.shape)
        if statistics is None:
            statistics = _ops.batch_norm_statistics(y)
        if norm.training and norm.track_running_stats:
            tracked, momentum = (norm.running_mean, norm.running_var), _momentum(norm)
    else:
        statistics = torch.stack((norm.running_mean, norm.running_var))
    inverse, folded = _C.batch_norm_fold(statistics, weight, bias, *tracked, momentum, y.numel() // y.size(1), norm.eps)
    return Normalised(statistics[0], inverse, folded, by_batch)


def _momentum(norm: nn.BatchNorm2d) -> float:
    """Of this batch, which is counted."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def _excite(stage: Gate, reading: Reading, *layers) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gate, (N, C), and what its gradient needs."""
    x = reading.x
    folded = cpu.plus(None, x) if reading.folded is None else reading.folded
    mean = _ops.batch_norm_pixel_sums(x, folded, reading.activation, None).div_(x.size(2) * x.size(3))
    gate, hidden, excited = cpu.excite(mean, *layers, stage.squeeze, stage.gate)
    return gate, (mean, hidden, excited, gate)


def _excite_backward(stage: Gate, kept, grad_gate, layers, x) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The gradient of each pixel of what was pooled, and those of weights and biases."""
    of_mean, of_layers = cpu.excite_backward(grad_gate, *kept[:3], *layers, stage.squeeze, stage.gate)
    return of_mean.div_(x.size(2) * x.size(3)), of_layers


def _in_channels_last(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() != 4 else tensor.contiguous(memory_format=torch.channels_last)


def suggests_channels_last(tensor: Tensor) -> bool:
    """Whether ``suggest_memory_format`` of it is channels_last, which is strides alone."""
    _, channels, height, width = tensor.shape
    n, c, h, w = tensor.stride()
    # Of a 1x1 image with one channel it is not.
    return 0 < c and c * channels <= w and w * width <= h and c != h * height <= n
