"""How large a piece of its work each program of a kernel takes: one function an operation, of shapes alone.

Elements a thread holds, and so registers, follow from the tile: ``rows * columns * channels / (32 * warps)`` sums.
The rules come from counting (bytes a load, sectors of 32 bytes, registers), and in float16 from what an H200 showed
(docs/gpu.md). Where ``python -m benchmarks.gpu_tune --keep`` has measured a faster tile on this chip, that is taken.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Chip:
    """What of a GPU decides how work is dealt."""

    name: str
    multiprocessors: int
    shared_bytes: int  # a program's most
    capability: int = 80  # ten times the compute capability


B200 = Chip("B200", 148, 227 * 1024, 100)
H100 = Chip("H100", 132, 227 * 1024, 90)
A100 = Chip("A100", 108, 163 * 1024, 80)
OTHER = Chip("other", 64, 99 * 1024)


@functools.lru_cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", OTHER.shared_bytes)
    capability = 10 * properties.major + properties.minor
    return Chip(properties.name, properties.multi_processor_count, shared, capability)


def chip_of(tensor: torch.Tensor) -> Chip:
    """The chip that holds the tensor."""
    return _chip(tensor.device.index or 0) if tensor.is_cuda else OTHER


def tuned_path() -> Path:
    """The file of measured tiles: MOBILENET_FAST_TILES, or one in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOBILENET_FAST_TILES") or Path(cache, "mobilenet_fast", "tiles.json"))


def tuned_key(function: str, arguments: tuple) -> str:
    """What a measured tile is for; ``arguments`` begin with the chip. Another Triton may make other code of a tile."""
    chip, *rest = arguments
    return json.dumps([triton.__version__, chip.name, function, *rest])


def _digest(key: str, fields: dict) -> str:
    """Of a tile as this version of the rules wrote it: whatever else is in the file might not be one."""
    return hashlib.sha256(json.dumps([_rules(), key, fields]).encode()).hexdigest()


@functools.cache
def _rules() -> str:
    return Path(__file__).read_text()


@functools.lru_cache(1)
def _tuned() -> dict[str, dict]:
    """Fields of tiles by `tuned_key`."""
    path = tuned_path()
    try:
        entries = _read(path)
    except (OSError, ValueError) as error:
        warnings.warn(f"mobilenet_fast: {path} is not read: {error}", stacklevel=2)
        return {}
    good = {key: tile for key, (tile, digest) in entries.items() if digest == _digest(key, tile)}
    if len(good) < len(entries):
        others = len(entries) - len(good)
        warnings.warn(f"mobilenet_fast: {others} tiles of {path} are of another version and not used", stacklevel=2)
    return good


def _read(path: Path) -> dict[str, tuple[Any, Any]]:
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not all(isinstance(v, list) and len(v) == 2 for v in found.values()):
        raise ValueError("it is no file of tiles")
    return found


def keep_tuned(found: dict[str, Any]) -> None:
    """Adds tiles by `tuned_key` to the file; programs that run already do not look again, but this one.

    Raises:
        ValueError: there is a file that is none of tiles; it stays.
    """
    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            entries = _read(path)
        except ValueError as error:
            raise ValueError(f"mobilenet_fast: {path} can't be added to: {error}; remove it") from None
        for key, tile in found.items():
            entries[key] = [asdict(tile), _digest(key, asdict(tile))]
        written = path.with_name(f"{path.name}.new")
        written.write_text(json.dumps(entries, indent=1))
        written.replace(path)
    _tuned.cache_clear()


def _tunable(kind: type) -> Callable[[Callable], Callable]:
    """The rule, but where a tile of this kind has been measured to be faster for the same arguments."""

    def decorate(rule: Callable) -> Callable:
        @functools.wraps(rule)
        def tile(*arguments: Any) -> Any:
            table = _tuned()
            fields = table and table.get(tuned_key(rule.__name__, arguments))
            return kind(**fields) if fields else rule(*arguments)

        return tile

    return decorate


@dataclass(frozen=True)
class PatchTile:
    """Of a depthwise convolution: a thread's patch of rows × columns, and a program's patches and channels."""

    rows: int
    columns: int
    patches: int
    channels: int
    warps: int
    parts: int  # programs an image, of a block of channels


