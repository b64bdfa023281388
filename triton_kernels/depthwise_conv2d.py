"""Depthwise convolution, forward and backward.

A thread computes a patch of ``ROWS`` × ``COLUMNS`` outputs. It goes through the columns of inputs that the patch needs,
loads those of a column, each once, and adds them to all sums that they belong to: of a K×K filter of stride 1, a patch
of R × C loads (R + K - 1)·(C + K - 1) inputs instead of R·C·K·K. What takes the time is not only memory: loads,
predicates, addresses, and conversions are instructions as well. The sums stay in registers, in float32 (float64 for
float64). A program takes ``PATCHES`` patches × ``BLOCK_C`` channels. Channels are the tile's inner dimension where they
lie together in memory (channels_last), columns are where those do (contiguous); the compiler makes a kernel of each.
The filter's strides are constants, as they belong to the layer: that saves registers, and loads of a tap twice.

The gradients of input and weight share one kernel. With stride S, input pixels fall into S·S classes by what is left of
their coordinates, and those of a class meet the same taps of the filter: for them the gradient is a convolution of
stride 1 with these taps, and the weight's gradient sums products of the same two tiles. A thread has a patch here as
well: it holds the inputs of one, goes through the columns of the outputs' gradients that meet it, and adds each to the
sums of the input's gradient and, multiplied by inputs, to those of the taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import activate
from .common import (
    accumulator,
    arrange,
    is_channels_last,
    launch_options,
    multiple,
    multiples,
    on_device,
    output_format,
    patch_pointers,
    strides,
    vector_of,
    wait_for_inputs,
    within,
)
from .tiles import (
    chip_of,
    depthwise_backward_parts,
    depthwise_backward_tile,
    depthwise_tile,
    is_large,
)


@triton.constexpr_function
def reaches(dy, rows, stride, dilation, taps):
    """Whether the input row ``dy`` rows below an output's first meets a tap of one of so many output rows."""
    return any(row * stride + ky * dilation == dy for row in range(rows) for ky in range(taps))


@triton.constexpr_function
def tap_of(distance, index, stride, dilation, taps):
    """The tap of output ``index`` that an input so far from the first output's first meets, or -1."""
    tap, rest = divmod(distance - index * stride, dilation)
    return tap if rest == 0 and 0 <= tap < taps else -1


@triton.constexpr_function
def tap_back(dy, offset, stride, dilation, taps):
    """The tap by which an output row meets an input row that lies ``offset - dy * stride`` below its first, or -1."""
    tap, rest = divmod(offset - dy * stride, dilation)
    return tap if rest == 0 and 0 <= tap < taps else -1


@triton.constexpr_function
def reaches_back(dy, offset, rows, stride, dilation, taps):
    """Whether it meets one of so many input rows of a class."""
    return any((dy - row) * stride == offset - ky * dilation for row in range(rows) for ky in range(taps))


