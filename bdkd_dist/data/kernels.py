"""All that is compiled: decoding, resizing and placing pixels, without Python's global lock.

It stands in one file because numba's cache on disk notices changes only of the file in which a function stands, not
of what the function calls.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Top, left, height, width."""


def _compiled(function: Callable[..., Any]) -> Any:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the home is writable
        return njit(**options)(function)
    cache = compiled._cache
    cache.save_overload = _one_at_a_time(cache.save_overload, Path(cache.cache_path))
    return compiled


def _one_at_a_time(save: Callable[..., None], folder: Path) -> Callable[..., None]:
    """Return what saves compiled code while no other process does.

    numba writes its index, then the file that the index names. Two processes that save code for different types at once
    would give both the same name, and the index could say that one's code is the other's.
    """

    def locked(*arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "kernels.lock"):
            save(*arguments)

    return locked


@_compiled
def reduction_of(height: int, width: int, px: int) -> int:
    """Return by how much a JPEG is reduced while it is decoded, for a box that is resized to ``px`` squared.

    It is the largest of 8, 4, 2 and 1, the scales that libjpeg-turbo decodes fast, that leaves at least ``px`` pixels
    on both sides of the box. Against decoding in full, photographs differ by 1 to 4 grey levels on average (at most 40
    at the 99.9th percentile) and not in brightness; at 2, Pillow's box filter differs as much from the area's mean.
    """
    for reduction in (8, 4, 2):
        if min(height, width) >= reduction * px:
            return reduction
    return 1


@_compiled
def window_of(top: int, left: int, height: int, width: int, reduction: int) -> Box:
    """Return the smallest box of a reduced image's pixels that covers a box of the full image's."""
    first_row, first_column = top // reduction, left // reduction
    end_row = (top + height + reduction - 1) // reduction
    end_column = (left + width + reduction - 1) // reduction
    return first_row, first_column, end_row - first_row, end_column - first_column


