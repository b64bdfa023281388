"""The operations as functions, named and ordered as in `torch.nn.functional`, plus ``activation=`` and ``backend=``.

float32 and float64 tensors on the CPU run in the C++ kernels; float16, bfloat16, float32 and float64 tensors on an
NVIDIA GPU of compute capability 7.0 or newer in the Triton kernels, if Triton is installed; everything else, and what
`torch.export` exports, in the plain PyTorch of `mobilenet_fast.reference`. ``backend="cpp"`` and ``backend="triton"``
insist on those kernels, ``backend="reference"`` on PyTorch. In Triton's interpreter (``TRITON_INTERPRET=1``),
``backend="triton"`` takes CPU tensors too, for which no derivative is asked.

**Error.** With eps of the dtype and n the number of terms of an output's sum, an output differs from its exact value
by at most 4 · n · eps times the sum of its terms' magnitudes. silu and sigmoid of it add at most 5e-7 (float32) or
6e-16 (float64) of their value. On GPUs, float32 products of 1x1 convolutions are rounded to TF32 where
``torch.backends.cudnn.conv.fp32_precision`` lets PyTorch's own be.

**Gradients.** All have kernels for theirs, but on GPUs `pointwise_conv2d` and `depthwise_conv2d` of more than 49 taps,
whose are cuDNN's. Second derivatives come from the reference, which is computed again, and so do those of forward mode
and `torch.func`'s, and of several gradients at once (``is_grads_batched``); PyTorch has no second derivative of
hardsigmoid.
Kernels' gradients are deterministic, and on the CPU do not depend on the number of threads.

**Autocast.** On the CPU the reference runs under it. On GPUs, the convolutions cast input, weight and gate to its
dtype, and a residual of another is added as PyTorch adds it; `batch_norm_act` keeps the input's dtype and
`squeeze_excite` runs in it.

**Raises.** ValueError for a shape, value, device or backend that an operation can't take; TypeError for a dtype that
it can't, one unlike the input's, or an argument of another type; NotImplementedError where a backend that was asked for
has no kernel for a valid input, or can't run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _C, cuda, ops, reference

__all__ = ["batch_norm_act", "depthwise_conv2d", "pointwise_conv2d", "squeeze_excite"]

_KERNEL_DTYPES = (torch.float32, torch.float64)
_PLAIN_TYPES = (Tensor, Parameter)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    activation: str = "none",
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One filter, or M, for each channel.

    ``activation(F.conv2d(input, scale * weight, bias, stride, padding, dilation, groups=C))``

    Args:
        input: (N, C, H, W) of any strides.
        weight: (C·M, 1, kH, kW); channel c is filtered by weights c·M … c·M + M - 1.
        bias: (C·M,); float32 will do beside a half-precision input.
        stride, padding, dilation: one number or (vertical, horizontal); ``padding`` also "same" or "valid".
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".
        scale: as ``bias``, a factor for each filter, such as a batch norm's; it costs nothing.
        backend: None, "cpp", "triton" or "reference".

    Returns:
        (N, C·M, H', W'), channels_last if input or weight is, as from ``F.conv2d``; a sum of kH·kW + 1 terms.

    MobileNets (Howard et al., 2017, arXiv:1704.04861), section 3.1.
    """
    stride, dilation = reference.pair(stride), reference.pair(dilation)
    if isinstance(padding, str):
        input, padding = _pad_for(padding, input, weight, stride, dilation)
    else:
        padding = reference.pair(padding)
        if len(padding) != 2:  # the kernel takes four as well, for `nn.Conv2dSame` alone
            raise ValueError(f"depthwise_conv2d: padding must be one number or two, got {len(padding)}")
    arguments = input, weight, bias, stride, padding, dilation, activation, scale
    return _run("depthwise_conv2d", backend, (weight, bias, scale), arguments)


def pointwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """1x1 convolution with what surrounds it in a block.

    ``activation(F.conv2d(input * gate, scale * weight, bias) + residual)``

    Args:
        input: (N, C, H, W) of any strides.
        weight: (K, C, 1, 1).
        bias: (K,); float32 will do beside a half-precision input.
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".
        gate: (N, C, 1, 1), a factor for each input channel, such as a squeeze-excite's.
        residual: (N, K, H, W), added before the activation.
        scale: as ``bias``, a factor for each filter, such as a batch norm's; it costs nothing.
        backend: None, "cpp", "triton" or "reference".

    Returns:
        (N, K, H, W), channels_last if input or weight is, as from ``F.conv2d``; a sum of C + 2 terms.

    MobileNets (Howard et al., 2017, arXiv:1704.04861), section 3.1; MobileNetV3 (Howard et al., 2019,
    arXiv:1905.02244), figure 4.
    """
    arguments = input, weight, bias, activation, gate, residual, scale
    return _run("pointwise_conv2d", backend, (weight, bias, gate, residual, scale), arguments)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Batch norm by running statistics, as in evaluation.

    ``activation(F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps))``

    Args:
        input: (N, C, H, W) of any strides.
        running_mean, running_var, weight, bias: (C,); float32 will do beside a half-precision input.
        eps: added to the variance.
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".
        backend: None, "cpp", "triton" or "reference".

    Returns:
        (N, C, H, W), in the layout that ``F.batch_norm`` gives; a sum of 3 terms.

    Batch Normalization (Ioffe and Szegedy, 2015, arXiv:1502.03167), section 3.1.
    """
    arguments = input, running_mean, running_var, weight, bias, eps, activation
    return _run("batch_norm_act", backend, (running_mean, running_var, weight, bias), arguments)


def squeeze_excite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    squeeze_activation: str = "relu",
    gate_activation: str = "hardsigmoid",
    backend: str | None = None,
) -> Tensor:
    """Channels weighed by a small network on their means.

    ``input * gate(F.conv2d(squeeze(F.conv2d(mean, weight1, bias1)), weight2, bias2))`` with
    ``mean = input.mean((2, 3), keepdim=True)``

    Args:
        input: (N, C, H, W) of any strides.
        weight1, bias1: (S, C, 1, 1), (S,).
        weight2, bias2: (C, S, 1, 1), (C,).
        squeeze_activation, gate_activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".
        backend: None, "cpp", "triton" or "reference".

    Returns:
        (N, C, H, W), in the layout that ``input * gate`` gives; sums of H·W, C + 1 and S + 1 terms, one after another.

    Squeeze-and-Excitation Networks (Hu et al., 2018, arXiv:1709.01507), section 3; hard gate: MobileNetV3
    (arXiv:1905.02244), section 5.3.
    """
    arguments = input, weight1, bias1, weight2, bias2, squeeze_activation, gate_activation
    return _run("squeeze_excite", backend, (weight1, bias1, weight2, bias2), arguments)


def _run(operation: str, backend: str | None, operands: tuple[Tensor | None, ...], arguments: tuple) -> Tensor:
    try:
        return _implementation(operation, backend, arguments[0], operands)(*arguments)
    except (AttributeError, TypeError, RuntimeError) as error:
        if str(error).startswith(f"{operation}: "):
            raise
        failure = error
    # Arguments of a wrong type are told by whoever stumbles on them first, at length; the reference's checks say the
    # same in one line. Asking them only now keeps them out of the calls that are right.
    getattr(reference, f"check_{operation}")(*arguments)
    raise failure


def _implementation(
    operation: str, backend: str | None, input: Tensor, operands: tuple[Tensor | None, ...]
) -> Callable[..., Tensor]:
    """What runs the operation: a function around kernels, the operator around it, or the reference, all called alike.

    A call of the bound C++ function costs a microsecond, one of the operator ten: where autograd, a tracer or a tensor
    subclass would not notice the difference, the first is taken.
    """
    if backend is None:
        if not _cpp_serves(input):
            if _triton_serves(input):
                return _triton(operation, input, operands)
            return getattr(reference, operation)
    elif backend == "reference":
        return getattr(reference, operation)
    elif backend == "triton":
        why = cuda.why_not(input)
        if why is not None:
            raise NotImplementedError(f"{operation}: backend 'triton' can't run its kernels: {why}")
        return _triton(operation, input, operands)
    elif backend != "cpp":
        raise ValueError(f"{operation}: backend must be None, 'cpp', 'triton' or 'reference', got {backend!r}")
    elif not (input.is_cpu and input.layout is torch.strided and input.dtype in _KERNEL_DTYPES):
        raise NotImplementedError(
            f"{operation}: backend 'cpp' takes strided float32 and float64 tensors on the CPU, "
            f"got {input.layout} {input.dtype} on {input.device}"
        )
    if torch.compiler.is_compiling() or _is_observed(input, operands):
        return getattr(torch.ops.mobilenet_fast, operation)
    return getattr(_C, operation)


def _triton(operation: str, input: Tensor, operands: tuple[Tensor | None, ...]) -> Callable[..., Tensor]:
    """`_implementation` of the Triton kernels."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type) or _is_observed(input, operands):
        if not ops.uses_triton(input):
            raise NotImplementedError(
                f"{operation}: backend 'triton' takes tensors on the CPU where a call is only run, "
                "got one that autograd, autocast or a tracer observes"
            )
        return getattr(torch.ops.mobilenet_fast, operation)
    return getattr(cuda, operation)


def _cpp_serves(input: Tensor) -> bool:
    return (
        input.is_cpu
        and input.dtype in _KERNEL_DTYPES
        and input.layout is torch.strided
        # Exported programs should run where this package is not; the operators know neither autocast nor forward mode.
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and not _is_transformed()
    )


def _triton_serves(input: Tensor) -> bool:
    return input.is_cuda and cuda.why_not(input) is None and not torch.compiler.is_exporting() and not _is_transformed()


def _is_transformed() -> bool:
    """Whether the call is differentiated as PyTorch's operators alone are: forwards, or by `torch.func`."""
    if forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(level.key() == TransformType.Grad for level in torch._C._functorch.get_interpreter_stack() or ())


def _is_observed(input: Tensor, operands: tuple[Tensor | None, ...]) -> bool:
    """Whether the dispatcher has more to do with this call than to run the kernel."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return True
    differentiates = torch.is_grad_enabled()
    for tensor in (input, *operands):
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES or tensor.is_neg() or (differentiates and tensor.requires_grad)
        ):
            return True
    return False


def _pad_for(padding: str, input: Tensor, weight: Tensor, stride: tuple, dilation: tuple) -> tuple[Tensor, tuple]:
    """The input and the numbers for "same" or "valid": an even kernel's "same" pads one more below and to the right."""
    if padding not in ("same", "valid"):
        raise ValueError(f"depthwise_conv2d: padding must be 'same', 'valid' or numbers, got {padding!r}")
    takes_part = isinstance(input, Tensor) and isinstance(weight, Tensor) and weight.dim() == 4
    if padding == "valid" or not takes_part or not all(isinstance(d, int) for d in dilation):
        return input, (0, 0)  # what is wrong is told where it is checked
    if stride != (1, 1):
        raise ValueError(f"depthwise_conv2d: padding 'same' needs stride 1, got {stride}")
    total = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=False)]
    if total[0] % 2 or total[1] % 2:
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)