@triton.jit
def add_to(sums, INDEX: tl.constexpr, value):
    """The tuple with ``value`` added to one of its elements."""
    return sums[:INDEX] + (sums[INDEX] + value,) + sums[INDEX + 1 :]


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    sums_ptr,
    height,
    width,
    out_height,
    out_width,
    out_channels,
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    y_image_stride,
    y_channel_stride,
    y_row_stride,
    y_column_stride,
    WEIGHT_CHANNEL_STRIDE: tl.constexpr,
    WEIGHT_ROW_STRIDE: tl.constexpr,
    WEIGHT_COLUMN_STRIDE: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOOP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    ACC: tl.constexpr = accumulator(y_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_column_stride, x_channel_stride, CHANNELS_LAST, VECTOR)
    y_strides = multiples(y_image_stride, y_column_stride, y_channel_stride, CHANNELS_LAST, VECTOR)
    x_row_stride = multiple(x_row_stride, VECTOR)
    y_row_stride = multiple(y_row_stride, VECTOR)
    if CHANNELS_LAST:
        out_channels = multiple(out_channels, VECTOR)
    else:
        out_width = multiple(out_width, VECTOR)

    channel_blocks = tl.cdiv(out_channels, BLOCK_C)
    strips = tl.cdiv(out_height, ROWS)
    if CHANNELS_LAST:  # patches are numbered through all strips
        column_blocks = tl.cdiv(out_width, COLUMNS)
        parts = tl.cdiv(strips * column_blocks, PATCHES)
    else:  # vectors of columns want to stay in a row
        column_blocks = tl.cdiv(out_width, PATCHES * COLUMNS)
        parts = strips * column_blocks
    program = tl.program_id(0)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= channel_blocks
    part = program % parts
    image = tl.cast(program // parts, tl.int64)
    if CHANNELS_LAST:
        patch = part * PATCHES + tl.arange(0, PATCHES)
        row = patch // column_blocks * ROWS
        column = patch % column_blocks * COLUMNS
    else:
        row = tl.full([PATCHES], part // column_blocks * ROWS, tl.int32)
        column = (part % column_blocks * PATCHES + tl.arange(0, PATCHES)) * COLUMNS
    channels_here = channel < out_channels

    # Sums begin with the bias, unless they are scaled first.
    start = tl.zeros([PATCHES, BLOCK_C], ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, channels_here, 0.0).to(ACC)[None, :]
        if scale_ptr is None:
            start += bias
    totals = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        totals += (start,)
    x_row = row * STRIDE_H - PADDING_H
    x_column = column * STRIDE_W - PADDING_W
    x_channel = channel // MULTIPLIER
    first = patch_pointers(x_ptr, x_strides, x_row_stride, image, x_row, x_column, x_channel, CHANNELS_LAST)
    filter_ptr = weight_ptr + channel * WEIGHT_CHANNEL_STRIDE
    wait_for_inputs(DEPENDENT)
    if LOOP:  # of a large filter: its columns one after another, each of which meets the patch's only one
        tl.static_assert(COLUMNS == 1)
        for kx in range(KERNEL_W):
            dx = kx * DILATION_W
            columns_inside = within(x_column + dx, width)
            xs = ()
            for dy in tl.static_range((ROWS - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1):
                x = start
                if reaches(dy, ROWS, STRIDE_H, DILATION_H, KERNEL_H):
                    inside = columns_inside & within(x_row + dy, height)
                    inside = inside[:, None] & channels_here[None, :]
                    pointers = first + (tl.cast(dy, tl.int64) * x_row_stride + dx * x_strides[1])
                    x = tl.load(pointers, inside, 0.0).to(ACC)
                xs += (x,)
            for ky in tl.static_range(KERNEL_H):
                pointers = filter_ptr + ky * WEIGHT_ROW_STRIDE + kx * WEIGHT_COLUMN_STRIDE
                tap = tl.load(pointers, channels_here, 0.0).to(ACC)[None, :]
                for i in tl.static_range(ROWS):
                    totals = add_to(totals, i, xs[i * STRIDE_H + ky * DILATION_H] * tap)
    else:
        for dx in tl.static_range((COLUMNS - 1) * STRIDE_W + (KERNEL_W - 1) * DILATION_W + 1):
            if reaches(dx, COLUMNS, STRIDE_W, DILATION_W, KERNEL_W):
                columns_inside = within(x_column + dx, width)
                xs = ()
                for dy in tl.static_range((ROWS - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1):
                    x = start  # a row that nobody meets
                    if reaches(dy, ROWS, STRIDE_H, DILATION_H, KERNEL_H):
                        inside = columns_inside & within(x_row + dy, height)
                        inside = inside[:, None] & channels_here[None, :]
                        pointers = first + (tl.cast(dy, tl.int64) * x_row_stride + dx * x_strides[1])
                        x = tl.load(pointers, inside, 0.0).to(ACC)
                    xs += (x,)
                for j in tl.static_range(COLUMNS):
                    if tap_of(dx, j, STRIDE_W, DILATION_W, KERNEL_W) >= 0:
                        tap_ptr = filter_ptr + tap_of(dx, j, STRIDE_W, DILATION_W, KERNEL_W) * WEIGHT_COLUMN_STRIDE
                        for ky in tl.static_range(KERNEL_H):
                            tap = tl.load(tap_ptr + ky * WEIGHT_ROW_STRIDE, channels_here, 0.0).to(ACC)[None, :]
                            for i in tl.static_range(ROWS):
                                totals = add_to(totals, i * COLUMNS + j, xs[i * STRIDE_H + ky * DILATION_H] * tap)

    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, channels_here, 0.0).to(ACC)[None, :]
    first = patch_pointers(y_ptr, y_strides, y_row_stride, image, row, column, channel, CHANNELS_LAST)
    sums = tl.zeros([PATCHES, BLOCK_C], ACC)  # of a thread's own patches: other threads are asked once, at the end
    for j in tl.static_range(COLUMNS):
        columns_here = column + j < out_width
        for i in tl.static_range(ROWS):
            y = totals[i * COLUMNS + j]
            if scale_ptr is not None:
                y *= scale
                if bias_ptr is not None:
                    y += bias
            y = activate(y, ACTIVATION)
            here = (columns_here & (row + i < out_height))[:, None] & channels_here[None, :]
            pointers = first + (tl.cast(i, tl.int64) * y_row_stride + j * y_strides[1])
            tl.store(pointers, y.to(y_ptr.dtype.element_ty), here)
            if sums_ptr is not None:
                sums += tl.where(here, y, 0.0)
    if sums_ptr is not None:
        sums_ptr += (image * parts + part) * out_channels
        tl.store(sums_ptr + channel, tl.sum(sums, 0), channels_here)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    grad_y_ptr,
    grad_x_ptr,
    partial_ptr,
    images,
    height,
    width,
    channels,
    out_height,
    out_width,
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    y_image_stride,
    y_channel_stride,
    y_row_stride,
    y_column_stride,
    grad_x_image_stride,
    grad_x_channel_stride,
    grad_x_row_stride,
    grad_x_column_stride,
    WEIGHT_CHANNEL_STRIDE: tl.constexpr,
    WEIGHT_ROW_STRIDE: tl.constexpr,
    WEIGHT_COLUMN_STRIDE: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of input and weight, each if there is a pointer for it. ``partial_ptr``: (parts, M, kH, kW, C)."""
    ACC: tl.constexpr = accumulator(grad_y_ptr.dtype.element_ty)
    x_strides = multiples(x_image_stride, x_column_stride, x_channel_stride, CHANNELS_LAST, VECTOR)
    y_strides = multiples(y_image_stride, y_column_stride, y_channel_stride, CHANNELS_LAST, VECTOR)
    grad_x_strides = multiples(grad_x_image_stride, grad_x_column_stride, grad_x_channel_stride, CHANNELS_LAST, VECTOR)
    x_row_stride = multiple(x_row_stride, VECTOR)
    y_row_stride = multiple(y_row_stride, VECTOR)
    grad_x_row_stride = multiple(grad_x_row_stride, VECTOR)
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR)
    else:
        width = multiple(width, VECTOR)

    channel_blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    channels_here = channel < channels
    part = tl.program_id(0) // channel_blocks
    parts = tl.num_programs(0) // channel_blocks
    # Of a class of input pixels: those whose coordinates leave the same rest divided by the stride.
    strips = tl.cdiv(tl.cdiv(height, STRIDE_H), ROWS)
    if CHANNELS_LAST:
        column_blocks = tl.cdiv(tl.cdiv(width, STRIDE_W), COLUMNS)
        blocks = tl.cdiv(strips * column_blocks, PATCHES)
    else:
        column_blocks = tl.cdiv(tl.cdiv(width, STRIDE_W), PATCHES * COLUMNS)
        blocks = strips * column_blocks
    # The outputs' rows and columns that meet a patch, from its own on.
    FIRST_DY: tl.constexpr = (PADDING_H - (KERNEL_H - 1) * DILATION_H) // STRIDE_H
    END_DY: tl.constexpr = (STRIDE_H - 1 + PADDING_H) // STRIDE_H + ROWS
    FIRST_DX: tl.constexpr = (PADDING_W - (KERNEL_W - 1) * DILATION_W) // STRIDE_W
    END_DX: tl.constexpr = (STRIDE_W - 1 + PADDING_W) // STRIDE_W + COLUMNS

    zeros = tl.zeros([PATCHES, BLOCK_C], ACC)
    weight_sums = ()
    if partial_ptr is not None:
        for _ in tl.static_range(MULTIPLIER * KERNEL_H * KERNEL_W):
            weight_sums += (zeros,)
    for tile in range(part, images * blocks, parts):
        image = tl.cast(tile // blocks, tl.int64)
        block = tile % blocks
        if CHANNELS_LAST:
            patch = block * PATCHES + tl.arange(0, PATCHES)
            row = patch // column_blocks * ROWS
            column = patch % column_blocks * COLUMNS
        else:
            row = tl.full([PATCHES], block // column_blocks * ROWS, tl.int32)
            column = (block % column_blocks * PATCHES + tl.arange(0, PATCHES)) * COLUMNS
        for py in tl.static_range(STRIDE_H):
            for px in tl.static_range(STRIDE_W):
                x_row = row * STRIDE_H + py
                x_column = column * STRIDE_W + px
                if partial_ptr is not None:
                    first = patch_pointers(
                        x_ptr, x_strides, x_row_stride, image, x_row, x_column, channel, CHANNELS_LAST
                    )
                xs = ()
                totals = ()
                for i in tl.static_range(ROWS):
                    for j in tl.static_range(COLUMNS):
                        totals += (zeros,)
                        if partial_ptr is not None:
                            here = within(x_row + i * STRIDE_H, height) & within(x_column + j * STRIDE_W, width)
                            pointers = first + (
                                tl.cast(i * STRIDE_H, tl.int64) * x_row_stride + j * STRIDE_W * x_strides[1]
                            )
                            xs += (tl.load(pointers, here[:, None] & channels_here[None, :], 0.0).to(ACC),)
                for m in tl.static_range(MULTIPLIER):
                    y_channel = channel * MULTIPLIER + m
                    first = patch_pointers(
                        grad_y_ptr, y_strides, y_row_stride, image, row, column, y_channel, CHANNELS_LAST
                    )
                    filter_ptr = weight_ptr + y_channel * WEIGHT_CHANNEL_STRIDE
                    for dx in tl.static_range(FIRST_DX, END_DX):
                        if reaches_back(dx, px + PADDING_W, COLUMNS, STRIDE_W, DILATION_W, KERNEL_W):
                            columns_inside = within(column + dx, out_width)
                            grads = ()
                            for dy in tl.static_range(FIRST_DY, END_DY):
                                grad = zeros  # a row that nobody meets
                                if reaches_back(dy, py + PADDING_H, ROWS, STRIDE_H, DILATION_H, KERNEL_H):
                                    inside = columns_inside & within(row + dy, out_height)
                                    pointers = first + (tl.cast(dy, tl.int64) * y_row_stride + dx * y_strides[1])
                                    grad = tl.load(pointers, inside[:, None] & channels_here[None, :], 0.0).to(ACC)
                                grads += (grad,)
                            for j in tl.static_range(COLUMNS):
                                if tap_back(dx - j, px + PADDING_W, STRIDE_W, DILATION_W, KERNEL_W) >= 0:
                                    for ky in tl.static_range(KERNEL_H):
                                        if (py + PADDING_H - ky * DILATION_H) % STRIDE_H == 0:
                                            if grad_x_ptr is not None:
                                                pointers = filter_ptr + ky * WEIGHT_ROW_STRIDE
                                                pointers += WEIGHT_COLUMN_STRIDE * tap_back(
                                                    dx - j, px + PADDING_W, STRIDE_W, DILATION_W, KERNEL_W
                                                )
                                                tap = tl.load(pointers, channels_here, 0.0).to(ACC)[None, :]
                                            for i in tl.static_range(ROWS):
                                                grad = grads[
                                                    i + (py + PADDING_H - ky * DILATION_H) // STRIDE_H - FIRST_DY
                                                ]
                                                if grad_x_ptr is not None:
                                                    totals = add_to(totals, i * COLUMNS + j, grad * tap)
                                                if partial_ptr is not None:
                                                    weight_sums = add_to(
                                                        weight_sums,
                                                        (m * KERNEL_H + ky) * KERNEL_W
                                                        + tap_back(
                                                            dx - j, px + PADDING_W, STRIDE_W, DILATION_W, KERNEL_W
                                                        ),
                                                        grad * xs[i * COLUMNS + j],
                                                    )
                if grad_x_ptr is not None:
                    first = patch_pointers(
                        grad_x_ptr, grad_x_strides, grad_x_row_stride, image, x_row, x_column, channel, CHANNELS_LAST
                    )
                    for i in tl.static_range(ROWS):
                        for j in tl.static_range(COLUMNS):
                            here = within(x_row + i * STRIDE_H, height) & within(x_column + j * STRIDE_W, width)
                            pointers = first + (
                                tl.cast(i * STRIDE_H, tl.int64) * grad_x_row_stride + j * STRIDE_W * grad_x_strides[1]
                            )
                            total = totals[i * COLUMNS + j].to(grad_x_ptr.dtype.element_ty)
                            tl.store(pointers, total, here[:, None] & channels_here[None, :])
    if partial_ptr is not None:
        for k in tl.static_range(MULTIPLIER * KERNEL_H * KERNEL_W):
            pointers = partial_ptr + (part * (MULTIPLIER * KERNEL_H * KERNEL_W) + k) * channels + channel
            tl.store(pointers, tl.sum(weight_sums[k], 0), channels_here)


def depthwise_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    scale: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    with_sums: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`mobilenet_fast.reference.depthwise_conv2d`, whose checks its arguments have passed.

    Args:
        padding: before the first row and column; with ``out``, whose size says what is behind the last.
        out: where to write, contiguous or channels_last along its inner dimension.
        with_sums: whether to return the outputs' sums over (H, W) as well, in parts: (N, parts, C·M).
    """
    (kernel_h, kernel_w), (batch, channels, height, width) = weight.shape[2:], input.shape
    if out is None:
        out_h = (height + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
        out_w = (width + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
        shape = (batch, weight.shape[0], out_h, out_w)
        out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=output_format(input, weight))
    channels_last = is_channels_last(out)
    input = arrange(input, channels_last)
    _, out_channels, out_h, out_w = out.shape
    tile = depthwise_tile(
        chip_of(input), channels_last, input.element_size(), tuple(out.shape), (kernel_h, kernel_w), stride
    )
    sums = None
    if with_sums:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        sums = torch.empty((batch, tile.parts, out_channels), dtype=dtype, device=input.device)
    grid = batch * tile.parts * triton.cdiv(out_channels, tile.channels)
    if grid:
        with on_device(input):
            _forward[(grid,)](
                *(input, weight, scale, bias, out, sums),
                *(height, width, out_h, out_w, out_channels),
                *strides(input, channels_last),
                *strides(out, channels_last),
                *(weight.stride(0), weight.stride(2), weight.stride(3)),
                MULTIPLIER=out_channels // channels,
                KERNEL_H=kernel_h,
                KERNEL_W=kernel_w,
                STRIDE_H=stride[0],
                STRIDE_W=stride[1],
                PADDING_H=padding[0],
                PADDING_W=padding[1],
                DILATION_H=dilation[0],
                DILATION_W=dilation[1],
                ACTIVATION=activation,
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of(channels_last, input, out),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                PATCHES=tile.patches,
                BLOCK_C=tile.channels,
                LOOP=is_large((kernel_h, kernel_w)),
                num_warps=tile.warps,
                **launch_options(),
            )
    return (out, sums) if with_sums else out


def depthwise_conv2d_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    need_input: bool = True,
    need_weight: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``F.conv2d(input, weight, None, stride, padding, dilation, groups=C)`` for those that are needed.

    Weight's is summed in the same order each time, on the same chip. Those of large filters are PyTorch's, as a thread
    has no room for a sum a tap: their order is cuDNN's.
    """
    (kernel_h, kernel_w), (batch, channels, height, width) = weight.shape[2:], input.shape
    multiplier = weight.shape[0] // channels
    if is_large((kernel_h, kernel_w)):
        return _large_backward(grad_output, input, weight, (stride, padding, dilation), [need_input, need_weight])
    channels_last = output_format(input, weight) == torch.channels_last
    grad_output, input = arrange(grad_output, channels_last), arrange(input, channels_last)
    # Dense, whatever strides the input has: of pixels that share memory, each has a gradient of its own.
    grad_input = torch.empty_like(input, memory_format=output_format(input, weight)) if need_input else None
    tile = depthwise_backward_tile(
        *(chip_of(input), channels_last, input.element_size(), tuple(input.shape)),
        *((kernel_h, kernel_w), multiplier, stride),
    )
    channel_blocks, parts = triton.cdiv(channels, tile.channels), batch * tile.parts
    if need_weight:
        parts = depthwise_backward_parts(chip_of(input), tile, batch, channels)
    partial = None
    if need_weight:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        partial = torch.empty((parts, multiplier, kernel_h, kernel_w, channels), dtype=dtype, device=input.device)
    if parts and (need_input or need_weight):
        with on_device(input):
            _backward[(parts * channel_blocks,)](
                *(input, weight, grad_output, grad_input, partial),
                *(batch, height, width, channels, *grad_output.shape[2:]),
                *strides(input, channels_last),
                *strides(grad_output, channels_last),
                *(strides(grad_input, channels_last) if need_input else (0, 0, 0, 0)),
                *(weight.stride(0), weight.stride(2), weight.stride(3)),
                MULTIPLIER=multiplier,
                KERNEL_H=kernel_h,
                KERNEL_W=kernel_w,
                STRIDE_H=stride[0],
                STRIDE_W=stride[1],
                PADDING_H=padding[0],
                PADDING_W=padding[1],
                DILATION_H=dilation[0],
                DILATION_W=dilation[1],
                CHANNELS_LAST=channels_last,
                VECTOR=vector_of(channels_last, *(t for t in (input, grad_output, grad_input) if t is not None)),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                PATCHES=tile.patches,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,
            )
    if not need_weight:
        return grad_input, None
    return grad_input, partial.sum(0).permute(3, 0, 1, 2).reshape(weight.shape).to(weight.dtype)


def _large_backward(grad_output, input, weight, geometry, needed):
    """PyTorch's, without padding, of the part of the image that the outputs see and zeros around it."""
    stride, before, dilation = geometry
    pads = []
    for side in (1, 0):  # of the last dimension first, as F.pad wants them
        seen = (grad_output.shape[2 + side] - 1) * stride[side] + (weight.shape[2 + side] - 1) * dilation[side] + 1
        pads += [before[side], seen - before[side] - input.shape[2 + side]]
    dtype = input.dtype if input.is_cuda else torch.promote_types(input.dtype, torch.float32)  # what PyTorch has on CPU
    seen = torch.nn.functional.pad(input.to(dtype), pads)
    of_seen, of_weight, _ = torch.ops.aten.convolution_backward(
        *(grad_output.to(dtype), seen, weight.to(dtype)),
        *(None, stride, (0, 0), dilation, False, (0, 0), input.size(1), [*needed, False]),
    )
    of_input = None
    if needed[0]:
        of_input = torch.nn.functional.pad(of_seen, [-pad for pad in pads])
        of_input = of_input.to(input.dtype, memory_format=output_format(input, weight))
    return of_input, of_weight.to(weight.dtype).contiguous() if needed[1] else None
