"""What surrounds a convolution in a block, in one pass over the image: gate, bias, residual and activation.

For the convolutions whose own kernels have no room for it, and for the activations and sums that follow none.
Contiguous images are taken as one row of elements, plane after plane: few small planes are a whole number of vectors.
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
    launch_options,
    multiple,
    multiples,
    on_device,
    pixel_strides,
    vector_of_pixels,
    wait_for_inputs,
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
    gate_stride,
    bias_stride,
    plane,
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
    DEPENDENT: tl.constexpr,
):
    """Contiguous images have one channel here, and ``plane`` pixels of it are those of a gate or bias."""
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
    block = tl.program_id(0) // channel_blocks
    image = tl.cast(block // pixel_blocks, tl.int64)
    first = block % pixel_blocks * BLOCK_P
    pixel = tl.arange(0, BLOCK_P)
    pixels_here = (first + pixel < pixels)[:, None]
    channels_here = (channel < channels)[None, :]
    here = pixels_here & channels_here
    if CHANNELS_LAST:
        factor, factors_here = channel[None, :], channels_here
    else:
        factor, factors_here = ((first + pixel) // plane)[:, None], pixels_here
    wait_for_inputs(DEPENDENT)
    y = tl.load(block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST), here, 0.0).to(ACC)
    if gate_ptr is not None:
        y *= tl.load(gate_ptr + image * gate_stride + factor, factors_here, 0.0).to(ACC)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + image * bias_stride + factor, factors_here, 0.0).to(ACC)
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
        bias: (C,), or (N, C, 1, 1).
        residual: (N, C, H, W).
        gate: (N, C, 1, 1).
        out: where to write, pixels at equal distances: the input itself, or channels of a larger channels_last image,
            or images of their own. Without it a tensor in the input's layout.
    """
    if out is None:
        memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
        out = torch.empty_like(input, memory_format=memory_format)
    channels_last = is_channels_last(out)
    batch, channels, height, width = out.shape
    gate = None if gate is None else gate.reshape(batch, channels).contiguous()
    of_images = bias is not None and bias.dim() > 1
    bias = bias.reshape(batch, channels).contiguous() if of_images else bias
    x, r, y = input, residual, out
    if not channels_last:
        y = out.view(batch, 1, channels, height * width)
        x, r = (None if t is None else t.reshape(y.shape) for t in (x, r))
    x, r = (None if t is None else arrange_pixels(t, channels_last) for t in (x, r))
    images, pixels, strides = batch, y.shape[2] * y.shape[3], image_strides
    if channels_last and gate is None and not of_images:  # then nothing tells the images apart
        images, pixels, strides = 1, batch * pixels, pixel_strides
    tile = image_tile(channels_last, y.element_size(), pixels, y.shape[1])
    grid = images * tile.pixel_blocks(pixels) * tile.channel_blocks(y.shape[1])
    if grid:
        with on_device(y):
            _forward[(grid,)](
                *(x, gate, bias, r, y, pixels, y.shape[1]),
                *(channels, channels if of_images else 0, height * width),
                *strides(x, channels_last),
                *((0, 0, 0) if r is None else strides(r, channels_last)),
                *strides(y, channels_last),
                ACTIVATION=activation,
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of_pixels(channels_last, *(t for t in (x, r, y) if t is not None)),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
                **launch_options(),
            )
    return out
