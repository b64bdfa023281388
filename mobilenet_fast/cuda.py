"""The operations on CUDA tensors, as `_C` has them for the CPU: checked once, then run by the Triton kernels.

Triton is imported at the first call. In its interpreter (``TRITON_INTERPRET=1``) the kernels take CPU tensors as well,
which is how tests run them without a GPU.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_IS_INSTALLED = find_spec("triton") is not None
_LEAST_CAPABILITY = 7, 0

# Of each GPU that was asked about, `missing`.
_found: dict[int, str | None] = {}


def missing(index: int = 0) -> str | None:
    """What keeps the Triton kernels from running on the GPU of this index, in words; None if they run."""
    if index not in _found:
        _found[index] = _look(index)
    return _found[index]


def _look(index: int) -> str | None:
    if not _IS_INSTALLED:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    if capability < _LEAST_CAPABILITY:
        return "the GPU has compute capability {}.{}, and {}.{} is needed".format(*capability, *_LEAST_CAPABILITY)
    return None


def summary() -> str:
    """Whether the Triton kernels run here, and why not, in one line."""
    if INTERPRETED:
        return "run in Triton's interpreter (TRITON_INTERPRET=1)" if _IS_INSTALLED else f"do not run: {missing()}"
    lacks = {index: missing(index) for index in range(torch.cuda.device_count())} or {0: missing()}
    if not any(lacks.values()):
        return "run"
    if len(lacks) == 1:
        return f"do not run: {lacks[0]}"
    return "; ".join(f"GPU {index}: {'run' if why is None else f'do not run: {why}'}" for index, why in lacks.items())


def why_not(input: Tensor) -> str | None:
    """What keeps the Triton kernels from this tensor, in words; None if they take it."""
    if not (input.is_cuda or (INTERPRETED and input.is_cpu)) or input.layout is not torch.strided:
        return f"they take strided CUDA tensors, got {input.layout} on {input.device}"
    if input.dtype not in DTYPES:
        return f"they take float16, bfloat16, float32 and float64, got {input.dtype}"
    return missing(input.device.index or 0)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    activation: str = "none",
    scale: Tensor | None = None,
) -> Tensor:
    """`mobilenet_fast.reference.depthwise_conv2d`."""
    stride, padding, dilation = reference.pair(stride), reference.pair(padding), reference.pair(dilation)
    reference.check_depthwise_conv2d(input, weight, bias, stride, padding, dilation, activation, scale)
    kernels = _kernels("depthwise_conv2d", input)
    arguments = input, weight, _dense(bias), stride
    if len(padding) == 2:
        return kernels.depthwise_conv2d(*arguments, padding, dilation, activation, _dense(scale))
    rows, columns = reference.each_side(padding)
    sizes = map(reference.conv_output_size, input.shape[2:], weight.shape[2:], stride, (rows, columns), dilation)
    out = empty_conv_output(input, weight, (input.size(0), weight.size(0), *sizes))
    return kernels.depthwise_conv2d(*arguments, (rows[0], columns[0]), dilation, activation, _dense(scale), out=out)


def pointwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`mobilenet_fast.reference.pointwise_conv2d`."""
    reference.check_pointwise_conv2d(input, weight, bias, activation, gate, residual, scale)
    kernels = _kernels("pointwise_conv2d", input)
    return kernels.pointwise_conv2d(input, weight, _dense(bias), activation, gate, residual, _dense(scale))


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """`mobilenet_fast.reference.batch_norm_act`."""
    reference.check_batch_norm_act(input, running_mean, running_var, weight, bias, eps, activation)
    kernels = _kernels("batch_norm_act", input)
    vectors = map(_dense, (running_mean, running_var, weight, bias))
    return kernels.batch_norm_act(input, *vectors, float(eps), activation)


def squeeze_excite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    squeeze_activation: str = "relu",
    gate_activation: str = "hardsigmoid",
) -> Tensor:
    """`mobilenet_fast.reference.squeeze_excite`."""
    reference.check_squeeze_excite(input, weight1, bias1, weight2, bias2, squeeze_activation, gate_activation)
    kernels = _kernels("squeeze_excite", input)
    layers = weight1, _dense(bias1), weight2, _dense(bias2)
    return kernels.squeeze_excite(input, *layers, squeeze_activation, gate_activation)


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
    """Gradients of ``F.conv2d(input, weight, None, stride, padding, dilation, groups=C)``: of input and weight, those
    that are needed."""
    kernels = _kernels("depthwise_conv2d_backward", input)
    rows, columns = reference.each_side(reference.pair(padding))
    geometry = reference.pair(stride), (rows[0], columns[0]), reference.pair(dilation)
    needed = need_input, need_weight
    of_input, of_weight = kernels.depthwise_conv2d_backward(grad_output, input, weight, *geometry, *needed)
    grads = of_input, None if of_weight is None else of_weight.contiguous()
    return [grad for grad in grads if grad is not None]


