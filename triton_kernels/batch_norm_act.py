"""Batch norm and activation, in inference and training, forward and backward.

Images are a matrix of pixels × channels (channels_last: one of all pixels; contiguous: one each). Statistics are
Welford's, in float32 (float64 for float64): each element of a tile has a mean and a sum of squared deviations of its
own, which are merged at the end, so that nothing cancels. The backward pass computes the activation's input again from
the batch norm's, which is all that is kept.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from .activations import activate, activation_gradient
from .common import (
    accumulator,
    arrange_pixels,
    block_pointers,
    is_channels_last,
    multiple,
    multiples,
    on_device,
    pixel_strides,
    square_root,
    vector_of_pixels,
)
from .tiles import ImageTile, chip_of, image_tile


@triton.jit
def _affine(
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channel,
    here,
    EPS: tl.constexpr,
    VARIANCE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean, 1 / standard deviation, weight and bias of some channels."""
    mean = tl.load(mean_ptr + channel, here, 0.0).to(ACC)
    rstd = tl.load(rstd_ptr + channel, here, 1.0).to(ACC)
    if VARIANCE:
        rstd = 1.0 / square_root(rstd + EPS)
    weight = tl.full(mean.shape, 1.0, ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + channel, here, 0.0).to(ACC)
    bias = tl.zeros(mean.shape, ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, here, 0.0).to(ACC)
    return mean, rstd, weight, bias


@triton.jit
def _forward(
    x_ptr,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    images,
    pixels,
    channels,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    y_image_stride,
    y_pixel_stride,
    y_channel_stride,
    EPS: tl.constexpr,
    VARIANCE: tl.constexpr,
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
    image = block // pixel_blocks
    first = block % pixel_blocks * BLOCK_P
    pixel = tl.arange(0, BLOCK_P)
    here = (first + pixel < pixels)[:, None] & (channel < channels)[None, :]
    mean, rstd, weight, bias = _affine(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, channel < channels, EPS, VARIANCE, ACC
    )
    x = tl.load(block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST), here, 0.0).to(ACC)
    y = activate((x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :], ACTIVATION)
    pointers = block_pointers(y_ptr, y_strides, image, first, pixel, channel, CHANNELS_LAST)
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), here)


@triton.jit
def _statistics(
    x_ptr,
    mean_ptr,
    squares_ptr,
    count_ptr,
    images,
    pixels,
    channels,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of the pixels of one part: mean and sum of squared deviations (parts, C), and their number (parts,)."""
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_pixel_stride, x_channel_stride, CHANNELS_LAST, VECTOR)
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // channel_blocks
    parts = tl.num_programs(0) // channel_blocks
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    pixel = tl.arange(0, BLOCK_P)
    means = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    counts = tl.zeros([BLOCK_P], ACC)
    for block in range(part, images * pixel_blocks, parts):
        image = block // pixel_blocks
        first = block % pixel_blocks * BLOCK_P
        pixels_here = first + pixel < pixels
        here = pixels_here[:, None] & (channel < channels)[None, :]
        x = tl.load(block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST), here, 0.0).to(ACC)
        counts += tl.where(pixels_here, 1.0, 0.0).to(ACC)
        deviations = tl.where(here, x - means, 0.0)
        means += deviations * (1.0 / tl.maximum(counts, 1.0))[:, None]
        squares += deviations * (x - means)
    count = tl.sum(counts, 0)
    mean = tl.sum(means * counts[:, None], 0) / count
    deviations = means - mean[None, :]
    square = tl.sum(squares + deviations * deviations * counts[:, None], 0)
    tl.store(mean_ptr + part * channels + channel, mean, channel < channels)
    tl.store(squares_ptr + part * channels + channel, square, channel < channels)
    tl.store(count_ptr + part, count)


@triton.jit
def _merge_statistics(
    means_ptr,
    squares_ptr,
    counts_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    parts,
    channels,
    pixels,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of all parts: mean, 1 / standard deviation, and what the running statistics become.

    Numbers come as float32, so float64's momentum in two of them: it may change at each call, which a constant's
    kernel would be compiled anew for.
    """
    ACC: tl.constexpr = means_ptr.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < channels
    mean = tl.zeros([BLOCK_C], ACC)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        counts = tl.load(counts_ptr + part, part < parts, 0.0)
        both = (part < parts)[:, None] & here[None, :]
        means = tl.load(means_ptr + part[:, None] * channels + channel[None, :], both, 0.0)
        mean += tl.sum(means * (counts / pixels)[:, None], 0)
    square = tl.zeros([BLOCK_C], ACC)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        counts = tl.load(counts_ptr + part, part < parts, 0.0)
        both = (part < parts)[:, None] & here[None, :]
        offsets = part[:, None] * channels + channel[None, :]
        deviations = tl.where(both, tl.load(means_ptr + offsets, both, 0.0) - mean[None, :], 0.0)
        squares = tl.load(squares_ptr + offsets, both, 0.0)
        square += tl.sum(squares + deviations * deviations * counts[:, None], 0)
    variance = square / pixels
    tl.store(mean_ptr + channel, mean, here)
    tl.store(rstd_ptr + channel, 1.0 / square_root(variance + EPS), here)
    if batches_ptr is not None:
        share = 1.0 / tl.load(batches_ptr).to(ACC)
    else:
        share = tl.zeros([], ACC) + momentum + momentum_rest
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + channel, here, 0.0).to(ACC)
        new = old + share * (mean - old)
        tl.store(running_mean_ptr + channel, new.to(running_mean_ptr.dtype.element_ty), here)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + channel, here, 0.0).to(ACC)
        new = old + share * (square / tl.maximum(pixels - 1, 1) - old)
        tl.store(running_var_ptr + channel, new.to(running_var_ptr.dtype.element_ty), here)


