"""The native decoder (``native/jpeg.c``): only the part of a JPEG that a crop needs, and a check of the whole of it.

It stands on libjpeg-turbo's own API and is built with the package where its headers are; the rest of the package works
without it. Pixels equal those of the library's full decoding (exact transform, fancy upsampling) bit for bit, which
are Pillow's. Compiled code calls the decoder itself (:mod:`bdkd_dist.data.ffcv_loader`).
"""

import ctypes
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

LIBRARY = Path(__file__).with_name(f"_jpeg{sysconfig.get_config_var('EXT_SUFFIX')}")


@cache
def library() -> ctypes.CDLL | None:
    """Return the native library, or None where it was not built or does not load."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    loaded.bdkd_check.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    return loaded


def available() -> bool:
    """Return whether the native library is here."""
    return library() is not None


def check(encoded: bytes | npt.NDArray[np.uint8]) -> bool:
    """Return whether a JPEG is sound from its first byte to its last, and of colours that the decoder reads.

    All of it is entropy-decoded, no pixels are made. Unsound are also those of which libjpeg only warns. The native
    library must be here.
    """
    native = library()
    assert native is not None
    content = np.frombuffer(encoded, np.uint8)
    return bool(native.bdkd_check(content.ctypes.data, content.size) == 0)
