"""Pointwise convolution: a matrix product of pixels × channels with the weights, and what surrounds it in a block.

Channels_last images are one matrix of all their pixels, unless they have a gate each; contiguous ones are a matrix
each, stored by columns. The gate is applied to the input as it is loaded; bias, residual and activation to the sums
before they are stored. Channels are few
and pixels many, so a program keeps its weights, if they fit a block, and goes through several blocks of pixels.
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
    dot_precision,
    image_strides,
    is_channels_last,
    launch_options,
    multiple,
    multiples,
    on_device,
    output_format,
    pixel_strides,
    vector_of_pixels,
    wait_for_inputs,
)
from .tiles import chip_of, pointwise_tile


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    y_ptr,
    images,
    pixels,
    channels,
    out_channels,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    residual_image_stride,
    residual_pixel_stride,
    residual_channel_stride,
    y_image_stride,
    y_pixel_stride,
    y_channel_stride,
    weight_out_stride,
    weight_in_stride,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    ACC: tl.constexpr = accumulator(y_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_pixel_stride, x_channel_stride, CHANNELS_LAST, VECTOR_IN)
    y_strides = multiples(y_image_stride, y_pixel_stride, y_channel_stride, CHANNELS_LAST, VECTOR_OUT)
    residual_strides = multiples(
        residual_image_stride, residual_pixel_stride, residual_channel_stride, CHANNELS_LAST, VECTOR_OUT
    )
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR_IN)
        out_channels = multiple(out_channels, VECTOR_OUT)
    else:
        pixels = multiple(pixels, VECTOR_OUT)

    out_blocks = tl.cdiv(out_channels, BLOCK_N)
    out_channel = tl.program_id(0) % out_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    out_here = out_channel < out_channels
    k = tl.arange(0, BLOCK_K)
    weight_ptr += out_channel[None, :] * weight_out_stride
    if ONE_K:
        weights_here = (k < channels)[:, None] & out_here[None, :]
        weight = tl.load(weight_ptr + k[:, None] * weight_in_stride, weights_here, 0.0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + out_channel, out_here, 0.0).to(ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + out_channel, out_here, 0.0).to(ACC)

    pixel_blocks = tl.cdiv(pixels, BLOCK_M)
    wait_for_inputs(DEPENDENT)
    first_block, blocks, step = tl.program_id(0) // out_blocks, images * pixel_blocks, tl.num_programs(0) // out_blocks
    if not ONE_K:  # one block of pixels, said so that no address is kept in registers for a next one
        blocks, step = first_block + 1, 1
    for block in range(first_block, blocks, step):
        image = block // pixel_blocks
        first = block % pixel_blocks * BLOCK_M
        pixel = tl.arange(0, BLOCK_M)
        pixels_here = first + pixel < pixels
        total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for first_k in range(0, BLOCK_K if ONE_K else channels, BLOCK_K):
            channel = first_k + k
            inputs_here = pixels_here[:, None] & (channel < channels)[None, :]
            pointers = block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST)
            x = tl.load(pointers, inputs_here, 0.0)
            if gate_ptr is not None:
                gate = tl.load(gate_ptr + tl.cast(image, tl.int64) * channels + channel, channel < channels, 0.0)[
                    None, :
                ]
                x = x * gate if x.dtype != tl.bfloat16 else (x.to(ACC) * gate.to(ACC)).to(x.dtype)
            if not ONE_K:
                weights_here = (channel < channels)[:, None] & out_here[None, :]
                weight = tl.load(weight_ptr + channel[:, None] * weight_in_stride, weights_here, 0.0)
            total = tl.dot(x, weight, total, input_precision=PRECISION, out_dtype=ACC)
        if scale_ptr is not None:
            total *= scale[None, :]
        if bias_ptr is not None:
            total += bias[None, :]
        outputs_here = pixels_here[:, None] & out_here[None, :]
        if residual_ptr is not None:
            at = block_pointers(residual_ptr, residual_strides, image, first, pixel, out_channel, CHANNELS_LAST)
            total += tl.load(at, outputs_here, 0.0).to(ACC)
        y = activate(total, ACTIVATION).to(y_ptr.dtype.element_ty)
        at = block_pointers(y_ptr, y_strides, image, first, pixel, out_channel, CHANNELS_LAST)
        tl.store(at, y, outputs_here)


def pointwise_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mobilenet_fast.reference.pointwise_conv2d`, whose checks its arguments have passed.

    Products of float32 are as exact as torch.backends.cudnn.conv.fp32_precision asks for. ``out``: where to write.
    """
    batch, channels, height, width = input.shape
    out_channels = weight.shape[0]
    if out is None:
        shape = (batch, out_channels, height, width)
        out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=output_format(input, weight))
    channels_last = is_channels_last(out)
    input = arrange_pixels(input, channels_last)
    residual = None if residual is None else arrange_pixels(residual, channels_last)
    gate = None if gate is None else gate.reshape(batch, channels).contiguous()
    images, pixels, strides = batch, height * width, image_strides
    if channels_last and gate is None:  # then nothing tells the images apart
        images, pixels, strides = 1, batch * pixels, pixel_strides
    chip = chip_of(input)
    vector = vector_of_pixels(channels_last, *(t for t in (out, residual) if t is not None))
    tile = pointwise_tile(chip, input.element_size(), images, pixels, channels, out_channels, vector > 1)
    one_k = channels <= tile.channels
    out_blocks, blocks = triton.cdiv(out_channels, tile.out_channels), images * triton.cdiv(pixels, tile.pixels)
    programs = max(out_blocks, tile.programs) if one_k else blocks * out_blocks
    if pixels * images:
        with on_device(input):
            _forward[(programs,)](
                *(input, weight, scale, bias, gate, residual, out),
                *(images, pixels, channels, out_channels),
                *strides(input, channels_last),
                *((0, 0, 0) if residual is None else strides(residual, channels_last)),
                *strides(out, channels_last),
                *(weight.stride(0), weight.stride(1)),
                ACTIVATION=activation,
                PRECISION=dot_precision(input.dtype),
                CHANNELS_LAST=channels_last,
                VECTOR_IN=vector_of_pixels(channels_last, input),
                VECTOR_OUT=vector,
                BLOCK_M=tile.pixels,
                BLOCK_N=tile.out_channels,
                BLOCK_K=tile.channels,
                ONE_K=one_k,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **launch_options(),
            )
    return out