@triton.jit
def _backward(
    grad_y_ptr,
    x_ptr,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    sums_ptr,
    grad_x_ptr,
    images,
    pixels,
    channels,
    y_image_stride,
    y_pixel_stride,
    y_channel_stride,
    x_image_stride,
    x_pixel_stride,
    x_channel_stride,
    grad_x_image_stride,
    grad_x_pixel_stride,
    grad_x_channel_stride,
    count,
    EPS: tl.constexpr,
    VARIANCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """With ``partial_ptr``: of each part the sums of the inner gradient and of its product with x̂, (parts, 2, C).

    With ``grad_x_ptr``: the input's gradient; through the statistics too, if ``sums_ptr`` brings both sums (2, C).
    """
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_pixel_stride, x_channel_stride, CHANNELS_LAST, VECTOR)
    y_strides = multiples(y_image_stride, y_pixel_stride, y_channel_stride, CHANNELS_LAST, VECTOR)
    grad_x_strides = multiples(grad_x_image_stride, grad_x_pixel_stride, grad_x_channel_stride, CHANNELS_LAST, VECTOR)
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR)
    else:
        pixels = multiple(pixels, VECTOR)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    channels_here = channel < channels
    part = tl.program_id(0) // channel_blocks
    parts = tl.num_programs(0) // channel_blocks
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    pixel = tl.arange(0, BLOCK_P)
    mean, rstd, weight, bias = _affine(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, channel, channels_here, EPS, VARIANCE, ACC
    )
    if sums_ptr is not None:
        mean_gradient = tl.load(sums_ptr + channel, channels_here, 0.0) / count
        mean_product = tl.load(sums_ptr + channels + channel, channels_here, 0.0) / count
    gradients = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    products = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    blocks, step = images * pixel_blocks, parts
    if partial_ptr is None:  # a program each: said so that no address is kept in registers for a next one
        blocks, step = part + 1, 1
    for block in range(part, blocks, step):
        image = block // pixel_blocks
        first = block % pixel_blocks * BLOCK_P
        here = (first + pixel < pixels)[:, None] & channels_here[None, :]
        x = tl.load(block_pointers(x_ptr, x_strides, image, first, pixel, channel, CHANNELS_LAST), here, 0.0).to(ACC)
        normal = (x - mean[None, :]) * rstd[None, :]
        pointers = block_pointers(grad_y_ptr, y_strides, image, first, pixel, channel, CHANNELS_LAST)
        gradient = tl.load(pointers, here, 0.0).to(ACC)
        gradient = activation_gradient(gradient, normal * weight[None, :] + bias[None, :], ACTIVATION)
        if partial_ptr is not None:
            gradients += tl.where(here, gradient, 0.0)
            products += tl.where(here, gradient * normal, 0.0)
        if grad_x_ptr is not None:
            if sums_ptr is not None:
                gradient -= mean_gradient[None, :] + normal * mean_product[None, :]
            gradient *= (rstd * weight)[None, :]
            pointers = block_pointers(grad_x_ptr, grad_x_strides, image, first, pixel, channel, CHANNELS_LAST)
            tl.store(pointers, gradient.to(grad_x_ptr.dtype.element_ty), here)
    if partial_ptr is not None:
        partial_ptr += part * 2 * channels + channel
        tl.store(partial_ptr, tl.sum(gradients, 0), channels_here)
        tl.store(partial_ptr + channels, tl.sum(products, 0), channels_here)


