"""Runs of convolution, batch norm and activation as one kernel call each.

Nothing is prepared or kept: what may be fused is looked up at every call, so that changed parameters, hooks, modes and
replaced children count from the next call on, and batch norm is folded into the weights anew. That costs some
microseconds a run, less than the passes over the activations that it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _C, functional
from .batch_norm_act import uses_running_statistics
from .conv2d_same import Conv2dSame
from .depthwise import is_depthwise
from .dispatch import activation_name, has_global_hooks, is_eager, is_known, known, takes_input, takes_operands
from .pointwise import is_pointwise


@known
class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs neighbouring convolution (depthwise or 1x1), batch norm and activation as one
    kernel call.

    It does so in eager mode where batch norm uses its running statistics and no gradient is needed, for float32 and
    float64 CPU tensors, and with modules that have no hooks; everything else runs child after child. ``forward(input,
    residual)`` adds ``residual`` to the output, in the last kernel call if that is a 1x1 convolution.

    Args:
        *args: as `nn.Sequential` takes them.
    """

    def forward(self, input, residual: Tensor | None = None):
        return run_chain(tuple(self._modules.values()), input, residual)


def run_chain(modules: Sequence[nn.Module], x, residual: Tensor | None = None):
    """``modules`` one after another on ``x``, plus ``residual``; fused where that makes no other difference."""
    fuses = is_eager() and not has_global_hooks()
    position, end = 0, len(modules)
    while position < end:
        run = _find_run(modules, position, x) if fuses else None
        if run is None:
            module = modules[position]
            position += 1
            if position == end and residual is not None and fuses and is_known(module, FusedSequential):
                return module(x, residual)
            x = module(x)
        else:
            position = run.end
            if position == end and residual is not None and run.adds(x, residual):
                return run(x, residual)
            x = run(x)
    return x if residual is None else x + residual


class _Run(NamedTuple):
    """Neighbours in a chain, up to ``end``, that compute ``activation(norm(conv(x)))``, with their operands."""

    conv: nn.Conv2d | None
    weight: Tensor | None
    bias: Tensor | None
    norm: nn.BatchNorm2d | None
    statistics: _Statistics | None
    activation: str
    end: int

    def adds(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the last kernel call can add the residual, which it does before the activation."""
        return (
            self.conv is not None
            and is_pointwise(self.conv)
            and self.activation == "none"
            and takes_input(residual)
            and takes_operands(x, (residual,))
            and residual.shape == (x.size(0), self.weight.size(0), *x.shape[2:])
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, weight, bias, norm, statistics, activation, _ = self
        if conv is None:
            return _C.batch_norm_act(x, *statistics, norm.eps, activation)
        # Folding passes over the weights and saves a pass over the output: not where the weights are the larger.
        separate = norm is not None and weight.numel() * x.size(1) > x.numel() * weight.size(0)
        if separate:
            y = _convolve(conv, x, weight, bias, "none", None)
            y = _C.batch_norm_act(y, *statistics, norm.eps, activation)
            return y if residual is None else y.add_(residual)
        if norm is not None:
            weight, bias = _fold(weight, bias, statistics, norm.eps)
        return _convolve(conv, x, weight, bias, activation, residual)


class _Statistics(NamedTuple):
    """The operands of a batch norm, in the order of the kernel's arguments."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None


def _find_run(modules: Sequence[nn.Module], start: int, x) -> _Run | None:
    """The longest run of two or more modules at ``start`` that one kernel call can do for ``x``."""
    conv = weight = bias = norm = statistics = None
    activation = "none"
    position, end = start, len(modules)
    if not takes_input(x):
        return None
    module = modules[position]
    # Parameters are read where they are kept: the attributes of nn.Module are slow.
    if _is_conv(module):
        conv, weight, bias = module, module._parameters["weight"], module._parameters["bias"]
        position += 1
        if position == end:
            return None
        module = modules[position]
    if is_known(module, nn.BatchNorm2d) and _keeps_parameters(module) and uses_running_statistics(module):
        norm, buffers, parameters = module, module._buffers, module._parameters
        statistics = _Statistics(
            buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"]
        )
        activation = getattr(norm, "activation", "none")
        position += 1
    if conv is norm is None or activation is None:
        return None
    while position < end and activation == "none" and (name := activation_name(modules[position])) is not None:
        activation = name
        position += 1
    if position == start + 1 or not takes_operands(x, (weight, bias, *(statistics or ()))) or x.numel() == 0:
        return None
    return _Run(conv, weight, bias, norm, statistics, activation, position)


def _is_conv(module: nn.Module) -> bool:
    return (
        is_known(module, nn.Conv2d)
        and _keeps_parameters(module)
        and module.padding_mode == "zeros"
        and getattr(module, "activation", "none") == "none"
        and (is_depthwise(module) or is_pointwise(module))
    )


def _keeps_parameters(module: nn.Module) -> bool:
    """Whether weight and bias are where nn.Module keeps them; some put plain tensors in their place."""
    return "weight" in module._parameters and "bias" in module._parameters


def _convolve(
    conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    if is_pointwise(conv):
        return _C.pointwise_conv2d(x, weight, bias, activation, None, residual)
    if isinstance(conv, Conv2dSame):
        x = conv.pad(x)
    if isinstance(conv.padding, str):
        return functional.depthwise_conv2d(x, weight, bias, 1, conv.padding, conv.dilation, activation=activation)
    return _C.depthwise_conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, activation)


def _fold(weight: Tensor, bias: Tensor | None, norm: _Statistics, eps: float) -> tuple[Tensor, Tensor]:
    """The convolution that does the batch norm as well: norm(w * x + b) = (s w) * x + s (b - mean) + beta."""
    scale = (norm.running_var + eps).rsqrt_()
    if norm.weight is not None:
        scale.mul_(norm.weight)
    centre = norm.running_mean if bias is None else norm.running_mean - bias
    shift = -centre * scale if norm.bias is None else torch.addcmul(norm.bias, centre, scale, value=-1)
    return weight * scale.view(-1, 1, 1, 1), shift
