"""Pooling: sums over all pixels (the squeeze of squeeze-and-excitation, global average pooling), and over windows.

A window's taps are loaded one after another; its neighbours in a program have most of them in common, in cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    accumulator,
    arrange,
    arrange_pixels,
    block_pointers,
    image_strides,
    is_channels_last,
    launch_options,
    multiple,
    multiples,
    on_device,
    strides,
    vector_of,
    vector_of_pixels,
    wait_for_inputs,
)
from .tiles import ImageTile, chip_of, image_tile, pool_tile


@triton.jit
def _sum_pixels(
    x_ptr,
    sums_ptr,
    pixels,
    channels,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    sums_image_stride,
    parts,
    divisor,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Sums over the pixels of each part of an image, divided: (N, parts, C)."""
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
    wait_for_inputs(DEPENDENT)
    for first in range(part * BLOCK_P, pixels, parts * BLOCK_P):
        here = (first + pixel < pixels)[:, None] & (channel < channels)[None, :]
        pointers = block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST)
        sums += tl.load(pointers, here, 0.0).to(ACC)
    sums_ptr += image * sums_image_stride + part * channels + channel
    result = tl.sum(sums, 0) / divisor
    tl.store(sums_ptr, result.to(sums_ptr.dtype.element_ty), channel < channels)