def power_of_2(size: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, size - 1).bit_length()


def fit(size: int, least: int, most: int) -> int:
    """The block, a power of two, to cut ``size`` into: the largest that wastes at most a sixth, or else the least."""
    choices = [
        block for block in (1 << i for i in range(12)) if least <= block <= max(least, min(most, power_of_2(size)))
    ]
    waste = {block: -(-size // block) * block / size for block in choices}
    return max(block for block in choices if waste[block] <= max(7 / 6, min(waste.values())))


def is_large(kernel: tuple[int, int]) -> bool:
    """Whether a depthwise filter has so many taps that code for each would take minutes to compile."""
    return kernel[0] * kernel[1] > 49


@_tunable(PatchTile)
def depthwise_tile(
    chip: Chip,
    channels_last: bool,
    itemsize: int,
    out_shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
) -> PatchTile:
    """Patches of 4 × 2 outputs: of a 3×3 filter of stride 1 they load, and convert, 3 inputs an output instead of 9.

    A 5×5 filter of stride 1 has the most instructions for what it moves, and takes 7 × 2: 4.7 inputs an output instead
    of 25, and nothing left over on maps of 7, 14, 28 and so on (5 × 2 in float32 and for Blackwell, where more spills);
    so do 3×3 filters on the small ones of these. Of stride 2 it takes 2 × 2: with more rows it spills; in 16-bit types
    its programs are single warps, for which the compiler takes fewer registers. A thread has 16 bytes of
    each pixel where filter, stride and patch are small, else 4 channels: the inputs of a patch's column and the taps
    take the registers. Of contiguous images it has 4 columns, whose neighbours are loaded one by one, of 7 rows, or 2
    columns where 4 spill. Where there would be fewer programs than multiprocessors, they are smaller.
    """
    images, channels, height, width = out_shape
    tall = stride == (1, 1) and (not channels_last or (3 < max(kernel) <= 5 and itemsize < 8))
    large_and_apart = channels_last and max(kernel) > 3 and stride != (1, 1)
    if stride == (1, 1) and max(kernel) <= 5 and height in (7, 14) and itemsize < 8:
        tall = True
    tallest = 5 if (channels_last and max(kernel) > 3 and itemsize > 2) or chip.capability >= 100 else 7
    rows = _even(height, tallest if tall else 2 if large_and_apart else 4)
    strips = -(-height // rows)
    if channels_last:
        elements = min(8 if stride == (1, 1) and max(kernel) <= 3 and not tall else 4, 16 // itemsize)
        columns = 1 if is_large(kernel) else min(2, width)
        block_c = fit(channels, 32 // itemsize, 128 // itemsize)
        if channels % block_c and channels % (block_c // 2) == 0 and block_c * itemsize >= 128:
            block_c //= 2
        patches = fit(strips * -(-width // columns), 1, max(1, 128 * elements // block_c))
        blocks = images * -(-channels // block_c)
        while patches * block_c > 32 * elements and blocks * -(-strips * -(-width // columns) // patches) < (
            chip.multiprocessors
        ):
            patches //= 2
        parts = -(-strips * -(-width // columns) // patches)
    else:
        spills = (max(kernel) > 3 and width % 2) or (itemsize == 2 and chip.capability >= 100)
        elements, columns = 2 if itemsize == 8 or spills else 4, 1
        patches = fit(width, 4, 128)
        block_c = fit(channels, 1, max(1, 128 * elements // patches))
        parts = strips * -(-width // patches)
    warps = _warps(patches * block_c, elements)
    if channels_last and warps > 1 and block_c == 32 * warps:
        warps *= 2  # with as many channels as threads, taps would go from thread to thread through shared memory
    if large_and_apart and itemsize == 2 and warps > 1:
        patches, warps = max(1, patches // warps), 1
        parts = -(-strips * -(-width // columns) // patches)
    return PatchTile(rows, columns, patches, block_c, warps, parts)


@_tunable(PatchTile)
def depthwise_backward_tile(
    chip: Chip,
    channels_last: bool,
    itemsize: int,
    in_shape: tuple[int, ...],
    kernel: tuple[int, int],
    multiplier: int,
    stride: tuple[int, int],
) -> PatchTile:
    """Patches of 7 × 2 inputs, whose gradients' loads serve all their taps, where registers allow: a thread holds for
    each of its channels the patch's inputs and sums, a column of the outputs' gradients, a sum for each tap and the
    taps of a column, beside what the compiler takes for addresses, of which stride 2 has four classes, and contiguous
    images, in which a patch is one column wide, the most. Two channels a thread, where they lie together: four would
    leave eight warps a multiprocessor, not twelve.
    """
    _, channels, height, width = in_shape
    class_height, class_width = -(-height // stride[0]), -(-width // stride[1])
    apart = stride != (1, 1)
    words, taps = max(1, itemsize // 4), multiplier * kernel[0] * kernel[1]
    if not channels_last:
        room = 110
    elif apart:
        room = 100 if taps <= 25 else 70
    else:
        room = 140 if itemsize == 2 and chip.capability < 100 else 136

    def fits(rows: int, columns: int, elements: int) -> bool:
        if rows * columns * taps > 400:  # products, the code of each of which takes time to compile
            return (rows, columns) == (1, 1)
        if channels_last and channels % elements:  # loaded one by one, each with an address of its own
            return False
        return words * elements * (2 * rows * columns + rows + 2 * kernel[0] + taps) <= room

    tall = channels_last and not (itemsize == 2 and chip.capability >= 100)  # where more spills
    tallest, widest = 2 if apart else 7 if tall else 4, 2 if channels_last else 1
    most = 2 if channels_last and not apart else 4
    choices = (
        (rows, columns, elements)
        for patches in (((7, 2), (4, 2), (4, 1), (2, 2)), ((2, 1), (1, 1)))
        for elements in (4, 2, 1)
        for rows, columns in patches
        if rows <= tallest and columns <= widest and elements <= min(most, 16 // itemsize)
    )
    rows, columns, elements = next((choice for choice in choices if fits(*choice)), (1, 1, 1))
    rows, columns = _even(class_height, rows), min(columns, class_width)
    strips = -(-class_height // rows)
    if channels_last:
        block_c = fit(channels, 32 // itemsize, 128 // itemsize)
        patches = fit(strips * -(-class_width // columns), 1, max(1, 128 * elements // block_c))
        parts = -(-strips * -(-class_width // columns) // patches)
    else:
        patches = fit(class_width, 4, 128)
        block_c = fit(channels, 1, max(1, 128 * elements // patches))
        parts = strips * -(-class_width // patches)
    return PatchTile(rows, columns, patches, block_c, _warps(patches * block_c, elements), parts)


def depthwise_backward_parts(chip: Chip, tile: PatchTile, images: int, channels: int) -> int:
    """Into how many parts all images are cut, each with sums of its own for the weight's gradient: eight programs a
    multiprocessor, or one a tile if those are fewer."""
    return min(images * tile.parts, -(-8 * chip.multiprocessors // -(-channels // tile.channels)))


def _even(size: int, most: int) -> int:
    """Rows a strip, so that as many strips as ``most`` rows would give are of almost equal height."""
    return -(-size // -(-size // most))


def _warps(size: int, elements: int) -> int:
    """Of a program whose threads have so many elements of a tile, at most four."""
    return max(1, min(4, size // (32 * elements)))


@dataclass(frozen=True)
class ProductTile:
    """Of a convolution: the block of a matrix product, and how many programs share all blocks, where one that has all
    channels in a block may take several."""

    pixels: int
    out_channels: int
    channels: int
    warps: int
    stages: int
    programs: int


@_tunable(ProductTile)
def pointwise_tile(
    chip: Chip, itemsize: int, images: int, pixels: int, channels: int, out_channels: int, together: bool
) -> ProductTile:
    """All output channels in a block where 128 are enough, so that the input is read once; what a block has too many
    costs the tensor cores little.

    ``together``: whether neighbours of what a thread stores lie together. Of contiguous images of 7 × 7 or 19 × 19
    pixels, and an odd number of channels in channels_last, they don't: each element has an address, and threads have
    32 at most, of few input channels at a time.
    """
    if itemsize == 8:
        block_n = fit(out_channels, 16, 32)
    elif out_channels <= 128:
        block_n = max(16, power_of_2(out_channels))
    else:
        block_n = min((128, 64), key=lambda block: -(-out_channels // block) * block)
    block_k = min(max(16, power_of_2(channels)), (256 if together else 128) // itemsize if itemsize < 8 else 16)
    loops = channels > block_k
    if loops:
        block_k = 128 // itemsize
    out_blocks = -(-out_channels // block_n)
    large = itemsize == 2 and loops and block_n == 128 and together  # 64 sums a thread of eight warps
    if large and chip.capability < 90:  # whose tensor cores take operands from registers
        block_k //= 2
    block_m = 32 if itemsize == 8 else 128 if max(block_n, block_k) <= 64 or large else 64
    while block_m > 16 and (
        images * -(-pixels // block_m) * out_blocks < chip.multiprocessors or block_m >= 2 * pixels
    ):
        block_m //= 2
    stages = 3
    if itemsize < 8 and images * -(-pixels // block_m) * out_blocks < chip.multiprocessors:
        # Too few programs to keep the memory busy: each is to wait for it once or twice.
        while block_n > 16 and images * -(-pixels // block_m) * out_blocks < chip.multiprocessors:
            block_n //= 2
            out_blocks = -(-out_channels // block_n)
        block_k, stages = min(max(16, power_of_2(channels)), 512 // itemsize), 4
        while block_k > 32 and (stages - 1) * (block_m + block_n) * block_k * itemsize > chip.shared_bytes // 2:
            block_k //= 2
    # At most 64 bytes a thread of input, weights and what comes out: more spills.
    warps = 4 if max(block_m * block_n, block_m * block_k, block_n * block_k) * itemsize <= 8192 else 8
    if itemsize == 4 and loops and block_n == 64:
        warps = 8
    blocks = images * -(-pixels // block_m)
    # Programs that keep their weights take several blocks of pixels, as many as make four programs a multiprocessor.
    programs = min(blocks, max(1, 4 * chip.multiprocessors // out_blocks)) if channels <= block_k else blocks
    return ProductTile(block_m, block_n, block_k, warps, stages, max(1, programs) * out_blocks)


@dataclass(frozen=True)
class LinearTile:
    """Of a small linear layer: the block of images × output channels, and input channels at a time."""

    rows: int
    out_channels: int
    channels: int
    warps: int
    stages: int


@_tunable(LinearTile)
def linear_tile(chip: Chip, itemsize: int, images: int, channels: int, out_channels: int) -> LinearTile:
    """What takes the time is the way to the memory and back, once for each turn of the loop over input channels, not
    products: many channels at a time, and as many programs as there are multiprocessors.
    """
    block_k = min(max(16, power_of_2(channels)), 256 // itemsize)
    block_o = min(64, max(16, power_of_2(out_channels))) if itemsize < 8 else 16
    while block_o > 16 and -(-images // 16) * -(-out_channels // block_o) < chip.multiprocessors:
        block_o //= 2
    if block_o <= 16:
        block_k = min(max(16, power_of_2(channels)), 512 // itemsize)
    return LinearTile(16, block_o, block_k, 8 if itemsize == 4 else 4, 3)


@_tunable(ProductTile)
def conv2d_tile(
    chip: Chip,
    itemsize: int,
    images: int,
    pixels: int,
    channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    channels_together: bool,
) -> ProductTile:
    """128 × 128 sums of eight warps are 64 registers a thread, the most that leave room for operands.

    Blocks of fewer than 64 output channels would read so much of the input from shared memory for each product that the
    tensor cores wait. Of the input a line of 128 bytes a pixel, or half of one, at a time; where channels are few or
    lie apart, and elements are loaded one by one, 32 of the window. Where there would be fewer programs than
    multiprocessors, the larger side is halved, as that adds least to what all of them read.
    """
    most = 128 if itemsize < 8 else 32
    block_n = fit(out_channels, min(64, most, max(16, power_of_2(out_channels))), most)
    by_element = not channels_together or channels < 16
    if not by_element:
        block_k = fit(channels, max(16, 64 // itemsize), 128 // itemsize)
    else:
        block_k = max(16, min(32 if itemsize < 8 else 16, power_of_2(channels * kernel[0] * kernel[1])))
    block_m = max(16, min(most, power_of_2(pixels)))

    def programs() -> int:
        return images * -(-pixels // block_m) * -(-out_channels // block_n)

    while programs() < chip.multiprocessors and max(block_m, block_n) > 32:
        if block_m >= block_n:
            block_m //= 2
        else:
            block_n //= 2
    spills = by_element and itemsize == 4 and chip.capability >= 100
    warps = 4 if block_m * block_n <= (2048 if spills else 8192) else 8
    # As many stages as leave room for a second program on the multiprocessor, up to four, and three at the least.
    stages = max(3, min(4, chip.shared_bytes // 2 // ((block_m + block_n) * block_k * itemsize)))
    return ProductTile(block_m, block_n, block_k, warps, stages, programs())


@dataclass(frozen=True)
class ImageTile:
    """Of an operation on pixels × channels: the block that a program takes."""

    pixels: int
    channels: int
    warps: int

    def pixel_blocks(self, pixels: int) -> int:
        return -(-pixels // self.pixels)

    def channel_blocks(self, channels: int) -> int:
        return -(-channels // self.channels)


def image_tile(channels_last: bool, itemsize: int, pixels: int, channels: int) -> ImageTile:
    """Of a pass over images: two vectors of 16 bytes a thread."""
    elements = 128 * 2 * 16 // itemsize
    if channels_last:
        block_c = fit(channels, 32 // itemsize, 128 // itemsize)
        return ImageTile(elements // block_c, block_c, 4)
    block_p = fit(pixels, 4, elements)
    return ImageTile(block_p, fit(channels, 1, elements // block_p), 4)


def pool_tile(channels_last: bool, itemsize: int, pixels: int, channels: int) -> ImageTile:
    """As `image_tile`; in contiguous images, whose pixels are loaded one by one, four a thread: more take registers."""
    return image_tile(channels_last, itemsize if channels_last else 8, pixels, channels)


@dataclass(frozen=True)
class BlockTile:
    """Of a fused block: the piece of the output, all its rows in registers at once, and the blocks of input, hidden and
    output channels."""

    rows: int
    columns: int
    channels: int
    warps: int
    hidden: int
    out_channels: int
    stages: int

    def strips(self, height: int) -> int:
        return -(-height // self.rows)

    def blocks(self, width: int) -> int:
        return -(-width // self.columns)


@_tunable(BlockTile)
def inverted_residual_tile(
    chip: Chip,
    itemsize: int,
    channels: int,
    hidden: int,
    out_channels: int,
    out_shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
) -> BlockTile:
    """Products need 16 of everything. ``channels`` and ``out_channels`` are 0 where there is no such product.

    Of hidden channels no more at a time: with 32, or more rows, the compiler spills. Float64 has blocks to check the
    others, in the interpreter: it spills even so, and no plan has them.
    """
    _, _, height, width = out_shape
    large = max(kernel) > 3
    narrow = large or itemsize == 8 or (channels and out_channels) or out_channels > 32
    columns = fit(width, 16, 16 if narrow else 32)
    project_large = large and not channels
    rows = _even(height, 1 if itemsize == 8 or (itemsize == 2 and project_large) else 2)
    # Threads of several warps wait for each other at every tap, as operands of products pass between them: one, where
    # one has the room, and two where it spills.
    if itemsize == 2:
        fits = stride == (1, 1) if not out_channels else channels and not large and chip.capability < 100
        warps = 1 if fits else 2
    else:
        warps = 4
    stages = 1 if itemsize == 8 or (itemsize == 2 and project_large and chip.capability >= 90) else 2
    in_block, out_block = max(16, power_of_2(channels)), max(16, power_of_2(out_channels))
    return BlockTile(rows, columns, in_block, warps, 16, out_block, stages)