def pointwise_conv2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, need_input: bool, need_weight: bool
) -> list[Tensor]:
    """Gradients of ``F.conv2d(input, weight)``: of input and weight, those that are needed. They are cuDNN's."""
    geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, *geometry, [need_input, need_weight, False]
    )
    grads = []
    if need_input:
        grads.append(of_input.contiguous(memory_format=_conv_format(input, weight)))
    if need_weight:
        grads.append(of_weight.contiguous())
    return grads


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
    """Gradients of `squeeze_excite`: of input, weights and biases.

    Two passes of Triton kernels, and between them the layers of (N, C) in PyTorch, in float32 (float64 for float64).
    """
    kernels = _kernels("squeeze_excite_backward", input)
    pixels = max(1, input.size(2) * input.size(3))
    sums, products = kernels.sums_of_products(input, grad_output)
    mean, of_gate = sums.sum(1) / pixels, products.sum(1)
    w1, b1, w2, b2 = (None if t is None else t.to(mean.dtype) for t in (weight1, bias1, weight2, bias2))
    w1, w2 = w1.flatten(1), w2.flatten(1)
    before_squeeze = F.linear(mean, w1, b1)
    squeezed = reference.ACTIVATIONS[squeeze_activation](before_squeeze)
    before_gate = F.linear(squeezed, w2, b2)
    gate = reference.ACTIVATIONS[gate_activation](before_gate)
    of_excited = reference.ACTIVATION_GRADIENTS[gate_activation](of_gate, before_gate)
    of_squeezed = reference.ACTIVATION_GRADIENTS[squeeze_activation](of_excited @ w2, before_squeeze)
    of_mean = of_squeezed @ w1 / pixels
    out = torch.empty_like(input, memory_format=suggest_memory_format(input))
    of_input = kernels.epilogue(grad_output, of_mean[:, :, None, None], gate=gate[:, :, None, None], out=out)
    of_layers = of_squeezed.T @ mean, of_squeezed.sum(0), of_excited.T @ squeezed, of_excited.sum(0)
    shapes = weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1]
    return of_input, *(grad.to(weight1.dtype).view(shape) for grad, shape in zip(of_layers, shapes, strict=True))


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
    """Gradients of `batch_norm_act`: of input, weight and bias, the latter two in float32 (float64 for float64)."""
    kernels = _kernels("batch_norm_act_backward", input)
    vectors = map(_dense, (running_mean, running_var, weight, bias))
    of_input, *sums = kernels.batch_norm_act_backward(
        grad_output, input, *vectors, activation, training=False, eps=float(eps)
    )
    return of_input, *(total.clone() for total in sums)  # outputs of an operator share no memory


def batch_norm_act_training(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``activation(F.batch_norm(..., training=True))`` of at least one element, and the mean and 1 / standard deviation
    that `batch_norm_act_training_backward` needs, (C,) in float32 (float64 for float64).

    Running statistics move by ``momentum`` of the way; None is the mean over all batches, which
    ``num_batches_tracked`` has counted, this one among them.
    """
    kernels = _kernels("batch_norm_act_training", input)
    statistics = running_mean, running_var
    return kernels.batch_norm_act_training(
        input, *statistics, _dense(weight), _dense(bias), momentum, eps, activation, num_batches_tracked
    )


def batch_norm_act_training_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `batch_norm_act_training`: of input, weight and bias, the latter two in float32 (float64 for
    float64)."""
    kernels = _kernels("batch_norm_act_training_backward", input)
    return kernels.batch_norm_act_backward(grad_output, input, mean, rstd, _dense(weight), _dense(bias), activation)


def fold_batch_norm(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The factor and the term, (2, C), that an evaluated batch norm is; in float32 (float64 for float64)."""
    return _module().fold_batch_norm(*map(_dense, (mean, var, weight, bias)), eps)


def empty_conv_output(input: Tensor, weight: Tensor, size: tuple) -> Tensor:
    """Under `F.conv2d`'s rule: channels_last if either operand is."""
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=_conv_format(input, weight))


def _conv_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    formats = suggest_memory_format(input), suggest_memory_format(weight)
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def _kernels(operation: str, input: Tensor) -> ModuleType:
    why = why_not(input)
    if why is not None:
        raise NotImplementedError(f"{operation}: the Triton kernels don't run: {why}")
    return _module()


@functools.cache
def _module() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def _dense(vector: Tensor | None) -> Tensor | None:
    """Kernels know no strides of vectors."""
    return None if vector is None else vector.contiguous()
