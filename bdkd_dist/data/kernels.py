"""All that is compiled: decoding, resizing and placing pixels, without Python's global lock.

It stands in one file because numba's cache on disk notices changes only of the file in which a function stands, not
of what the function calls.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types

Pixels = npt.NDArray[np.uint8]


def _compiled(function: Callable[..., Any]) -> Any:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the home is writable
        return njit(**options)(function)


@_compiled
def _taps(length: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the first source pixel, the number of source pixels and their weights for each of ``count`` pixels.

    In units of 1/count of a source pixel, output pixel i covers [i·length, (i + 1)·length): weights are exact shares.
    """
    firsts = np.empty(count, np.int64)
    numbers = np.empty(count, np.int64)
    weights = np.zeros((count, length // count + 2), np.float32)
    for i in range(count):
        start, end = i * length, (i + 1) * length
        firsts[i] = start // count
        numbers[i] = (end + count - 1) // count - firsts[i]
        for k in range(numbers[i]):
            left = (firsts[i] + k) * count
            weights[i, k] = np.float32((min(end, left + count) - max(start, left)) / length)
    return firsts, numbers, weights


@_compiled
def resize_area(source: Pixels, top: int, left: int, height: int, width: int, mirror: bool, out: Pixels) -> None:
    """Resize a box of (H, W, 3) pixels to the square ``out``, each output pixel the mean of the area it covers.

    Where it shrinks it gives what OpenCV's INTER_AREA gives, in a third of the time.
    """
    count = out.shape[0]
    rows, row_numbers, row_weights = _taps(height, count)
    columns, column_numbers, column_weights = _taps(width, count)
    flat = source.reshape(source.shape[0], source.shape[1] * 3)
    line = np.empty(width * 3, np.float32)
    for i in range(count):
        for k in range(row_numbers[i]):
            weight = row_weights[i, k]
            row = flat[top + rows[i] + k, left * 3 : (left + width) * 3]
            if k == 0:
                for p in range(width * 3):
                    line[p] = weight * row[p]
            else:
                for p in range(width * 3):
                    line[p] += weight * row[p]
        for j in range(count):
            red = green = blue = np.float32(0.5)  # rounds
            for k in range(column_numbers[j]):
                weight = column_weights[j, k]
                p = 3 * (columns[j] + k)
                red += weight * line[p]
                green += weight * line[p + 1]
                blue += weight * line[p + 2]
            to = count - 1 - j if mirror else j
            out[i, to, 0] = np.uint8(np.int32(red))
            out[i, to, 1] = np.uint8(np.int32(green))
            out[i, to, 2] = np.uint8(np.int32(blue))


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
def render(source: Pixels, placement: npt.NDArray[np.int32], out: Pixels) -> None:
    """Carry out one row of :data:`bdkd_dist.data.augment.Placements`: (H, W, 3) pixels to (px, px, 3)."""
    top, left, height, width, down, right, mirror = placement
    count = out.shape[0]
    if height == count and width == count:
        _copy_window(source, top, left, down, right, mirror != 0, out)
    elif down == 0 and right == 0:
        resize_area(source, top, left, height, width, mirror != 0, out)
    else:
        resized = np.empty_like(out)
        resize_area(source, top, left, height, width, False, resized)
        _copy_window(resized, 0, 0, down, right, mirror != 0, out)


# FFCV's native decoder, found by name when a function that calls it is linked: see `ffcv_loader`. Compiled code that
# held its address could not be kept on disk.
DECODER_SYMBOL = "bdkd_ffcv_imdecode"
_u32, _u64 = types.uint32, types.uint64
_imdecode = types.ExternalFunction(
    DECODER_SYMBOL,
    types.int32(_u64, _u64, _u32, _u32, _u64, _u32, _u32, _u32, _u32, _u32, _u32, _u32, _u32),
)


@_compiled
def decode_and_render(
    indices: npt.NDArray[np.int64],
    images: Pixels,
    placements: npt.NDArray[np.int32],
    failures: npt.NDArray[np.int32],
    metadata: np.ndarray,
    file: Pixels,
    offsets: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.uint64],
) -> None:
    """Read samples of a mapped beton: N indices and placements to (N, px, px, 3) ``images``.

    ``metadata`` is FFCV's of the image field; ``offsets`` rise, and ``sizes`` go with them. ``failures`` gets what the
    JPEG decoder returned, 0 where all went well.
    """
    scratch = np.empty(0, np.uint8)
    for n in range(len(indices)):
        sample = metadata[indices[n]]
        height, width = np.int64(sample["height"]), np.int64(sample["width"])
        start = np.int64(sample["data_ptr"])
        end = start + np.int64(sizes[np.searchsorted(offsets, sample["data_ptr"])])
        stored = file[start:end]
        failures[n] = 0
        if sample["mode"] == 0:
            if scratch.size < height * width * 3:
                scratch = np.empty(height * width * 3, np.uint8)
            failures[n] = _imdecode(
                stored.ctypes.data, stored.size, height, width, scratch.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
            )
            render(scratch[: height * width * 3].reshape(height, width, 3), placements[n], images[n])
        else:
            render(stored.reshape(height, width, 3), placements[n], images[n])
