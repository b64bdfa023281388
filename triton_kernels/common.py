"""What the kernels and their launchers share."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import triton
import triton.language as tl
from torch._prims_common import suggest_memory_format
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.constexpr_function
def accumulator(dtype):
    """The type that sums of this one are kept in."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def multiple(value, VECTOR: tl.constexpr):
    """``value``, which the launcher knows to be a multiple of VECTOR, in a form in which the compiler knows it too.

    Of arguments it only sees whether 16 divides them, and without that it would load channels of 24 or 40 one by one.
    """
    if VECTOR > 1:
        value = value // VECTOR * VECTOR
    return value


@triton.jit
def multiples(image_stride, pixel_stride, channel_stride, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """The three strides of a tensor, `multiple` but for the inner one, which is 1."""
    if CHANNELS_LAST:
        strides = multiple(image_stride, VECTOR), multiple(pixel_stride, VECTOR), channel_stride
    else:
        strides = multiple(image_stride, VECTOR), pixel_stride, multiple(channel_stride, VECTOR)
    return strides


@triton.jit
def block_pointers(pointer, strides, image, first, pixel, channel, CHANNELS_LAST: tl.constexpr):
    """Pointers to the pixels ``first`` + ``pixel``, a vector, × channels of an image.

    Offsets are of 64 bits where they may be large: images, first pixels, and channels that planes lie between.
    """
    pointer += tl.cast(image, tl.int64) * strides[0] + tl.cast(first, tl.int64) * strides[1]
    if CHANNELS_LAST:
        offset = channel
    else:
        offset = tl.cast(channel, tl.int64) * strides[2]
    return pointer + pixel[:, None] * strides[1] + offset[None, :]


@triton.jit
def row_pointers(pointer, strides, row_stride, image, row, column, channel, CHANNELS_LAST: tl.constexpr):
    """The same of one row of an image: its columns are the pixels."""
    return block_pointers(
        pointer + tl.cast(row, tl.int64) * row_stride, strides, image, 0, column, channel, CHANNELS_LAST
    )


@triton.jit
def patch_pointers(pointer, strides, row_stride, image, row, column, channel, CHANNELS_LAST: tl.constexpr):
    """The same of pixels that each have a row of their own."""
    return (
        row_pointers(pointer, strides, 0, image, 0, column, channel, CHANNELS_LAST)
        + (tl.cast(row, tl.int64) * row_stride)[:, None]
    )


@triton.jit
def within(index, size):
    """Whether 0 <= index < size, in one comparison."""
    return tl.cast(index, tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def square_root(x):
    """Correctly rounded, other than `tl.sqrt` of float32."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


def output_format(*operands: torch.Tensor) -> torch.memory_format:
    """`F.conv2d`'s rule: channels_last if input or weight is."""
    formats = map(suggest_memory_format, operands)
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether channels, rather than columns, lie side by side."""
    return suggest_memory_format(tensor) == torch.channels_last


def arrange(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The tensor itself if its inner dimension has stride 1, else a copy in the layout."""
    inner = 1 if channels_last else 3
    if tensor.stride(inner) == 1 or tensor.size(inner) == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def strides(tensor: torch.Tensor, channels_last: bool) -> list[int]:
    """The strides, 1 for the inner dimension whatever a dimension of size 1 says."""
    result = list(tensor.stride())
    result[1 if channels_last else 3] = 1
    return result


def vector_of(channels_last: bool, *tensors: torch.Tensor) -> int:
    """How many elements, up to 16 bytes, stay together in every row of each tensor: loads may be as wide as this."""
    numbers = [16 // tensors[0].element_size()]
    inner = 1 if channels_last else 3
    for tensor in tensors:
        numbers.append(tensor.size(inner))
        numbers.extend(stride for i, stride in enumerate(tensor.stride()) if i != inner)
    return math.gcd(*numbers)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Kernels run on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def vector_of_pixels(channels_last: bool, *tensors: torch.Tensor) -> int:
    """`vector_of` for kernels that take an image's pixels as one dimension."""
    numbers = [16 // tensors[0].element_size()]
    for tensor in tensors:
        image, pixel, channel = pixel_strides(tensor, channels_last)
        numbers += [tensor.size(1), pixel] if channels_last else [tensor.size(2) * tensor.size(3), image, channel]
    return math.gcd(*numbers)


def pixel_strides(tensor: torch.Tensor, channels_last: bool) -> tuple[int, int, int]:
    """Of image, pixel and channel, of what :func:`arrange_pixels` gives. Channels_last images are one image."""
    n, c, h, w = tensor.shape
    image, channel, row, column = tensor.stride()
    if not channels_last:
        return image, 1, channel
    return 0, column if w > 1 else row if h > 1 else image if n > 1 else c, 1


def image_strides(tensor: torch.Tensor, channels_last: bool) -> tuple[int, int, int]:
    """`pixel_strides`, with the images' own where they are taken one by one."""
    return tensor.stride(0), *pixel_strides(tensor, channels_last)[1:]


def arrange_pixels(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The tensor if its pixels lie at equal distances, from image to image too in channels_last; else a copy."""
    n, c, h, w = tensor.shape
    image, channel, row, column = tensor.stride()
    _, pixel, _ = pixel_strides(tensor, channels_last)
    even = (w == 1 or column == pixel) and (h == 1 or row == pixel * w)
    if channels_last:
        even = even and (n == 1 or image == pixel * h * w) and (c == 1 or channel == 1)
    if even:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Before the first read of what another kernel may have written, where launches are dependent."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


_launches = threading.local()


@contextmanager
def dependent_launches(device: torch.device | None) -> Iterator[None]:
    """Within it kernels begin while those before them still run, and wait for these once they have computed addresses
    and read what weights they keep: programmatic dependent launch, of GPUs that have it. Nothing in it may write to
    weights. Without a device: they do not, in the middle of the others.

    Only if MOBILENET_FAST_DEPENDENT_LAUNCHES is 1: no GPU has been asked yet what it gains, and whether all is right.
    """
    before = getattr(_launches, "dependent", False)
    wanted = os.environ.get("MOBILENET_FAST_DEPENDENT_LAUNCHES") == "1" and device is not None and device.type == "cuda"
    _launches.dependent = wanted and torch.cuda.get_device_capability(device) >= (9, 0)
    try:
        yield
    finally:
        _launches.dependent = before


def launch_options() -> dict[str, bool]:
    """Of a launch whose kernel calls `wait_for_inputs`."""
    return {"DEPENDENT": True, "launch_pdl": True} if getattr(_launches, "dependent", False) else {"DEPENDENT": False}


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: rounded to TF32 where PyTorch's own convolutions may, else as in float32."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "tf32x3"
