"""The native decoder (``native/jpeg.c``): only the part of a JPEG that a crop needs, and a check of the whole of it.

It stands on libjpeg-turbo's own API and is built with the package where its headers are; the rest of the package works
without it. Pixels equal those of the library's full decoding (exact transform, fancy upsampling) bit for bit, which
are Pillow's.
"""

import ctypes
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bdkd_dist.errors import UserError

LIBRARY = Path(__file__).with_name(f"_jpeg{sysconfig.get_config_var('EXT_SUFFIX')}")
CODES = ("sound", "damaged", "of a colour space that is left to Pillow", "not of the declared size")


class JPEGError(ValueError):
    """A JPEG that the native decoder refuses: one of :data:`CODES`."""


class Window(NamedTuple):
    """Decoded pixels and where they stand."""

    pixels: npt.NDArray[np.uint8]
    """(h, w, 3) RGB."""
    top: int
    """Of the first row, in pixels of the reduced image."""
    left: int
    """Of the first column: at most the one asked for, as columns are decoded in blocks."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the native library, or None where it was not built or does not load."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    address, size, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int32
    loaded.bdkd_decode.argtypes = [address, size, number, number, number, address, address]
    loaded.bdkd_check.argtypes = [address, size]
    return loaded


def available() -> bool:
    """Return whether the native library is here."""
    return library() is not None


def check(encoded: bytes | npt.NDArray[np.uint8]) -> bool:
    """Return whether a JPEG is sound from its first byte to its last, and of colours that :func:`decode_box` reads.

    All of it is entropy-decoded, no pixels are made. Unsound are also those of which libjpeg only warns.

    Raises:
        UserError: The native library is absent.
    """
    content = np.frombuffer(encoded, np.uint8)
    return bool(_required().bdkd_check(content.ctypes.data, content.size) == 0)


def decode_box(
    encoded: bytes | npt.NDArray[np.uint8],
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    reduction: int = 1,
) -> Window:
    """Decode at least a box of a JPEG.

    Args:
        encoded: The JPEG file.
        size: Its height and width in pixels.
        box: Top, left, height and width in pixels of the reduced image, inside it and not empty.
        reduction: 1, 2, 4 or 8: every pixel stands for so many squared, rounded up at the right and lower edges.

    Raises:
        JPEGError: The JPEG is damaged as far as it was read, has another size, or is of CMYK or such colours.
        UserError: The native library is absent.
    """
    content = np.frombuffer(encoded, np.uint8)
    window = np.array(box, np.int32)
    out = np.empty(box[2] * -(-size[1] // reduction) * 3, np.uint8)
    arguments = (content.ctypes.data, content.size, *size, reduction, window.ctypes.data, out.ctypes.data)
    code = _required().bdkd_decode(*arguments)
    if code:
        raise JPEGError(f"the JPEG is {CODES[code]}")
    top, left, height, width = window.tolist()
    return Window(out[: height * width * 3].reshape(height, width, 3), top, left)


def _required() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise UserError(f"the native JPEG decoder is not built here ({LIBRARY.name}); run: make setup")
    return found
