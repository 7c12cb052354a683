"""The native decoder as Python calls it; the package's own compiled code needs no such call."""

import ctypes
from typing import NamedTuple

import numpy as np

from bdkd_dist.data import jpeg

CODES = ("sound", "damaged", "of a colour space that is left to Pillow", "not of the declared size")

u64, i32 = ctypes.c_uint64, ctypes.c_int32
SIGNATURE = ctypes.CFUNCTYPE(i32, u64, u64, i32, i32, i32, u64, u64)


class JPEGError(ValueError):
    """A JPEG that the native decoder refuses: one of :data:`CODES`."""


class Window(NamedTuple):
    """Decoded pixels and where they stand."""

    pixels: np.ndarray
    """(h, w, 3) RGB uint8."""
    top: int
    """Of the first row, in pixels of the reduced image."""
    left: int
    """Of the first column: at most the one asked for, as columns are decoded in blocks."""


def decode_box(encoded: bytes, size: tuple[int, int], box: tuple[int, int, int, int], reduction: int = 1) -> Window:
    """Decode at least a box of a JPEG.

    Args:
        encoded: The JPEG file.
        size: Its height and width in pixels.
        box: Top, left, height and width in pixels of the reduced image, inside it and not empty.
        reduction: 1, 2, 4 or 8: every pixel stands for so many squared, rounded up at the right and lower edges.

    Raises:
        JPEGError: The JPEG is damaged as far as it was read, has another size, or is of CMYK or such colours.
    """
    decode = SIGNATURE(("bdkd_decode", jpeg.library()))
    content = np.frombuffer(encoded, np.uint8)
    window = np.array(box, np.int32)
    out = np.empty(box[2] * -(-size[1] // reduction) * 3, np.uint8)
    code = decode(content.ctypes.data, content.size, *size, reduction, window.ctypes.data, out.ctypes.data)
    if code:
        raise JPEGError(f"the JPEG is {CODES[code]}")
    top, left, height, width = window.tolist()
    return Window(out[: height * width * 3].reshape(height, width, 3), top, left)
