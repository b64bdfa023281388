"""What PyTorch must know of the operators that `_C` defines: their kernels for CUDA, shapes and strides for tracing,
gradients, and autocast.

All operations have kernels for their gradients, but pointwise_conv2d on CUDA, whose products are cuDNN's. These are
operators as well, so that compiled backward passes see them; they compute again what the activation was applied to.
Second derivatives go through the reference: a backward pass that is to be differentiated (``create_graph=True``) uses
it, and so does one of a gradient that no kernel reads (`runs_in_pytorch`). Kernels add in the same order each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _C, cpu, cuda, reference  # noqa: F401  importing _C defines the operators

OPERATIONS = ("depthwise_conv2d", "pointwise_conv2d", "batch_norm_act", "squeeze_excite")

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_AUTOCAST_KEYS = _AUTOCAST_KEYS | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

_library = torch.library.Library("mobilenet_fast", "FRAGMENT")
_library.define(
    "depthwise_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, "
    "int[2] dilation, bool need_input, bool need_weight) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor running_mean, Tensor running_var, "
    "Tensor? weight, Tensor? bias, float eps, str activation) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "pointwise_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, bool need_input, bool need_weight) -> "
    "Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "squeeze_excite_backward(Tensor grad_output, Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, "
    "Tensor? bias2, str squeeze_activation, str gate_activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _operation in OPERATIONS:
    _library.impl(_operation, getattr(cuda, _operation), "CUDA")
    _library.impl(f"{_operation}_backward", getattr(cuda, f"{_operation}_backward"), "CUDA")
    _library.impl(f"{_operation}_backward", getattr(cpu, f"{_operation}_backward"), "CPU")


def uses_triton(input: Tensor) -> bool:
    """Whether the operators run the Triton kernels for this tensor, or for a fake of it."""
    return input.is_cuda


def _check_dtype(operation: str, input: Tensor) -> None:
    """The operators are the kernels; the reference takes more."""
    if uses_triton(input):
        if input.dtype not in cuda.DTYPES:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in cuda.DTYPES)
            raise NotImplementedError(f"{operation}: input must be one of {dtypes} on CUDA, got {input.dtype}")
    elif input.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operation}: input must be float32 or float64, got {input.dtype}")


def _empty_image_like(input: Tensor) -> Tensor:
    """What the Triton kernels give for an image: dense, channels_last if the input is."""
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


@torch.library.register_fake("mobilenet_fast::depthwise_conv2d")
def _(input, weight, bias=None, stride=1, padding=0, dilation=1, activation="none", scale=None):
    stride, padding, dilation = map(reference.pair, (stride, padding, dilation))
    reference.check_depthwise_conv2d(input, weight, bias, stride, padding, dilation, activation, scale)
    _check_dtype("depthwise_conv2d", input)
    sides = reference.each_side(padding)
    map_size = map(reference.conv_output_size, input.shape[2:], weight.shape[2:], stride, sides, dilation)
    return cuda.empty_conv_output(input, weight, (input.size(0), weight.size(0), *map_size))


@torch.library.register_fake("mobilenet_fast::pointwise_conv2d")
def _(input, weight, bias=None, activation="none", gate=None, residual=None, scale=None):
    reference.check_pointwise_conv2d(input, weight, bias, activation, gate, residual, scale)
    _check_dtype("pointwise_conv2d", input)
    return cuda.empty_conv_output(input, weight, (input.size(0), weight.size(0), *input.shape[2:]))


@torch.library.register_fake("mobilenet_fast::batch_norm_act")
def _(input, running_mean, running_var, weight=None, bias=None, eps=1e-5, activation="none"):
    reference.check_batch_norm_act(input, running_mean, running_var, weight, bias, eps, activation)
    _check_dtype("batch_norm_act", input)
    if uses_triton(input):
        return _empty_image_like(input)
    if input.size(0) == 0:
        return torch.empty_like(input)
    # F.batch_norm prefers contiguous where a shape fits both layouts, other than F.conv2d.
    wanted = torch.contiguous_format if input.is_contiguous() else suggest_memory_format(input)
    return torch.empty_like(input, memory_format=wanted)


@torch.library.register_fake("mobilenet_fast::squeeze_excite")
def _(input, weight1, bias1, weight2, bias2, squeeze_activation="relu", gate_activation="hardsigmoid"):
    reference.check_squeeze_excite(input, weight1, bias1, weight2, bias2, squeeze_activation, gate_activation)
    _check_dtype("squeeze_excite", input)
    if uses_triton(input):
        return _empty_image_like(input)
    return input * input.new_empty((*input.shape[:2], 1, 1))


@torch.library.register_fake("mobilenet_fast::depthwise_conv2d_backward")
def _(grad_output, input, weight, stride, padding, dilation, need_input, need_weight):
    return _empty_conv_grads(input, weight, need_input, need_weight)


@torch.library.register_fake("mobilenet_fast::pointwise_conv2d_backward")
def _(grad_output, input, weight, need_input, need_weight):
    return _empty_conv_grads(input, weight, need_input, need_weight)


def _empty_conv_grads(input: Tensor, weight: Tensor, need_input: bool, need_weight: bool) -> list[Tensor]:
    grads = []
    if need_input:
        channels_last = torch.channels_last in map(suggest_memory_format, (input, weight))
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        grads.append(torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=wanted))
    if need_weight:
        grads.append(weight.new_empty(weight.shape))
    return grads


@torch.library.register_fake("mobilenet_fast::squeeze_excite_backward")
def _(grad_output, input, weight1, bias1, weight2, bias2, squeeze_activation, gate_activation):
    vectors = (weight1.new_empty(weight1.size(0)), weight2.new_empty(weight2.size(0)))
    weights = (weight1.new_empty(weight1.shape), weight2.new_empty(weight2.shape))
    return _empty_image_like(input), weights[0], vectors[0], weights[1], vectors[1]


@torch.library.register_fake("mobilenet_fast::batch_norm_act_backward")
def _(grad_output, input, running_mean, running_var, weight, bias, eps, activation):
    if not uses_triton(input):
        wanted = torch.contiguous_format if input.is_contiguous() else suggest_memory_format(input)
        vector = input.new_empty(input.size(1))
        return torch.empty_like(input, memory_format=wanted), vector, torch.empty_like(vector)
    grad_input = torch.empty_like(input, memory_format=suggest_memory_format(input))
    sums = input.new_empty((2, input.size(1)), dtype=torch.promote_types(input.dtype, torch.float32))
    return grad_input, sums[1].clone(), sums[0].clone()


# The steps of training: a block of convolutions and batch norms runs as these (nn/training.py), on images that are
# channels_last.
def _image(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty((x.size(0), channels, height, width)).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("mobilenet_fast::pointwise_conv2d_forward")
def _(x, folded, activation, gate, weight):
    return _image(x, weight.size(0), x.size(2), x.size(3)), x.new_empty((2, weight.size(0)))


@torch.library.register_fake("mobilenet_fast::depthwise_conv2d_forward")
def _(x, folded, activation, weight, stride, padding, dilation):
    sides = reference.each_side(reference.pair(padding))
    map_size = map(reference.conv_output_size, x.shape[2:], weight.shape[2:], stride, sides, dilation)
    return _image(x, x.size(1), *map_size), x.new_empty((2, x.size(1)))


@torch.library.register_fake("mobilenet_fast::conv2d_forward")
def _(x, folded, activation, gate, weight, stride, padding, dilation):
    sides = reference.each_side(reference.pair(padding))
    map_size = map(reference.conv_output_size, x.shape[2:], weight.shape[2:], stride, sides, dilation)
    return _image(x, weight.size(0), *map_size), x.new_empty((2, weight.size(0)))


@torch.library.register_fake("mobilenet_fast::max_pool2d_forward")
def _(x, folded, activation, kernel_size, stride, padding, dilation):
    sides = reference.each_side(reference.pair(padding))
    return _image(x, x.size(1), *map(reference.conv_output_size, x.shape[2:], kernel_size, stride, sides, dilation))


@torch.library.register_fake("mobilenet_fast::converted")
def _(x, dtype):
    return _image(x, *x.shape[1:]).to(dtype)


@torch.library.register_fake("mobilenet_fast::batch_norm_statistics")
def _(x):
    return x.new_empty((2, x.size(1)))


@torch.library.register_fake("mobilenet_fast::batch_norm_apply")
def _(x, folded, activation, gate, residual):
    return _image(x, *x.shape[1:])


@torch.library.register_fake("mobilenet_fast::batch_norm_pixel_sums")
def _(x, folded, activation, grad):
    return x.new_empty(x.shape[:2])


@torch.library.register_fake("mobilenet_fast::batch_norm_gradient_sums")
def _(grad, y, folded, activation, gate, pooled, mean):
    return grad.new_empty((2, grad.size(1)))


@torch.library.register_fake("mobilenet_fast::batch_norm_gradient")
def _(grad, y, folded, activation, gate, pooled, coefficients):
    return _image(grad, *grad.shape[1:])


@torch.library.register_fake("mobilenet_fast::pointwise_conv2d_gradients")
def _(
    grad,
    y,
    y_folded,
    y_activation,
    y_gate,
    y_pooled,
    coefficients,
    x,
    folded,
    activation,
    gate,
    mean,
    weight,
    added,
    need_input,
    need_weight,
):
    return _conv_gradients(x, gate, mean, weight, need_input, need_weight)


@torch.library.register_fake("mobilenet_fast::depthwise_conv2d_gradients")
def _(*arguments):
    x, _, _, mean, weight, *_, need_input, need_weight = arguments[7:]  # behind those of the gradient
    return _conv_gradients(x, None, mean, weight, need_input, need_weight)


@torch.library.register_fake("mobilenet_fast::conv2d_gradients")
def _(*arguments):
    x, _, _, gate, mean, weight, *_, need_input, need_weight = arguments[7:]  # behind those of the gradient
    return _conv_gradients(x, gate, mean, weight, need_input, need_weight)


@torch.library.register_fake("mobilenet_fast::max_pool2d_gradients")
def _(grad, x, folded, activation, mean, kernel_size, stride, padding, dilation):
    return _image(x, *x.shape[1:]), x.new_empty((2, x.size(1)) if mean is not None else 0)


def _conv_gradients(x, gate, mean, weight, need_input, need_weight):
    of_x = _image(x, *x.shape[1:]) if need_input else x.new_empty(0)
    of_weight = x.new_empty(weight.shape) if need_weight else x.new_empty(0)
    sums = x.new_empty((2, x.size(1))) if need_input and mean is not None else x.new_empty(0)
    of_gate = x.new_empty(x.shape[:2]) if need_input and gate is not None else x.new_empty(0)
    return of_x, of_weight, sums, of_gate


def runs_in_pytorch(grad: Tensor) -> bool:
    """Whether a backward pass is PyTorch's own operators': one that is to be differentiated in turn, or of a gradient
    that no kernel reads, of which there are several at once (``is_grads_batched=True``) or whose memory says less than
    it is (lazy negation, zeros that are nowhere).
    """
    functorch = torch._C._functorch
    several = functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or several or grad.is_neg() or grad._is_zerotensor()


def _register_autograd(operation: str) -> None:
    """Gradients of an operator: by kernels, or those of its reference."""
    formula = getattr(reference, operation)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx, grad):
        operands = [c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True)]
        twice = torch.is_grad_enabled()
        by_kernels = not runs_in_pytorch(grad)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):  # the operands have the kernel's dtypes
            if by_kernels:
                given = len(ctx.needs_input_grad)  # arguments at their default are not, at the end
                needed = (*ctx.needs_input_grad, *[False] * (len(operands) - given))
                return _GRADIENTS[operation](needed, grad, *operands)[:given]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            with torch.enable_grad():
                for i in wanted:
                    # An alias ends this small graph at the operand, and still leads on to it for a second derivative.
                    operands[i] = operands[i].view_as(operands[i])
                output = formula(*operands)
            grads = iter(torch.autograd.grad(output, [operands[i] for i in wanted], grad, create_graph=twice))
        return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)

    torch.library.register_autograd(f"mobilenet_fast::{operation}", backward, setup_context=setup_context)


def _depthwise_gradients(needed, grad, input, weight, bias, stride, padding, dilation, activation, scale):
    geometry = stride, padding, dilation
    if activation != "none":
        inner = torch.ops.mobilenet_fast.depthwise_conv2d(input, weight, bias, *geometry, "none", scale)
        grad = reference.ACTIVATION_GRADIENTS[activation](grad, inner)
    grads = [None] * len(needed)
    need_input, need_filters = needed[0], needed[1] or needed[7]
    if need_input or need_filters:
        found = torch.ops.mobilenet_fast.depthwise_conv2d_backward(
            grad, input, reference.scaled(weight, scale), *geometry, need_input, need_filters
        )
        if need_input:
            grads[0] = found[0]
    if needed[1]:
        grads[1] = reference.scaled(found[-1], scale)
    if needed[2]:
        grads[2] = grad.sum((0, 2, 3), dtype=bias.dtype)
    if needed[7]:
        grads[7] = (found[-1] * weight).sum((1, 2, 3), dtype=scale.dtype)
    return tuple(grads)


def _batch_norm_gradients(needed, grad, input, running_mean, running_var, weight, bias, eps, activation):
    if needed[1] or needed[2]:
        raise NotImplementedError(
            "batch_norm_act: running_mean and running_var must need no gradient, got one that does"
        )
    operands = input, running_mean, running_var, weight, bias
    found = torch.ops.mobilenet_fast.batch_norm_act_backward(grad, *operands, eps, activation)
    grads = [None] * len(needed)
    for i, value in zip((0, 3, 4), found, strict=True):
        if needed[i]:
            grads[i] = value.to(operands[i].dtype)
    return tuple(grads)


def _pointwise_gradients(needed, grad, input, weight, bias, activation, gate, residual, scale):
    if activation != "none":
        inner = torch.ops.mobilenet_fast.pointwise_conv2d(input, weight, bias, "none", gate, residual, scale)
        grad = reference.ACTIVATION_GRADIENTS[activation](grad, inner)
    grads = [None] * len(needed)
    need_input, need_filters = needed[0] or needed[4], needed[1] or needed[6]
    if need_input or need_filters:
        read = input if gate is None else input * gate
        found = torch.ops.mobilenet_fast.pointwise_conv2d_backward(
            grad, read, reference.scaled(weight, scale), need_input, need_filters
        )
        if needed[0]:
            grads[0] = found[0] if gate is None else found[0] * gate
        if needed[4]:
            grads[4] = (found[0] * input).sum((2, 3), keepdim=True)
    if needed[1]:
        grads[1] = reference.scaled(found[-1], scale)
    if needed[2]:
        grads[2] = grad.sum((0, 2, 3), dtype=bias.dtype)
    if needed[5]:
        grads[5] = grad
    if needed[6]:
        grads[6] = (found[-1] * weight).sum((1, 2, 3), dtype=scale.dtype)
    return tuple(grads)


def _squeeze_excite_gradients(needed, grad, *operands):
    found = torch.ops.mobilenet_fast.squeeze_excite_backward(grad, *operands)
    return (*(value if need else None for value, need in zip(found, needed, strict=False)), None, None)


_GRADIENTS = {
    "depthwise_conv2d": _depthwise_gradients,
    "pointwise_conv2d": _pointwise_gradients,
    "batch_norm_act": _batch_norm_gradients,
    "squeeze_excite": _squeeze_excite_gradients,
}
for _operation in OPERATIONS:
    _register_autograd(_operation)


def register_autocast(library: torch.library.Library, device_type: str) -> None:
    """Makes the operators cast their operands under autocast as PyTorch's own layers do."""

    def register(operation: str, call: Callable[..., Tensor]) -> None:
        def kernel(*arguments):
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return call(torch.get_autocast_dtype(device_type), *arguments)

        library.impl(operation, kernel, f"Autocast{device_type.upper()}")

    for operation, call in _UNDER_AUTOCAST.items():
        register(operation, call)


