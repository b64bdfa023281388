"""When a module may hand its call to a kernel, and what its neighbours must be for several to be run as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from .. import cuda, functional
from ..functional import _KERNEL_DTYPES, _PLAIN_TYPES
from ..reference import check_activation, may_stay_float32

ACTIVATION_LAYERS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}

# Exact types: what a subclass computes is not known. timm's are named, so that it need not be imported.
_NAMES: dict[type, str] = {layer: name for name, layer in ACTIVATION_LAYERS.items()}
_TIMM_NAMES = {"Sigmoid": "sigmoid", "HardSigmoid": "hardsigmoid", "HardSwish": "hardswish", "Swish": "silu"}


# Where a module, or all of them, keep hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)

# Exact types whose forward is known, so that a neighbour may do its work; ours, and replaced ones, add themselves.
_KNOWN_TYPES: set[type] = {nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d}


def known(layer: type) -> type:
    """Declares that the class computes what the layer of ours that it is, or derives from, computes."""
    _KNOWN_TYPES.add(layer)
    return layer


def is_known_type(kind: type) -> bool:
    return kind in _KNOWN_TYPES


def is_known(module: nn.Module, layer: type) -> bool:
    """Whether the module is of a known type derived from ``layer``, and no hook wants to see it called."""
    return type(module) in _KNOWN_TYPES and isinstance(module, layer) and unhooked(module)


def is_eager(*, casts: bool = False) -> bool:
    """Whether calls are only run: nothing traces, exports, transforms or counts what they do, or (unless ``casts``)
    casts on the CPU.
    """
    return not (
        torch.compiler.is_compiling()
        or (torch.is_autocast_enabled("cpu") and not casts)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def runs_triton(input) -> bool:
    """Whether the kernels for this tensor are Triton's."""
    return isinstance(input, Tensor) and functional._triton_serves(input)


def takes_input(input, dtype: torch.dtype | None = None) -> bool:
    """Whether kernels are written for this tensor: a plain 4-D one, of a dtype (in its place, ``dtype``) that they have
    on its device.
    """
    if type(input) not in _PLAIN_TYPES:
        return False
    dtypes = _KERNEL_DTYPES if input.is_cpu else cuda.DTYPES if input.is_cuda and cuda.why_not(input) is None else ()
    return (
        (dtype or input.dtype) in dtypes
        and input.layout is torch.strided
        and input.dim() == 4
        # The dispatcher alone resolves a lazy negation; a compiler sees no such inputs.
        and (torch.compiler.is_compiling() or not input.is_neg())
    )


def takes_operands(
    input: Tensor,
    operands: Iterable[Tensor | None],
    norm: Iterable[Tensor | None] = (),
    *,
    casts: bool = False,
    learns: bool = False,
) -> bool:
    """Whether the operands are plain tensors of the input's dtype, and none of them, nor the input, needs a gradient.

    Gradients go through PyTorch's own operators: their backward has saved what it needs, the kernels' would compute
    it again.

    Args:
        norm: more operands, those of a batch norm: they may be float32 beside a half-precision input.
        casts: ``operands`` may have other dtypes.
        learns: gradients may be needed.
    """
    dtype, differentiates = input.dtype, torch.is_grad_enabled() and not learns
    if differentiates and input.requires_grad:
        return False
    for operand in operands:
        if operand is not None and (
            (operand.dtype != dtype and not casts)
            or type(operand) not in _PLAIN_TYPES
            or (differentiates and operand.requires_grad)
        ):
            return False
    for operand in norm:
        if operand is not None and (
            (operand.dtype != dtype and not may_stay_float32(input, operand))
            or type(operand) not in _PLAIN_TYPES
            or (differentiates and operand.requires_grad)
        ):
            return False
    return True


def kernels_serve(
    input: Tensor, *operands: Tensor | None, norm: Iterable[Tensor | None] = (), learns: bool = False
) -> bool:
    """Whether one layer may hand its call to `functional`, rather than run as its stock class does.

    Args:
        operands: of the layer.
        norm: those of a batch norm.
        learns: gradients may be needed: the operator has kernels for them.
    """
    if not takes_input(input):
        return False
    if input.is_cpu:
        takes = takes_operands(input, operands, norm, learns=learns)
    else:
        casts = torch.is_autocast_enabled("cuda")  # the operators do what autocast asks
        takes = takes_operands(input, operands, norm, casts=casts, learns=learns)
    if not takes:
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return is_eager() and input.numel() > 0


def unhooked(module: nn.Module) -> bool:
    """Whether calling the module is no more than its class's forward, so that it can be skipped if its work is done."""
    state = module.__dict__
    return not (any(state[name] for name in HOOKS) or "forward" in state)


def has_global_hooks() -> bool:
    return any(vars(module_hooks)[name] for name in _GLOBAL_HOOKS)


def activation_of(kind: type) -> str | None:
    """The name that the kernels have for what modules of this type compute; None if they have none."""
    name = _NAMES.get(kind)
    return _TIMM_NAMES.get(kind.__name__) if name is None and kind.__module__ == "timm.layers.activations" else name


def activation_name(module: nn.Module) -> str | None:
    """`activation_of` the module's type; None as well if a hook wants to see the module called, or its bounds moved."""
    name = activation_of(type(module))
    if name is None or not unhooked(module):
        return None
    return None if name == "relu6" and (module.min_val, module.max_val) != (0, 6) else name


def activation_layer(layer: str, argument: str, activation: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The module class of a named activation; anything else is taken for a class, or a function that makes a module.

    What is wrong is said in the name of the layer that was given it as this argument.
    """
    if callable(activation):
        return activation
    check_activation(layer, activation, argument)
    return ACTIVATION_LAYERS[activation]