@triton.jit
def _forward(
    x_ptr,
    y_ptr,
    height,
    width,
    out_width,
    out_pixels,
    channels,
    divisor,
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    y_image_stride,
    y_pixel_stride,
    y_channel_stride,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MEAN: tl.constexpr,
    COUNT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """COUNT: what a sum is divided by, "divisor", or the taps "inside" the image, or those in its padding too."""
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_column_stride, x_channel_stride, CHANNELS_LAST, VECTOR_IN)
    x_row_stride = multiple(x_row_stride, VECTOR_IN)
    y_strides = multiples(y_image_stride, y_pixel_stride, y_channel_stride, CHANNELS_LAST, VECTOR_OUT)
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR_OUT)
    else:
        out_pixels = multiple(out_pixels, VECTOR_OUT)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_P)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    block = tl.program_id(0) // channel_blocks
    image = tl.cast(block // pixel_blocks, tl.int64)
    first = block % pixel_blocks * BLOCK_P
    pixel = tl.arange(0, BLOCK_P)
    here = (first + pixel < out_pixels)[:, None] & (channel < channels)[None, :]
    top = (first + pixel) // out_width * STRIDE_H - PADDING_H
    left = (first + pixel) % out_width * STRIDE_W - PADDING_W

    wait_for_inputs(DEPENDENT)
    total = tl.full([BLOCK_P, BLOCK_C], 0.0 if MEAN else float("-inf"), ACC)
    for ky in range(KERNEL_H):
        row = top + ky * DILATION_H
        rows = x_ptr + tl.cast(row, tl.int64)[:, None] * x_row_stride
        for kx in tl.static_range(KERNEL_W):
            column = left + kx * DILATION_W
            inside = here & ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
            pointers = block_pointers(rows, x_strides, image, 0, column, channel, CHANNELS_LAST)
            x = tl.load(pointers, inside, 0.0 if MEAN else float("-inf")).to(ACC)
            if MEAN:
                total += x
            else:
                total = tl.maximum(total, x, propagate_nan=tl.PropagateNan.ALL)
    if MEAN:
        if COUNT == "divisor":
            total = total / divisor
        else:
            # Padding counts, but not what lies behind it, where the last windows may reach.
            EDGE_H: tl.constexpr = PADDING_H if COUNT == "padding" else 0
            EDGE_W: tl.constexpr = PADDING_W if COUNT == "padding" else 0
            rows_inside = tl.minimum(top + KERNEL_H, height + EDGE_H) - tl.maximum(top, -EDGE_H)
            columns_inside = tl.minimum(left + KERNEL_W, width + EDGE_W) - tl.maximum(left, -EDGE_W)
            total = total / (rows_inside * columns_inside)[:, None]
    pointers = block_pointers(y_ptr, y_strides, image, first, pixel, channel, CHANNELS_LAST)
    tl.store(pointers, total.to(y_ptr.dtype.element_ty), here)


def sum_pixels(input: torch.Tensor) -> torch.Tensor:
    """Sums over (H, W) in parts, in float32 (float64 for float64): (N, parts, C)."""
    channels_last = is_channels_last(input)
    batch, channels, pixels = input.shape[0], input.shape[1], input.shape[2] * input.shape[3]
    tile = image_tile(channels_last, input.element_size(), pixels, channels)
    parts = parts_of_sums(input, tile)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    sums = torch.empty((batch, parts, channels), dtype=dtype, device=input.device)
    _sum(input, sums, channels_last, 1)
    return sums


def parts_of_sums(input: torch.Tensor, tile: ImageTile) -> int:
    """In how many parts the pixels of an image are summed: as many as make eight programs a multiprocessor in all."""
    blocks = max(1, input.shape[0] * tile.channel_blocks(input.shape[1]))
    pixel_blocks = tile.pixel_blocks(input.shape[2] * input.shape[3])
    return min(pixel_blocks, triton.cdiv(8 * chip_of(input).multiprocessors, blocks))


def global_avg_pool(input: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Means over (H, W), into ``out``, (N, C, 1, 1) with channels side by side."""
    batch, channels, height, width = input.shape
    channels_last = is_channels_last(input)
    tile = image_tile(channels_last, input.element_size(), height * width, channels)
    # A second launch costs as much time as a program needs for some eight blocks.
    if tile.pixel_blocks(height * width) > 8:
        return mean_of_sums(sum_pixels(input), height * width, out=out)
    _sum(input, out.view(batch, 1, channels), channels_last, height * width)
    return out


def mean_of_sums(sums: torch.Tensor, pixels: int, *, out: torch.Tensor) -> torch.Tensor:
    """Means over (H, W), into (N, C, 1, 1), from the sums over so many pixels that something else made in parts:
    (N, parts, C).
    """
    batch, _, channels = sums.shape
    # An image of one column, a pixel a part.
    _sum(sums.transpose(1, 2).unsqueeze(3), out.view(batch, 1, channels), True, pixels)
    return out


def _sum(input: torch.Tensor, sums: torch.Tensor, channels_last: bool, divisor: int) -> None:
    input = arrange_pixels(input, channels_last)
    batch, channels, pixels = input.shape[0], input.shape[1], input.shape[2] * input.shape[3]
    tile = image_tile(channels_last, input.element_size(), pixels, channels)
    grid = batch * sums.shape[1] * tile.channel_blocks(channels)
    if grid:
        with on_device(input):
            _sum_pixels[(grid,)](
                *(input, sums, pixels, channels, *image_strides(input, channels_last)),
                *(sums.stride(0), sums.shape[1], divisor),
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of_pixels(channels_last, input),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
                **launch_options(),
            )


def pool2d(
    input: torch.Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mean: bool = False,
    count_padding: bool = False,
    divisor: int = 0,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """Maxima or means over windows: `F.max_pool2d`, `F.avg_pool2d`. NaN wins.

    Args:
        input: (N, C, H, W).
        padding: before the first row and column, and as much behind the last; windows may reach past that, as
            PyTorch's ``ceil_mode`` lets them.
        dilation: of maxima only.
        mean: whether means are wanted.
        count_padding: whether a mean's window counts its taps in the padding.
        divisor: what a mean's sum is divided by, if not 0.
        out: (N, C, H', W'), where to write: channels of a larger channels_last image, or images of their own.
    """
    channels_last = is_channels_last(out)
    input = arrange(input, channels_last)
    batch, channels, out_height, out_width = out.shape
    tile = pool_tile(channels_last, out.element_size(), out_height * out_width, channels)
    grid = batch * tile.pixel_blocks(out_height * out_width) * tile.channel_blocks(channels)
    if grid:
        with on_device(input):
            _forward[(grid,)](
                *(input, out, *input.shape[2:], out_width, out_height * out_width, channels, divisor),
                *strides(input, channels_last),
                *image_strides(out, channels_last),
                KERNEL_H=kernel[0],
                KERNEL_W=kernel[1],
                STRIDE_H=stride[0],
                STRIDE_W=stride[1],
                PADDING_H=padding[0],
                PADDING_W=padding[1],
                DILATION_H=dilation[0],
                DILATION_W=dilation[1],
                MEAN=mean,
                COUNT="divisor" if divisor else "padding" if count_padding else "inside",
                CHANNELS_LAST=channels_last,
                VECTOR_IN=vector_of(channels_last, input),
                VECTOR_OUT=vector_of_pixels(channels_last, out),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
                **launch_options(),
            )
    return out