def _cast(dtype: torch.dtype, *operands: Tensor | None, keep_float32: bool = False) -> list[Tensor | None]:
    """The operands in this dtype; as in PyTorch, float64 stays."""
    kept = (torch.float64, torch.float32) if keep_float32 else (torch.float64,)
    return [t if t is None or not t.is_floating_point() or t.dtype in kept else t.to(dtype) for t in operands]


def _autocast_depthwise(
    dtype, input, weight, bias=None, stride=1, padding=0, dilation=1, activation="none", scale=None
):
    input, weight = _cast(dtype, input, weight)
    bias, scale = _cast(dtype, bias, scale, keep_float32=True)
    arguments = input, weight, bias, stride, padding, dilation, activation, scale
    return torch.ops.mobilenet_fast.depthwise_conv2d(*arguments)


def _autocast_pointwise(dtype, input, weight, bias=None, activation="none", gate=None, residual=None, scale=None):
    input, weight, gate = _cast(dtype, input, weight, gate)
    bias, scale = _cast(dtype, bias, scale, keep_float32=True)
    if residual is None or residual.dtype == input.dtype:
        return torch.ops.mobilenet_fast.pointwise_conv2d(input, weight, bias, activation, gate, residual, scale)
    # PyTorch's sum of two dtypes has the wider one.
    output = torch.ops.mobilenet_fast.pointwise_conv2d(input, weight, bias, "none", gate, None, scale)
    return reference.ACTIVATIONS[activation](output + residual)


def _autocast_squeeze_excite(dtype, input, *operands):
    """Runs in the input's dtype, which the product with a gate of the lower one has."""
    if input.dtype not in (torch.float32, dtype):
        with torch.autocast(input.device.type, dtype):
            return reference.squeeze_excite(input, *operands)
    layers = _cast(input.dtype, *operands[:4])
    return torch.ops.mobilenet_fast.squeeze_excite(input, *layers, *operands[4:])


_UNDER_AUTOCAST: dict[str, Callable[..., Tensor]] = {
    "depthwise_conv2d": _autocast_depthwise,
    "pointwise_conv2d": _autocast_pointwise,
    "batch_norm_act": lambda dtype, *arguments: torch.ops.mobilenet_fast.batch_norm_act(*arguments),
    "squeeze_excite": _autocast_squeeze_excite,
}
register_autocast(_library, "cuda")
