"""A depthwise convolution fused with the pointwise convolution before it, after it, or both, of channels_last images.

The expanded tensor of the large maps is most of what a network moves, and never leaves the chip here. A program
computes ``ROWS`` output rows × ``BLOCK_W`` columns, hidden channels a block at a time: it expands the pixels that a tap
of the filter needs by a matrix product, adds them, weighed, to the depthwise sums, and multiplies these into the
projection's. Registers hold no neighbours, so each tap expands its pixels anew, (R + K - 1)·K / R products instead of
one: the tensor cores have the time, where the inputs are narrow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import activate
from .common import (
    accumulator,
    arrange,
    dot_precision,
    launch_options,
    multiple,
    multiples,
    on_device,
    row_pointers,
    vector_of,
    wait_for_inputs,
)
from .depthwise_conv2d import add_to, reaches
from .tiles import chip_of, inverted_residual_tile


@triton.jit
def _forward(
    x_ptr,
    expand_ptr,
    expand_bias_ptr,
    depthwise_ptr,
    depthwise_bias_ptr,
    project_ptr,
    project_bias_ptr,
    residual_ptr,
    y_ptr,
    sums_ptr,
    height,
    width,
    channels,
    hidden,
    out_height,
    out_width,
    out_channels,
    x_image_stride,
    x_row_stride,
    x_column_stride,
    residual_image_stride,
    residual_row_stride,
    residual_column_stride,
    y_image_stride,
    y_row_stride,
    y_column_stride,
    depthwise_channel_stride,
    depthwise_row_stride,
    depthwise_column_stride,
    EXPAND_STRIDE: tl.constexpr,
    PROJECT_STRIDE: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    EXPAND_ACTIVATION: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr,
    PROJECT_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    ACC: tl.constexpr = accumulator(DTYPE)
    x_strides = multiples(x_image_stride, x_column_stride, 1, True, VECTOR_IN)
    y_strides = multiples(y_image_stride, y_column_stride, 1, True, VECTOR_OUT)
    residual_strides = multiples(residual_image_stride, residual_column_stride, 1, True, VECTOR_OUT)
    x_row_stride = multiple(x_row_stride, VECTOR_IN)
    y_row_stride = multiple(y_row_stride, VECTOR_OUT)
    residual_row_stride = multiple(residual_row_stride, VECTOR_OUT)
    channels = multiple(channels, VECTOR_IN)
    out_channels = multiple(out_channels, VECTOR_OUT)
    if expand_ptr is None:
        hidden = multiple(hidden, VECTOR_IN)
    if project_ptr is None:
        hidden = multiple(hidden, VECTOR_OUT)

    program = tl.program_id(0)
    first_hidden = 0
    if project_ptr is None:  # blocks of hidden channels have programs of their own
        hidden_blocks = tl.cdiv(hidden, BLOCK_C)
        first_hidden = program % hidden_blocks * BLOCK_C
        program //= hidden_blocks
    column_blocks = tl.cdiv(out_width, BLOCK_W)
    strips = tl.cdiv(out_height, ROWS)
    part = program % (column_blocks * strips)
    column = part % column_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    first_row = part // column_blocks * ROWS
    image = tl.cast(program // (column_blocks * strips), tl.int64)
    columns_here = column < out_width
    in_channel = tl.arange(0, BLOCK_IN)
    out_channel = tl.arange(0, BLOCK_OUT)

    wait_for_inputs(DEPENDENT)
    projected = ()
    for _ in tl.static_range(ROWS):
        projected += (tl.zeros([BLOCK_W, BLOCK_OUT], ACC),)
    for offset in range(0, BLOCK_C if project_ptr is None else hidden, BLOCK_C):
        channel = first_hidden + offset + tl.arange(0, BLOCK_C)
        channels_here = channel < hidden
        if expand_ptr is not None:
            pointers = expand_ptr + channel[None, :] * EXPAND_STRIDE + in_channel[:, None]
            expand = tl.load(pointers, channels_here[None, :] & (in_channel < channels)[:, None], 0.0)
            expand_bias = tl.load(expand_bias_ptr + channel, channels_here, 0.0).to(ACC)[None, :]
        totals = ()
        for _ in tl.static_range(ROWS):
            totals += (tl.zeros([BLOCK_W, BLOCK_C], ACC),)
        for kx in tl.static_range(KERNEL_W):
            taps = ()
            for ky in tl.static_range(KERNEL_H):
                pointers = depthwise_ptr + channel * depthwise_channel_stride
                pointers += ky * depthwise_row_stride + kx * depthwise_column_stride
                taps += (tl.load(pointers, channels_here, 0.0).to(ACC)[None, :],)
            x_column = column * STRIDE_W + (kx * DILATION_W - PADDING_W)
            columns_inside = columns_here & (x_column >= 0) & (x_column < width)
            for dy in tl.static_range((ROWS - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1):
                if reaches(dy, ROWS, STRIDE_H, DILATION_H, KERNEL_H):
                    x_row = first_row * STRIDE_H + (dy - PADDING_H)
                    inside = columns_inside & (x_row >= 0) & (x_row < height)
                    if expand_ptr is not None:
                        here = inside[:, None] & (in_channel < channels)[None, :]
                        pointers = row_pointers(
                            x_ptr, x_strides, x_row_stride, image, x_row, x_column, in_channel, True
                        )
                        x = tl.load(pointers, here, 0.0)
                        x = tl.dot(x, expand, expand_bias.broadcast_to(BLOCK_W, BLOCK_C), PRECISION, out_dtype=ACC)
                        # In the type that the tensor would have been stored in.
                        x = activate(x, EXPAND_ACTIVATION).to(DTYPE).to(ACC)
                        x = tl.where(inside[:, None], x, 0.0)
                    else:
                        here = inside[:, None] & channels_here[None, :]
                        pointers = row_pointers(x_ptr, x_strides, x_row_stride, image, x_row, x_column, channel, True)
                        x = tl.load(pointers, here, 0.0).to(ACC)
                    for row in tl.static_range(ROWS):
                        for ky in tl.static_range(KERNEL_H):
                            if row * STRIDE_H + ky * DILATION_H == dy:
                                totals = add_to(totals, row, x * taps[ky])
        depthwise_bias = tl.load(depthwise_bias_ptr + channel, channels_here, 0.0).to(ACC)[None, :]
        if project_ptr is not None:
            pointers = project_ptr + out_channel[None, :] * PROJECT_STRIDE + channel[:, None]
            project = tl.load(pointers, channels_here[:, None] & (out_channel < out_channels)[None, :], 0.0)
        sums = tl.zeros([BLOCK_W, BLOCK_C], ACC)
        for row in tl.static_range(ROWS):
            y = activate(totals[row] + depthwise_bias, DEPTHWISE_ACTIVATION)
            if project_ptr is not None:
                projected = add_to(projected, row, tl.dot(y.to(DTYPE), project, None, PRECISION, out_dtype=ACC))
            else:
                y_row = first_row + row
                inside = columns_here & (y_row < out_height)
                here = inside[:, None] & channels_here[None, :]
                pointers = row_pointers(y_ptr, y_strides, y_row_stride, image, y_row, column, channel, True)
                tl.store(pointers, y.to(DTYPE), here)
                if sums_ptr is not None:
                    sums += tl.where(here, y, 0.0)
        if sums_ptr is not None:
            pointers = sums_ptr + (image * (column_blocks * strips) + part) * hidden + channel
            tl.store(pointers, tl.sum(sums, 0), channels_here)

    if project_ptr is not None:
        out_here = out_channel < out_channels
        project_bias = tl.load(project_bias_ptr + out_channel, out_here, 0.0).to(ACC)[None, :]
        for row in tl.static_range(ROWS):
            y_row = first_row + row
            here = (columns_here & (y_row < out_height))[:, None] & out_here[None, :]
            y = projected[row] + project_bias
            if residual_ptr is not None:
                pointers = row_pointers(
                    residual_ptr, residual_strides, residual_row_stride, image, y_row, column, out_channel, True
                )
                y += tl.load(pointers, here, 0.0).to(ACC)
            y = activate(y, PROJECT_ACTIVATION).to(DTYPE)
            pointers = row_pointers(y_ptr, y_strides, y_row_stride, image, y_row, column, out_channel, True)
            tl.store(pointers, y, here)


def inverted_residual(
    input: torch.Tensor,
    expand: tuple[torch.Tensor, torch.Tensor] | None,
    depthwise: tuple[torch.Tensor, torch.Tensor],
    project: tuple[torch.Tensor, torch.Tensor] | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activations: tuple[str, str, str],
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
    with_sums: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``project(depthwise(expand(input))) + residual``, each a convolution, its bias, and its activation.

    Args:
        input: (N, C, H, W).
        expand: weight (E, C, 1, 1) and bias (E,), or None where the input is the depthwise convolution's.
        depthwise: weight (E, 1, kH, kW) and bias (E,).
        project: weight (K, E, 1, 1) and bias (K,), or None where the depthwise convolution's output is wanted.
        stride, padding, dilation: of the depthwise convolution; padding before the first row and column.
        activations: those after the expansion, the depthwise convolution, and the sum with the residual.
        out: channels_last, where to write; its size says how much padding is behind the last row and column.
        with_sums: without ``project``: whether to return the sums over (H, W) as well, in parts: (N, parts, E).
    """
    weight, depthwise_bias = depthwise
    batch, channels, height, width = input.shape
    hidden, (kernel_h, kernel_w) = weight.shape[0], weight.shape[2:]
    _, out_channels, out_h, out_w = out.shape
    input = arrange(input, True)
    residual = None if residual is None else arrange(residual, True)
    expand, project = (layer and (_rows(layer[0]), layer[1]) for layer in (expand, project))
    tile = inverted_residual_tile(
        chip_of(input),
        input.element_size(),
        channels if expand else 0,
        hidden,
        out_channels if project else 0,
        tuple(out.shape),
        (kernel_h, kernel_w),
        stride,
    )
    parts = tile.strips(out_h) * tile.blocks(out_w)
    sums = None
    if with_sums:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        sums = torch.empty((batch, parts, hidden), dtype=dtype, device=input.device)
    grid = batch * parts * (1 if project else triton.cdiv(hidden, tile.hidden))
    if grid:
        with on_device(input):
            _forward[(grid,)](
                input,
                *(expand or (None, None)),
                *(weight, depthwise_bias),
                *(project or (None, None)),
                *(residual, out, sums),
                *(height, width, channels, hidden, out_h, out_w, out_channels),
                *_strides(input),
                *((0, 0, 0) if residual is None else _strides(residual)),
                *_strides(out),
                *(weight.stride(0), weight.stride(2), weight.stride(3)),
                EXPAND_STRIDE=expand[0].stride(0) if expand else 0,  # constants take no registers
                PROJECT_STRIDE=project[0].stride(0) if project else 0,
                KERNEL_H=kernel_h,
                KERNEL_W=kernel_w,
                STRIDE_H=stride[0],
                STRIDE_W=stride[1],
                PADDING_H=padding[0],
                PADDING_W=padding[1],
                DILATION_H=dilation[0],
                DILATION_W=dilation[1],
                EXPAND_ACTIVATION=activations[0],
                DEPTHWISE_ACTIVATION=activations[1],
                PROJECT_ACTIVATION=activations[2],
                PRECISION=dot_precision(input.dtype),
                VECTOR_IN=vector_of(True, input),
                VECTOR_OUT=vector_of(True, *(t for t in (out, residual) if t is not None)),
                ROWS=tile.rows,
                BLOCK_W=tile.columns,
                BLOCK_IN=tile.channels,
                BLOCK_C=tile.hidden,
                BLOCK_OUT=tile.out_channels,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **launch_options(),
            )
    return (out, sums) if with_sums else out


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight if the channels that it reads lie side by side, else a copy."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(2), tensor.stride(3)
