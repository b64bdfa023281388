"""Dense convolution: a matrix product of windows × taps with the weights, without the windows ever being stored.

A program takes a block of output pixels × output channels. Where channels are many, each step of its loop multiplies
some channels of one tap: one vector of pixels' addresses serves all steps, moved by the tap's offset. Where they are
few, as a stem's three, a step goes through several taps, and a program's pixels lie in one row: what an element of a
window needs is then the sum of what its tap and its column need, without a division of its own. The input is read by
its own strides, so that a stem takes images as they come.

The tile of the input is loaded as channels × pixels and transposed, which costs nothing: neighbouring threads then take
neighbouring channels where the compiler sees that these lie together, and else neighbouring pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .activations import activate
from .common import (
    accumulator,
    arrange_pixels,
    block_pointers,
    dot_precision,
    is_channels_last,
    launch_options,
    multiple,
    multiples,
    on_device,
    pixel_strides,
    vector_of,
    vector_of_pixels,
    wait_for_inputs,
    within,
)
from .tiles import chip_of, conv2d_tile

# Rows of packed weights are a multiple of this: Triton sees of an argument whether it is, and loads whole vectors then.
_ROW = 16
# With fewer channels a step of the loop takes several taps.
_MANY = 16


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    height,
    width,
    out_width,
    out_pixels,
    pixels,
    out_channels,
    weight_stride,
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    residual_image_stride,
    residual_pixel_stride,
    residual_channel_stride,
    y_image_stride,
    y_pixel_stride,
    y_channel_stride,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FEW_CHANNELS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    ACC: tl.constexpr = accumulator(y_ptr.dtype.element_ty)
    x_image_stride = multiple(x_image_stride, VECTOR_IN)
    x_row_stride = multiple(x_row_stride, VECTOR_IN)
    x_column_stride = multiple(x_column_stride, VECTOR_IN)
    y_strides = multiples(y_image_stride, y_pixel_stride, y_channel_stride, CHANNELS_LAST, VECTOR_OUT)
    residual_strides = multiples(
        residual_image_stride, residual_pixel_stride, residual_channel_stride, CHANNELS_LAST, VECTOR_OUT
    )
    if CHANNELS_LAST:
        out_channels = multiple(out_channels, VECTOR_OUT)
    else:
        pixels = multiple(pixels, VECTOR_OUT)

    out_blocks = tl.cdiv(out_channels, BLOCK_N)
    out_channel = tl.program_id(0) % out_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    out_here = out_channel < out_channels
    block = tl.program_id(0) // out_blocks
    pixel = tl.arange(0, BLOCK_M)
    if FEW_CHANNELS:  # pixels are a row's
        pixel_blocks = tl.cdiv(out_width, BLOCK_M)
        row = block // pixel_blocks
        x_image = row // (out_pixels // out_width)
        top = row % (out_pixels // out_width) * STRIDE_H - PADDING_H
        column = block % pixel_blocks * BLOCK_M + pixel
        pixels_here = column < out_width
        left = column * STRIDE_W - PADDING_W
        pixel_of_row = tl.cast(row, tl.int64) * out_width
        image = pixel_of_row // pixels
        first = pixel_of_row % pixels + block % pixel_blocks * BLOCK_M
    else:
        pixel_blocks = tl.cdiv(pixels, BLOCK_M)
        image = block // pixel_blocks
        first = block % pixel_blocks * BLOCK_M
        pixels_here = first + pixel < pixels
        # Channels_last outputs are one image of all pixels, inputs never are.
        x_image = image + (first + pixel) // out_pixels
        top = (first + pixel) % out_pixels // out_width * STRIDE_H - PADDING_H
        left = (first + pixel) % out_width * STRIDE_W - PADDING_W
    windows = tl.cast(x_image, tl.int64) * x_image_stride + tl.cast(top, tl.int64) * x_row_stride
    windows = x_ptr + windows + tl.cast(left, tl.int64) * x_column_stride
    k = tl.arange(0, BLOCK_K)
    weight_ptr += tl.cast(out_channel, tl.int64)[None, :] * weight_stride
    wait_for_inputs(DEPENDENT)

    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    CHANNEL_BLOCKS: tl.constexpr = 1 if FEW_CHANNELS else (CHANNELS + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    STEPS: tl.constexpr = (TAPS * CHANNELS + BLOCK_K - 1) // BLOCK_K if FEW_CHANNELS else TAPS * CHANNEL_BLOCKS
    for step in range(STEPS):
        if FEW_CHANNELS:
            row_k = step * BLOCK_K + k
            tap = row_k // CHANNELS
            channel = row_k % CHANNELS
            dy = tap // KERNEL_W * DILATION_H
            dx = (tap % KERNEL_W * DILATION_W)[:, None]
            k_here = row_k < TAPS * CHANNELS
            inside = (k_here & within(top + dy, height))[:, None] & pixels_here[None, :]
            dy = dy[:, None]
        else:
            tap = step // CHANNEL_BLOCKS
            channel = step % CHANNEL_BLOCKS * BLOCK_K + k
            row_k = tap * CHANNELS + channel
            k_here = channel < CHANNELS
            dy = tap // KERNEL_W * DILATION_H
            dx = tap % KERNEL_W * DILATION_W
            inside = (pixels_here & within(top + dy, height))[None, :] & k_here[:, None]
        inside &= within(left[None, :] + dx, width)
        offset = tl.cast(dy, tl.int64) * x_row_stride + tl.cast(dx, tl.int64) * x_column_stride
        pointers = windows[None, :] + offset + (tl.cast(channel, tl.int64) * x_channel_stride)[:, None]
        x = tl.load(pointers, inside, 0.0)
        weight = tl.load(weight_ptr + row_k[:, None], k_here[:, None] & out_here[None, :], 0.0)
        total = tl.dot(tl.trans(x), weight, total, input_precision=PRECISION, out_dtype=ACC)

    if bias_ptr is not None:
        total += tl.load(bias_ptr + out_channel, out_here, 0.0).to(ACC)[None, :]
    outputs_here = pixels_here[:, None] & out_here[None, :]
    if residual_ptr is not None:
        at = block_pointers(residual_ptr, residual_strides, image, first, pixel, out_channel, CHANNELS_LAST)
        total += tl.load(at, outputs_here, 0.0).to(ACC)
    y = activate(total, ACTIVATION).to(y_ptr.dtype.element_ty)
    at = block_pointers(y_ptr, y_strides, image, first, pixel, out_channel, CHANNELS_LAST)
    tl.store(at, y, outputs_here)


def pack_conv2d(weight: torch.Tensor) -> torch.Tensor:
    """Weights (K, C, kH, kW) as `conv2d` reads them: (K, kH·kW·C), rows padded with zeros to whole vectors."""
    rows = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return F.pad(rows, (0, -rows.shape[1] % _ROW)).contiguous()


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """``activation(F.conv2d(input, weight, bias, stride, padding, dilation) + residual)``.

    Products of float32 are as exact as torch.backends.cudnn.conv.fp32_precision asks for.

    Args:
        input: (N, C, H, W), of any strides.
        weight: what `pack_conv2d` made of weights (K, C, kH, kW).
        bias: (K,).
        kernel: (kH, kW).
        padding: before the first row and column; the size of ``out`` says what is behind the last.
        residual: like ``out``.
        out: (N, K, H', W'), where to write: channels of a larger channels_last image, or images of their own.
    """
    channels, (batch, out_channels, out_height, out_width) = input.shape[1], out.shape
    channels_last = is_channels_last(out)
    residual = None if residual is None else arrange_pixels(residual, channels_last)
    images, pixels = batch, out_height * out_width
    if channels_last:
        images, pixels = 1, batch * pixels
    together = input.stride(1) == 1
    rows = (batch * out_height, out_width) if channels < _MANY else (images, pixels)
    tile = conv2d_tile(chip_of(input), input.element_size(), *rows, channels, out_channels, kernel, together)
    if images * pixels:
        with on_device(input):
            _forward[(tile.programs,)](
                *(input, weight, bias, residual, out),
                *(*input.shape[2:], out_width, out_height * out_width, pixels, out_channels, weight.stride(0)),
                *input.stride(),
                *((0, 0, 0) if residual is None else pixel_strides(residual, channels_last)),
                *pixel_strides(out, channels_last),
                CHANNELS=channels,
                KERNEL_H=kernel[0],
                KERNEL_W=kernel[1],
                STRIDE_H=stride[0],
                STRIDE_W=stride[1],
                PADDING_H=padding[0],
                PADDING_W=padding[1],
                DILATION_H=dilation[0],
                DILATION_W=dilation[1],
                ACTIVATION=activation,
                PRECISION=dot_precision(input.dtype),
                CHANNELS_LAST=channels_last,
                VECTOR_IN=vector_of(True, input) if together else 1,
                VECTOR_OUT=vector_of_pixels(channels_last, *(t for t in (out, residual) if t is not None)),
                BLOCK_M=tile.pixels,
                BLOCK_N=tile.out_channels,
                BLOCK_K=tile.channels,
                FEW_CHANNELS=channels < _MANY,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **launch_options(),
            )
    return out
