"""What a batch norm that uses its running statistics comes to: a factor and a term for each channel, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .batch_norm_act import _affine
from .common import on_device

_BLOCK = 256


@triton.jit
def _fold(
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    folded_ptr,
    channels,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < channels
    mean, rstd, weight, bias = _affine(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, here, EPS, True, folded_ptr.dtype.element_ty
    )
    scale = rstd * weight
    tl.store(folded_ptr + channel, scale, here)
    tl.store(folded_ptr + channels + channel, bias - mean * scale, here)


def fold_batch_norm(
    mean: torch.Tensor, variance: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(2, C), ``scale, shift``: ``F.batch_norm(x, ...) == x * scale + shift``, in float32 (float64 for float64)."""
    channels = mean.numel()
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    folded = torch.empty((2, channels), dtype=dtype, device=mean.device)
    with on_device(mean):
        _fold[(triton.cdiv(channels, _BLOCK),)](
            mean, variance, weight, bias, folded, channels, EPS=eps, BLOCK_C=_BLOCK, num_warps=2
        )
    return folded
