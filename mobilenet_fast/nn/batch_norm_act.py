"""Batch norm with an activation behind it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import cuda, functional, ops, reference
from .dispatch import is_eager, kernels_serve, known, runs_triton


@known
class BatchNormAct2d(nn.BatchNorm2d):
    """``activation(nn.BatchNorm2d(num_features, ...)(input))``

    An `nn.BatchNorm2d` in constructor, attributes and state_dict. In eval mode, tensors that
    `mobilenet_fast.functional` has kernels for and that need no gradient run in one, in one pass; on GPUs so do those
    that need one, and training, which keeps its input and no more. Everything else runs as `nn.BatchNorm2d` does. Of
    half-precision images, parameters and statistics may be float32.
    What `nn.SyncBatchNorm.convert_sync_batchnorm` makes of it, a `SyncBatchNormAct`, keeps the activation.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as `nn.BatchNorm2d` takes them.
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".

    Shape:
        (N, C, H, W) → the same, in the layout that `nn.BatchNorm2d` gives. The error is that of
        `mobilenet_fast.functional.batch_norm_act`.

    Raises:
        ValueError: ``activation`` is another.

    Batch Normalization (Ioffe and Szegedy, 2015, arXiv:1502.03167), section 3.1.
    """

    # On the class as well, for a layer that replace_layers turned into this one has none of its own.
    activation: str | None = "none"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "none",
    ) -> None:
        reference.check_activation("BatchNormAct2d", activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        output = normalised(self, input, self.activation)
        return self.plain_forward(input) if output is None else output

    def plain_forward(self, input: Tensor) -> Tensor:
        return reference.activation(super().forward(input), self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation}")

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        caller = sys._getframe(1)
        asks = caller.f_code is nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__
        if asks and self.activation is not None:
            # PyTorch's conversion asks for the children of what it replaces, and for no activation. It goes on to
            # return this layer of its own.
            layer = caller.f_locals["module_output"]
            layer.__class__, layer.activation = SyncBatchNormAct, self.activation
        return super().named_children()


def normalised(norm: nn.BatchNorm2d, input: Tensor, activation: str | None) -> Tensor | None:
    """``activation(nn.BatchNorm2d.forward(norm, input))`` by a kernel, or None where there is none."""
    operands = norm.running_mean, norm.running_var, norm.weight, norm.bias
    on_gpu = runs_triton(input)
    if activation is not None and kernels_serve(input, norm=operands, learns=on_gpu):
        if uses_running_statistics(norm):
            return functional.batch_norm_act(input, *operands, eps=norm.eps, activation=activation)
        both = (norm.running_mean is None) == (norm.running_var is None)
        if on_gpu and is_eager() and both and all(t is None or t.shape == input.shape[1:2] for t in operands):
            F._verify_batch_size(input.shape)
            return _ByBatch.apply(input, norm.weight, norm.bias, norm, activation)
    return None


class _ByBatch(torch.autograd.Function):
    """Batch norm by the statistics of the batch, and activation: the backward pass computes again what went into
    that."""

    @staticmethod
    def forward(ctx, input, weight, bias, norm, activation):
        momentum = 0.0 if norm.momentum is None else norm.momentum
        mean = var = batches = None
        if norm.training and norm.track_running_stats:
            mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
            if batches is not None:
                batches.add_(1)
                momentum = norm.momentum
        output, mean, rstd = cuda.batch_norm_act_training(
            input, mean, var, weight, bias, momentum, norm.eps, activation, batches
        )
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.constants = norm.eps, activation
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, mean, rstd = ctx.saved_tensors
        eps, activation = ctx.constants
        needed = ctx.needs_input_grad[:3]
        if ops.runs_in_pytorch(grad):
            twice = torch.is_grad_enabled()
            with torch.enable_grad():
                # Aliases end this small graph at the operands, and still lead on to them.
                operands = [None if t is None else t.view_as(t) for t in (input, weight, bias)]
                z = F.batch_norm(operands[0], None, None, *operands[1:], training=True, eps=eps)
                z = reference.ACTIVATIONS[activation](z)
            wanted = [t for t, need in zip(operands, needed, strict=True) if need]
            found = iter(torch.autograd.grad(z, wanted, grad, create_graph=twice))
            return *(next(found) if need else None for need in needed), None, None
        found = cuda.batch_norm_act_training_backward(grad, input, mean, rstd, weight, bias, activation)
        operands = zip(found, (input, weight, bias), needed, strict=True)
        return *(g.to(t.dtype) if need else None for g, t, need in operands), None, None


class SyncBatchNormAct(nn.SyncBatchNorm):
    """``activation(nn.SyncBatchNorm(input))``: what PyTorch's conversion makes of a `BatchNormAct2d`."""

    activation: str = "none"

    def forward(self, input: Tensor) -> Tensor:
        return reference.activation(super().forward(input), self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation}")


def uses_running_statistics(norm: nn.BatchNorm2d) -> bool:
    buffers = norm._buffers
    return not norm.training and buffers.get("running_mean") is not None and buffers.get("running_var") is not None