def batch_norm_act(
    input: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> torch.Tensor:
    """`mobilenet_fast.reference.batch_norm_act`, whose checks its arguments have passed."""
    return _normalise(input, running_mean, running_var, weight, bias, eps, activation, variance=True)


def batch_norm_act_training(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    num_batches_tracked: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``activation(F.batch_norm(..., training=True))``, which moves the running statistics by ``momentum`` of the way.

    Args:
        momentum: None for the mean over all batches, by ``num_batches_tracked``, which has counted this one already.

    Returns:
        The output, and mean and 1 / standard deviation, (C,), for the backward pass.
    """
    channels_last = is_channels_last(input)
    input = arrange_pixels(input, channels_last)
    images, pixels, channels = _matrix(input, channels_last)
    tile = image_tile(channels_last, input.element_size(), pixels, channels)
    channel_blocks = tile.channel_blocks(channels)
    parts = _parts(input, tile, images, pixels, channel_blocks)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("batch_norm_act_training: momentum None needs num_batches_tracked, got None")
    statistics = [None if t is None else t.contiguous() for t in (running_mean, running_var)]
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if input.numel() == 0:  # which moves no statistics
        mean, rstd = torch.zeros((2, channels), dtype=dtype, device=input.device)
        return torch.empty_like(input), mean, rstd
    means, squares = torch.empty((2, parts, channels), dtype=dtype, device=input.device)
    counts = torch.empty(parts, dtype=dtype, device=input.device)
    mean, rstd = torch.empty((2, channels), dtype=dtype, device=input.device)
    with on_device(input):
        _statistics[(parts * channel_blocks,)](
            *(input, means, squares, counts, images, pixels, channels),
            *pixel_strides(input, channels_last),
            CHANNELS_LAST=channels_last,
            VECTOR=vector_of_pixels(channels_last, input),
            BLOCK_P=tile.pixels,
            BLOCK_C=tile.channels,
            num_warps=tile.warps,
        )
        _merge_statistics[(triton.cdiv(channels, 32),)](
            *(means, squares, counts, mean, rstd, *statistics),
            None if momentum is not None else num_batches_tracked,
            *(parts, channels, images * pixels),
            *_in_float32(0.0 if momentum is None else momentum),
            EPS=eps,
            BLOCK_PARTS=32,
            BLOCK_C=32,
        )
    for given, moved in zip((running_mean, running_var), statistics, strict=True):
        if moved is not given:
            given.copy_(moved)
    return _normalise(input, mean, rstd, weight, bias, eps, activation, variance=False), mean, rstd


def batch_norm_act_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    training: bool = True,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias. After evaluation ``rstd`` is the variance, and ``training`` False."""
    channels_last = is_channels_last(input)
    input, grad_output = arrange_pixels(input, channels_last), arrange_pixels(grad_output, channels_last)
    images, pixels, channels = _matrix(input, channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    grad_input = torch.empty_like(input, memory_format=wanted)
    # Contiguous rows of 16-bit types may have to be loaded one by one: no more of them than of float32.
    tile = image_tile(
        channels_last, input.element_size() if channels_last else max(4, input.element_size()), pixels, channels
    )
    channel_blocks = tile.channel_blocks(channels)
    parts = _parts(input, tile, images, pixels, channel_blocks)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    partial = torch.empty((parts, 2, channels), dtype=dtype, device=input.device)

    def launch(parts: int, partial: torch.Tensor | None, sums: torch.Tensor | None, grad_input: torch.Tensor | None):
        if not parts:
            return
        with on_device(input):
            _backward[(parts * channel_blocks,)](
                *(grad_output, input, mean, rstd, weight, bias, partial, sums, grad_input),
                *(images, pixels, channels),
                *pixel_strides(grad_output, channels_last),
                *pixel_strides(input, channels_last),
                *((0, 0, 0) if grad_input is None else pixel_strides(grad_input, channels_last)),
                images * pixels,
                EPS=eps,
                VARIANCE=not training,
                ACTIVATION=activation,
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of_pixels(channels_last, input, grad_output),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
            )

    launch(parts, partial, None, None)
    sums = partial.sum(0)
    launch(images * tile.pixel_blocks(pixels), None, sums if training else None, grad_input)
    return grad_input, sums[1], sums[0]


def _normalise(input, mean, spread, weight, bias, eps, activation, variance) -> torch.Tensor:
    channels_last = is_channels_last(input)
    output = torch.empty_like(input, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    input = arrange_pixels(input, channels_last)
    images, pixels, channels = _matrix(input, channels_last)
    tile = image_tile(channels_last, input.element_size(), pixels, channels)
    grid = images * tile.pixel_blocks(pixels) * tile.channel_blocks(channels)
    if grid:
        with on_device(input):
            _forward[(grid,)](
                *(input, mean, spread, weight, bias, output, images, pixels, channels),
                *pixel_strides(input, channels_last),
                *pixel_strides(output, channels_last),
                EPS=eps,
                VARIANCE=variance,
                ACTIVATION=activation,
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of_pixels(channels_last, input, output),
                BLOCK_P=tile.pixels,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
            )
    return output


def _in_float32(value: float) -> tuple[float, float]:
    """It rounded to float32, and the rest of it."""
    value = float(value)  # of numpy's and PyTorch's numbers too
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return rounded, value - rounded


def _matrix(tensor: torch.Tensor, channels_last: bool) -> tuple[int, int, int]:
    """Images, pixels of each, channels."""
    n, c, h, w = tensor.shape
    return (1, n * h * w, c) if channels_last else (n, h * w, c)


def _parts(input: torch.Tensor, tile: ImageTile, images: int, pixels: int, channel_blocks: int) -> int:
    """Over how many programs a channel block's sums are dealt: eight a multiprocessor in all."""
    return min(images * tile.pixel_blocks(pixels), triton.cdiv(8 * chip_of(input).multiprocessors, channel_blocks))
