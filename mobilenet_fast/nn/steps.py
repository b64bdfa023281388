"""What one kernel call does of a chain of modules: a step of its plan.

A step knows all of its modules but their parameters and statistics, which it looks up at every call, so that any write
to them counts. Where these are nothing for a kernel, it calls the modules.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from .. import _C, cuda, reference
from ..functional import _PLAIN_TYPES
from .batch_norm_act import uses_running_statistics
from .conv2d_same import Conv2dSame
from .depthwise import is_depthwise
from .dispatch import activation_name, is_known, takes_operands
from .pointwise import is_pointwise
from .squeeze_excite import SqueezeExcitation


class Step:
    """The modules one after another, plus ``residual``. This one has no kernel."""

    fuses = False

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules

    def plain(self, x, residual: Tensor | None = None):
        for module in self.modules:
            x = module(x)
        return x if residual is None else x + residual

    __call__ = plain


class KernelStep(Step):
    """Takes a tensor that `takes_input` has found good, of at least one element."""

    fuses = True

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        try:
            operands, norm = self.operands()
        except KeyError:
            # A plain tensor took a parameter's place.
            return self.plain(x, residual)
        if type(x) not in _PLAIN_TYPES or not takes_operands(x, operands, norm):
            return self.plain(x, residual)
        return self.run(_C if x.is_cpu else cuda, x, residual, *operands, *norm)

    def operands(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Parameters, and those and the statistics of a batch norm, as they are now.

        A KeyError says that a module keeps them elsewhere.
        """
        raise NotImplementedError

    def run(self, kernels: ModuleType, x: Tensor, residual: Tensor | None, *operands: Tensor | None) -> Tensor:
        """``kernels``: those for where x is."""
        raise NotImplementedError


class Convolution(KernelStep):
    """``activation(norm(conv(x)))``; the norm becomes the kernel's scale and bias."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: str, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.conv, self.norm, self.activation = conv, norm, activation
        self.is_pointwise = is_pointwise(conv)
        self.stride, self.dilation = reference.pair(conv.stride), reference.pair(conv.dilation)
        self.padding = named_padding(conv) if isinstance(conv.padding, str) else reference.pair(conv.padding)

    def operands(self):
        return _weight_and_bias(self.conv), () if self.norm is None else _statistics(self.norm)

    def run(self, kernels, x, residual, weight, bias, *statistics):
        conv, activation, scale = self.conv, self.activation, None
        if not self.is_pointwise and x.size(1) != conv.groups:  # fewer would pass for a channel multiplier
            return self.plain(x, residual)
        if statistics:
            scale, shift = kernels.fold_batch_norm(*statistics, self.norm.eps).unbind()
            bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        if self.is_pointwise:
            if residual is None or not self.adds(x, residual, weight):
                y = kernels.pointwise_conv2d(x, weight, bias, activation, None, None, scale)
            else:
                return kernels.pointwise_conv2d(x, weight, bias, activation, None, residual, scale)
        else:
            padding = conv.same_padding(x) if isinstance(conv, Conv2dSame) else self.padding
            y = kernels.depthwise_conv2d(x, weight, bias, self.stride, padding, self.dilation, activation, scale)
        return y if residual is None else y + residual

    def adds(self, x: Tensor, residual: Tensor, weight: Tensor) -> bool:
        """Whether the kernel can add the residual, which it does before the activation."""
        return (
            self.activation == "none"
            and takes_operands(x, (residual,))
            and residual.shape == (x.size(0), weight.size(0), *x.shape[2:])
        )


class Norm(KernelStep):
    """``activation(norm(x))``"""

    def __init__(self, norm: nn.BatchNorm2d, activation: str, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.norm, self.activation = norm, activation

    def operands(self):
        return (), _statistics(self.norm)

    def run(self, kernels, x, residual, *statistics):
        y = kernels.batch_norm_act(x, *statistics, self.norm.eps, self.activation)
        return y if residual is None else y + residual


class SqueezeExcite(KernelStep):
    """A squeeze-and-excitation."""

    def __init__(self, module: SqueezeExcitation) -> None:
        super().__init__(module)
        self.fc1, self.squeeze, self.fc2, self.gate = module.kernel_parts()

    def operands(self):
        return _weight_and_bias(self.fc1) + _weight_and_bias(self.fc2), ()

    def run(self, kernels, x, residual, *operands):
        y = kernels.squeeze_excite(x, *operands, self.squeeze, self.gate)
        return y if residual is None else y + residual


class Shortcut(Step):
    """Steps one after another, plus what went into the first."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        *self.first, self.last = steps
        self.fuses = any(step.fuses for step in steps)

    def __call__(self, x, residual: Tensor | None = None):
        y = x
        for step in self.first:
            y = step(y)
        y = self.last(y, x)
        return y if residual is None else y + residual

    def plain(self, x, residual: Tensor | None = None):
        y = x
        for step in self.first:
            y = step.plain(y)
        y = self.last.plain(y, x)
        return y if residual is None else y + residual


def make_step(modules: list[nn.Module], start: int) -> tuple[Step | None, int]:
    """The step of as many modules from ``start`` on as one kernel call can do, and where the next begins.

    None if the first module is none that a chain may run with others.
    """
    end = start + 1
    module = modules[start]
    if is_known(module, SqueezeExcitation):
        return (None if module.kernel_parts() is None else SqueezeExcite(module)), end
    conv = norm = None
    activation = "none"
    if is_known(module, nn.Conv2d):
        if not has_kernel(module):
            return Step(module), end
        conv, activation = module, getattr(module, "activation", "none")
        if activation == "none" and end < len(modules) and _is_norm(modules[end]):
            norm = modules[end]
            end += 1
    elif _is_norm(module):
        norm = module
    else:
        return None, end
    if norm is not None:
        activation = getattr(norm, "activation", "none")
    if activation == "none" and end < len(modules) and (follows := activation_name(modules[end])) is not None:
        activation = follows
        end += 1
    fused = modules[start:end]
    return Norm(norm, activation, *fused) if conv is None else Convolution(conv, norm, activation, *fused), end


def has_kernel(conv: nn.Conv2d) -> bool:
    return (
        conv.padding_mode == "zeros"
        and (
            is_pointwise(conv)
            or (is_depthwise(conv) and (conv.padding != "same" or reference.pair(conv.stride) == (1, 1)))
        )
        and keeps_parameters(conv)
    )


def named_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    """Rows above and below, columns left and right, for padding "valid" or "same": the odd one below and right."""
    if conv.padding == "valid":
        return 0, 0
    rows, columns = (d * (k - 1) for k, d in zip(conv.kernel_size, reference.pair(conv.dilation), strict=True))
    return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2


def _is_norm(module: nn.Module) -> bool:
    return (
        is_known(module, nn.BatchNorm2d)
        and keeps_parameters(module)
        and uses_running_statistics(module)
        and getattr(module, "activation", "none") is not None
    )


def keeps_parameters(module: nn.Module) -> bool:
    """Whether weight and bias are where nn.Module keeps them; some put plain tensors in their place."""
    return "weight" in module._parameters and "bias" in module._parameters


def _weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    # The attributes of nn.Module are slow.
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """The operands of a batch norm, in the order of the kernel's arguments."""
    buffers = norm._buffers
    parameters = norm._parameters
    mean, variance = buffers["running_mean"], buffers["running_var"]
    if mean is None or variance is None:
        raise KeyError
    return mean, variance, parameters["weight"], parameters["bias"]
