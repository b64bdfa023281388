"""What surrounds a convolution in a block, in one pass over the image: gate, bias, residual and activation.

For the convolutions whose own kernels have no room for it, and for the activations and sums that follow none.
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
    pixel_strides,
    vector_of_pixels,
)
from .tiles import image_tile


@triton.jit
def _forward(
    x_ptr,
    gate_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    channels,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    residual_image_stride,
    residual_pixel_stride,
    residual_channel_stride,
    y_image_stride,
    y_pixel_stride,
    y_channel_stride,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = accumulator(y_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_pixel_stride, x_channel_stride, CHANNELS_LAST, VECTOR)
    residual_strides = multiples(
        residual_image_stride, residual_pixel_stride, residual_channel_stride, CHANNELS_LAST, VECTOR
    )
    y_strides = multiples(y_image_stride, y_pixel_stride, y_channel_stride, CHANNELS_LAST, VECTOR)
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    channels_here = channel < channels
    block = tl.program_id(0) // channel_blocks
    image = tl.cast(block // pixel_blocks, tl.int64)
    first = block % pixel_blocks * BLOCK_P
    pixel = tl.arange(0, BLOCK_P)
    here = (first + pixel < pixels)[:, None] & channels_here[None, :]
    y = tl.load(block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST), here, 0.0).to(ACC)
    if gate_ptr is not None:
        y *= tl.load(gate_ptr + image * channels + channel, channels_here, 0.0).to(ACC)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, channels_here, 0.0).to(ACC)[None, :]
    if residual_ptr is not None:
        pointers = block_pointers(residual_ptr, residual_strides, image, first, pixel, channel, CHANNELS_LAST)
        y += tl.load(pointers, here, 0.0).to(ACC)
    pointers = block_pointers(y_ptr, y_strides, image, first, pixel, channel, CHANNELS_LAST)
    tl.store(pointers, activate(y, ACTIVATION).to(y_ptr.dtype.element_ty), here)


def epilogue(
    input: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    activation: str = "none",
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(input * gate + bias + residual)``, each but the input only if it is there.

    Args:
        input: (N, C, H, W).
        bias: (C,).
        residual: (N, C, H, W).
        gate: (N, C, 1, 1).
        out: where to write, pixels at equal distances: the input itself, or channels of a larger channels_last image,
            or images of their own. Without it a tensor in the input's layout.
    """
    if out is None:
        memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
        out = torch.empty_like(input, memory_format=memory_format)
    channels_last = is_channels_last(out)
    input = arrange_pixels(input, channels_last)
    residual = None if residual is None else arrange_pixels(residual, channels_last)
    batch, channels, height, width = out.shape
    images, pixels, strides = batch, height * width, image_strides
    if channels_last and gate is None:  # then nothing tells the images apart
        images, pixels, strides = 1, batch * height * width, pixel_strides
    gate = None if gate is None else gate.reshape(batch, channels).contiguous()
    tile = image_tile(channels_last, out.element_size(), pixels, channels)
    grid = images * tile.pixel_blocks(pixels) * tile.channel_blocks(channels)
    if grid:
        with on_device(out):
            _forward[(grid,)](
                *(input, gate, bias, residual, out, pixels, channels),
                *strides(input, channels_last),
                *((0, 0, 0) if residual is None else strides(residual, channels_last)),
                *strides(out, channels_last),
                ACTIVATION=activation,
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of_pixels(channels_last, *(t for t in (input, residual, out) if t is not None)),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
            )
    return out