@_compiled
def _taps(
    first: int, length: int, count: int, reduction: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the first source pixel, the number of source pixels and their weights for each of ``count`` pixels.

    In units of 1/count of a full pixel, output pixel i covers [first·count + i·length, first·count + (i + 1)·length)
    and source pixel j [j·cell, (j + 1)·cell), where cell = count·reduction: weights are exact shares.
    """
    cell = count * reduction
    firsts = np.empty(count, np.int64)
    numbers = np.empty(count, np.int64)
    weights = np.zeros((count, length // cell + 2), np.float32)
    for i in range(count):
        start = first * count + i * length
        end = start + length
        firsts[i] = start // cell
        numbers[i] = (end + cell - 1) // cell - firsts[i]
        for k in range(numbers[i]):
            left = (firsts[i] + k) * cell
            weights[i, k] = np.float32((min(end, left + cell) - max(start, left)) / length)
    return firsts, numbers, weights


@intrinsic
def _blend(typing: Any, line: Any, weights: Any, number: Any, out: Any) -> Any:
    """Write the weighted sum of ``number`` pixels of three float32 as three bytes; all but ``number`` are addresses.

    The channels are added as one vector (the fourth place is a neighbour's, and dropped), which numba's vectoriser
    does not find: three times as fast.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, weights, number, out = arguments
        lanes = ir.VectorType(ir.FloatType(), 4)
        undefined = ir.Constant(lanes, ir.Undefined)
        line = builder.inttoptr(line, ir.FloatType().as_pointer())
        weights = builder.inttoptr(weights, ir.FloatType().as_pointer())
        out = builder.inttoptr(out, ir.IntType(8).as_pointer())
        total = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.5] * 4))  # rounds
        with cgutils.for_range(builder, number) as loop:
            place = builder.gep(line, [builder.mul(loop.index, loop.index.type(3))])
            pixel = builder.load(builder.bitcast(place, lanes.as_pointer()), align=4)
            weight = builder.insert_element(
                undefined, builder.load(builder.gep(weights, [loop.index])), cgutils.int32_t(0)
            )
            weight = builder.shuffle_vector(weight, undefined, ir.Constant(ir.VectorType(cgutils.int32_t, 4), [0] * 4))
            builder.store(builder.fadd(builder.load(total), builder.fmul(weight, pixel)), total)
        whole = builder.fptosi(builder.load(total), ir.VectorType(cgutils.int32_t, 4))
        for channel in map(cgutils.int32_t, range(3)):
            value = builder.trunc(builder.extract_element(whole, channel), ir.IntType(8))
            builder.store(value, builder.gep(out, [channel]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@_compiled
def resize_area(
    source: Pixels, top: int, left: int, height: int, width: int, mirror: bool, out: Pixels, reduction: int = 1
) -> None:
    """Resize a box of (H, W, 3) pixels to the square ``out``, each output pixel the mean of the area it covers.

    The box is in units of full pixels: each pixel of ``source`` stands for ``reduction`` squared of them. Where it
    shrinks it gives what OpenCV's INTER_AREA gives, in a fraction of the time.
    """
    count = out.shape[0]
    rows, row_numbers, row_weights = _taps(top, height, count, reduction)
    columns, column_numbers, column_weights = _taps(left, width, count, reduction)
    most = column_numbers.max()
    start, end = 3 * columns[0], 3 * (columns[-1] + column_numbers[-1])
    flat = source.reshape(source.shape[0], source.shape[1] * 3)
    line = np.zeros(end - start + 3 * most + 1, np.float32)  # weights beyond a pixel's own are zeros, so may be read
    places = np.int64(line.ctypes.data) + 12 * (columns - columns[0])
    for i in range(count):
        for k in range(row_numbers[i]):
            weight = row_weights[i, k]
            row = flat[rows[i] + k, start:end]
            if k == 0:
                for p in range(end - start):
                    line[p] = weight * np.float32(row[p])
            else:
                for p in range(end - start):
                    line[p] += weight * np.float32(row[p])
        if most == 2:  # a number known to the compiler needs no loop: twice as fast
            _blend_line(places, column_weights, 2, mirror, out[i])
        elif most == 3:
            _blend_line(places, column_weights, 3, mirror, out[i])
        else:
            _blend_line(places, column_weights, most, mirror, out[i])


@_compiled
def _blend_line(
    places: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], number: int, mirror: bool, out: Pixels
) -> None:
    # The weights come as an array: numba frees one whose address alone is still used.
    count, stride = len(places), 4 * weights.shape[1]
    first, address = np.int64(weights.ctypes.data), np.int64(out.ctypes.data)  # uint64 and int64 would add as floats
    for j in range(count):
        to = count - 1 - j if mirror else j
        _blend(places[j], first + j * stride, number, address + 3 * to)


@_compiled
def _copy_window(source: Pixels, top: int, left: int, down: int, right: int, mirror: bool, out: Pixels) -> None:
    """Copy the box of ``out``'s size at (top, left), seen through a window shifted by (down, right)."""
    count = out.shape[0]
    for i in range(count):
        row = i + down
        for j in range(count):
            column = j + right
            to = count - 1 - j if mirror else j
            inside = 0 <= row < count and 0 <= column < count
            for channel in range(3):
                out[i, to, channel] = source[top + row, left + column, channel] if inside else 0


@_compiled
def render(
    source: Pixels, placement: npt.NDArray[np.int32], out: Pixels, reduction: int = 1, row: int = 0, column: int = 0
) -> None:
    """Carry out one row of :data:`bdkd_dist.data.augment.Placements`: (H, W, 3) pixels to (px, px, 3).

    ``source`` may be an image reduced by :func:`reduction_of`, or the part of it that begins at (row, column).
    """
    top, left, height, width, down, right, mirror = placement
    top, left = top - row * reduction, left - column * reduction
    count = out.shape[0]
    if height == count and width == count:
        _copy_window(source, top, left, down, right, mirror != 0, out)
    elif down == 0 and right == 0:
        resize_area(source, top, left, height, width, mirror != 0, out, reduction)
    else:
        resized = np.empty_like(out)
        resize_area(source, top, left, height, width, False, resized, reduction)
        _copy_window(resized, 0, 0, down, right, mirror != 0, out)


# `bdkd_decode` of native/jpeg.c or what stands in for it, found by name when a function that calls it is linked: see
# `ffcv_loader`. Compiled code that held its address could not be kept on disk.
DECODER_SYMBOL = "bdkd_decode"
DECODER_SIGNATURE = types.int32(
    types.uint64, types.uint64, types.int32, types.int32, types.int32, types.uint64, types.uint64
)
_decode = types.ExternalFunction(DECODER_SYMBOL, DECODER_SIGNATURE)


@_compiled
def decode_and_render(
    content: Pixels,
    offsets: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    heights: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
    is_jpeg: npt.NDArray[np.bool_],
    placements: npt.NDArray[np.int32],
    scratch: Pixels,
    images: Pixels,
    failures: npt.NDArray[np.int32],
) -> None:
    """Read N samples that are stored in ``content`` at ``offsets``, and carry out their placements.

    Args:
        content: Flat bytes.
        offsets: (N,): where each sample begins in them.
        sizes: (N,), in bytes.
        heights: (N,), in pixels.
        widths: (N,), in pixels.
        is_jpeg: (N,); the others are raw pixels.
        placements: (N, 7).
        scratch: Room for the pixels of the largest JPEG.
        images: (N, px, px, 3), gets the images.
        failures: (N,), gets what the decoder returned: 0 where all went well.
    """
    window = np.empty(4, np.int32)
    for n in range(len(offsets)):
        stored = content[offsets[n] : offsets[n] + sizes[n]]
        failures[n] = 0
        if not is_jpeg[n]:
            render(stored.reshape(heights[n], widths[n], 3), placements[n], images[n])
            continue
        top, left, height, width = placements[n, 0], placements[n, 1], placements[n, 2], placements[n, 3]
        reduction = reduction_of(height, width, images.shape[1])
        window[0], window[1], window[2], window[3] = window_of(top, left, height, width, reduction)
        failures[n] = _decode(
            stored.ctypes.data, stored.size, heights[n], widths[n], reduction, window.ctypes.data, scratch.ctypes.data
        )
        if failures[n] == 0:
            pixels = scratch[: window[2] * window[3] * 3].reshape(window[2], window[3], 3)
            render(pixels, placements[n], images[n], reduction, window[0], window[1])
