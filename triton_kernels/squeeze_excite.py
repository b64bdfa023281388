"""Squeeze-and-excitation: sums over pixels, two small layers, and the gate applied; and the sums of its gradients.

A depthwise convolution that makes the sums itself (``with_sums``), and a pointwise convolution that applies the gate as
it reads its input, leave only the two layers to do here; then no pass over the image is squeeze-and-excitation's own.
The backward pass reads image and gradient once, for the sums of both, and then the gradient once more, by `epilogue`.
"""

from __future__ import annotations

import math

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
    vector_of_pixels,
    wait_for_inputs,
)
from .epilogue import epilogue
from .pool2d import parts_of_sums, sum_pixels
from .tiles import chip_of, image_tile, linear_tile, power_of_2

# Elements of a weight's row that are loaded together, by their bytes: 16 bytes, but of float64, where that spills.
_TOGETHER = {2: 8, 4: 4, 8: 1}


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
    weight_stride,
    pixels,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """``ACTIVATION(x.sum(parts) / pixels @ weight.T + bias)`` of x (N, parts, C), weight (O, C).

    Products are of the weights' type, as PyTorch's are. ``PARTS`` of an image are loaded at once.
    """
    ACC: tl.constexpr = accumulator(weight_ptr.dtype.element_ty)
    channels = multiple(channels, VECTOR)
    weight_stride = multiple(weight_stride, VECTOR)
    out_blocks = tl.cdiv(out_channels, BLOCK_O)
    out_channel = tl.program_id(0) % out_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    out_here = (out_channel < out_channels)[None, :]
    image = tl.program_id(0) // out_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptr += (tl.cast(image, tl.int64) * parts * channels)[:, None]
    weight_ptr += out_channel[None, :] * weight_stride
    total = tl.zeros([BLOCK_N, BLOCK_O], ACC)
    share = tl.full([], 1.0, ACC) / pixels
    wait_for_inputs(DEPENDENT)
    for first in range(0, channels, BLOCK_K):
        channel = first + k
        here = (image < images)[:, None] & (channel < channels)[None, :]
        x = tl.zeros([BLOCK_N, BLOCK_K], ACC)
        for first_part in range(0, parts, PARTS):
            for i in tl.static_range(PARTS):
                part = first_part + i
                x += tl.load(x_ptr + (part * channels + channel)[None, :], here & (part < parts), 0.0).to(ACC)
        weight = tl.load(weight_ptr + channel[:, None], (channel < channels)[:, None] & out_here, 0.0)
        total = tl.dot((x * share).to(weight.dtype), weight, total, input_precision=PRECISION, out_dtype=ACC)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + out_channel, out_channel < out_channels, 0.0).to(ACC)[None, :]
    y_ptr += image[:, None] * out_channels + out_channel[None, :]
    y = activate(total, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr, y, (image < images)[:, None] & out_here)


@triton.jit
def _backward_sums(
    x_ptr,
    grad_ptr,
    sums_ptr,
    products_ptr,
    pixels,
    channels,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    grad_image_stride,
    grad_pixel_stride,
    grad_channel_stride,
    parts,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Over the pixels of each part of an image, the sums of x and of x · grad: (N, parts, C) each."""
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_pixel_stride, x_channel_stride, CHANNELS_LAST, VECTOR)
    grad_strides = multiples(grad_image_stride, grad_pixel_stride, grad_channel_stride, CHANNELS_LAST, VECTOR)
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // channel_blocks % parts
    image = tl.program_id(0) // (channel_blocks * parts)
    pixel = tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    products = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(part * BLOCK_P, pixels, parts * BLOCK_P):
        here = (first + pixel < pixels)[:, None] & (channel < channels)[None, :]
        x = tl.load(block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST), here, 0.0).to(ACC)
        pointers = block_pointers(grad_ptr, grad_strides, image, first, pixel, channel, CHANNELS_LAST)
        sums += x
        products += x * tl.load(pointers, here, 0.0).to(ACC)
    offset = (tl.cast(image, tl.int64) * parts + part) * channels + channel
    tl.store(sums_ptr + offset, tl.sum(sums, 0), channel < channels)
    tl.store(products_ptr + offset, tl.sum(products, 0), channel < channels)


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
                weight = weight.flatten(1)
                weight = weight if weight.stride(1) == 1 else weight.contiguous()
                out_channels, in_channels = weight.shape
                tile = linear_tile(chip_of(sums), weight.element_size(), batch, in_channels, out_channels)
                _layer[(triton.cdiv(batch, tile.rows) * triton.cdiv(out_channels, tile.out_channels),)](
                    *(x, weight, bias, y, batch, count, in_channels, out_channels, weight.stride(0), divisor),
                    ACTIVATION=activation,
                    PRECISION=dot_precision(weight.dtype),
                    VECTOR=math.gcd(_TOGETHER[weight.element_size()], in_channels, weight.stride(0)),
                    PARTS=min(4, power_of_2(count)),
                    BLOCK_N=tile.rows,
                    BLOCK_K=tile.channels,
                    BLOCK_O=tile.out_channels,
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                    **launch_options(),
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


def sums_of_products(input: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over (H, W), the sums of the input and of its product with the gradient, in parts: (N, parts, C) each."""
    channels_last = is_channels_last(input)
    x, grad = arrange_pixels(input, channels_last), arrange_pixels(grad_output, channels_last)
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    tile = image_tile(channels_last, x.element_size(), pixels, channels)
    parts = parts_of_sums(x, tile)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums, products = torch.empty((2, batch, parts, channels), dtype=dtype, device=x.device)
    grid = batch * parts * tile.channel_blocks(channels)
    if grid:
        with on_device(x):
            _backward_sums[(grid,)](
                *(x, grad, sums, products, pixels, channels),
                *image_strides(x, channels_last),
                *image_strides(grad, channels_last),
                parts,
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of_pixels(channels_last, x, grad),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
            )
    return sums, products
