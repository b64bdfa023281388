"""Squeeze-and-excitation: sums over pixels, two small layers, and the gate applied.

A depthwise convolution that makes the sums itself (``with_sums``), and a pointwise convolution that applies the gate as
it reads its input, leave only the two layers to do here; then no pass over the image is squeeze-and-excitation's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import activate
from .common import (
    accumulator,
    arrange_pixels,
    block_pointers,
    image_strides,
    is_channels_last,
    multiple,
    multiples,
    on_device,
    vector_of_pixels,
)
from .tiles import chip_of, image_tile


@triton.jit
def _sum_pixels(
    x_ptr,
    sums_ptr,
    pixels,
    channels,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    parts,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the pixels of each part of an image: (N, parts, C)."""
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_pixel_stride, x_channel_stride, CHANNELS_LAST, VECTOR)
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // channel_blocks % parts
    image = tl.cast(tl.program_id(0) // (channel_blocks * parts), tl.int64)
    pixel = tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(part * BLOCK_P, pixels, parts * BLOCK_P):
        here = (first + pixel < pixels)[:, None] & (channel < channels)[None, :]
        pointers = block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST)
        sums += tl.load(pointers, here, 0.0).to(ACC)
    tl.store(sums_ptr + (image * parts + part) * channels + channel, tl.sum(sums, 0), channel < channels)


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


@triton.jit
def _apply_gate(
    x_ptr,
    gate_ptr,
    y_ptr,
    pixels,
    channels,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    y_image_stride,
    y_pixel_stride,
    y_channel_stride,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_pixel_stride, x_channel_stride, CHANNELS_LAST, VECTOR)
    y_strides = multiples(y_image_stride, y_pixel_stride, y_channel_stride, CHANNELS_LAST, VECTOR)
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    block = tl.program_id(0) // channel_blocks
    image = tl.cast(block // pixel_blocks, tl.int64)
    first = block % pixel_blocks * BLOCK_P
    pixel = tl.arange(0, BLOCK_P)
    here = (first + pixel < pixels)[:, None] & (channel < channels)[None, :]
    gate = tl.load(gate_ptr + image * channels + channel, channel < channels, 0.0).to(ACC)
    x = tl.load(block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST), here, 0.0).to(ACC)
    pointers = block_pointers(y_ptr, y_strides, image, first, pixel, channel, CHANNELS_LAST)
    tl.store(pointers, activate(x * gate[None, :], ACTIVATION).to(y_ptr.dtype.element_ty), here)


def sum_pixels(input: torch.Tensor) -> torch.Tensor:
    """Sums over (H, W) in parts, in float32 (float64 for float64): (N, parts, C)."""
    channels_last = is_channels_last(input)
    input = arrange_pixels(input, channels_last)
    batch, channels, pixels = input.shape[0], input.shape[1], input.shape[2] * input.shape[3]
    tile = image_tile(channels_last, input.element_size(), pixels, channels)
    channel_blocks = tile.channel_blocks(channels)
    wanted = triton.cdiv(8 * chip_of(input).multiprocessors, max(1, batch * channel_blocks))
    parts = min(tile.pixel_blocks(pixels), wanted)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    sums = torch.empty((batch, parts, channels), dtype=dtype, device=input.device)
    if batch:
        with on_device(input):
            _sum_pixels[(batch * parts * channel_blocks,)](
                *(input, sums, pixels, channels, *image_strides(input, channels_last), parts),
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of_pixels(channels_last, input),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
            )
    return sums


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


def apply_gate(input: torch.Tensor, gate: torch.Tensor, activation: str = "none") -> torch.Tensor:
    """``activation(input * gate)`` of a gate (N, C, 1, 1)."""
    channels_last = is_channels_last(input)
    output = torch.empty_like(input, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    input = arrange_pixels(input, channels_last)
    batch, channels, pixels = input.shape[0], input.shape[1], input.shape[2] * input.shape[3]
    tile = image_tile(channels_last, input.element_size(), pixels, channels)
    if batch:
        with on_device(input):
            _apply_gate[(batch * tile.pixel_blocks(pixels) * tile.channel_blocks(channels),)](
                *(input, gate.reshape(batch, channels).contiguous(), output, pixels, channels),
                *image_strides(input, channels_last),
                *image_strides(output, channels_last),
                ACTIVATION=activation,
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of_pixels(channels_last, input, output),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
            )
    return output


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
    return apply_gate(input, gate)
