"""Squeeze-and-excitation: sums over pixels, two small layers, and the gate applied.

A depthwise convolution that makes the sums itself (``with_sums``), and a pointwise convolution that applies the gate as
it reads its input, leave only the two layers to do here; then no pass over the image is squeeze-and-excitation's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import activate
from .common import on_device
from .epilogue import epilogue
from .pool2d import sum_pixels


@triton.jit
def _layer(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    images,
    parts,
    channels,
    out_channels,
    pixels,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """``ACTIVATION(x.sum(parts) / pixels @ weight.T + bias)`` of x (N, parts, C), weight (O, C)."""
    ACC: tl.constexpr = x_ptr.dtype.element_ty
    out_blocks = tl.cdiv(out_channels, BLOCK_O)
    out_channel = tl.program_id(0) % out_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    image = tl.program_id(0) // out_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_O], ACC)
    for first in range(0, channels, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        here = (image < images)[:, None] & (channel < channels)[None, :]
        x = tl.zeros([BLOCK_N, BLOCK_K], ACC)
        for part in range(parts):
            row = tl.cast(image, tl.int64) * parts + part
            x += tl.load(x_ptr + row[:, None] * channels + channel[None, :], here, 0.0)
        pointers = weight_ptr + out_channel[None, :] * channels + channel[:, None]
        both = (channel < channels)[:, None] & (out_channel < out_channels)[None, :]
        weight = tl.load(pointers, both, 0.0).to(ACC)
        total = tl.dot(x / pixels, weight, total, input_precision="ieee", out_dtype=ACC)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + out_channel, out_channel < out_channels, 0.0).to(ACC)[None, :]
    both = (image < images)[:, None] & (out_channel < out_channels)[None, :]
    y_ptr += image[:, None] * out_channels + out_channel[None, :]
    tl.store(y_ptr, activate(total, ACTIVATION).to(y_ptr.dtype.element_ty), both)


def squeeze_excite_gate(
    sums: torch.Tensor,
    pixels: int,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    squeeze_activation: str = "relu",
    gate_activation: str = "hardsigmoid",
) -> torch.Tensor:
    """The gate (N, C, 1, 1), of the weights' dtype, from an image's sums (N, parts, C) over so many pixels."""
    batch, parts, channels = sums.shape
    squeezed = torch.empty((batch, weight1.shape[0]), dtype=sums.dtype, device=sums.device)
    gate = torch.empty((batch, channels, 1, 1), dtype=weight2.dtype, device=sums.device)
    if batch:
        with on_device(sums):
            for x, count, divisor, weight, bias, activation, y in (
                (sums, parts, pixels, weight1, bias1, squeeze_activation, squeezed),
                (squeezed, 1, 1, weight2, bias2, gate_activation, gate),
            ):
                weight = weight.reshape(weight.shape[0], weight.shape[1]).contiguous()
                _layer[(triton.cdiv(batch, 16) * triton.cdiv(weight.shape[0], 16),)](
                    *(x, weight, bias, y, batch, count, weight.shape[1], weight.shape[0], divisor),
                    ACTIVATION=activation,
                    BLOCK_N=16,
                    BLOCK_K=64,
                    BLOCK_O=16,
                    num_warps=2,
                )
    return gate


def squeeze_excite(
    input: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    squeeze_activation: str = "relu",
    gate_activation: str = "hardsigmoid",
) -> torch.Tensor:
    """`mobilenet_fast.reference.squeeze_excite`, whose checks its arguments have passed."""
    pixels = input.shape[2] * input.shape[3]
    gate = squeeze_excite_gate(
        sum_pixels(input), pixels, weight1, bias1, weight2, bias2, squeeze_activation, gate_activation
    )
    return epilogue(input, gate=gate)
