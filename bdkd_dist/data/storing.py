"""How one image is stored.

- At most 64×64 px (by area): raw pixels, whatever the source's format.
- RGB or grey JPEGs, baseline or progressive, that are not turned by their EXIF data and not larger than
  ``max_side_px``: the original bytes.
- All others as JPEG of ``jpeg_quality``: turned upright, converted to RGB (transparency dropped, 16-bit values
  cut to their upper 8), shrunk to ``max_side_px`` on the longer side. Chroma is halved (4:2:0) where the source was a
  JPEG and kept whole (4:4:4) elsewhere.

Every image is looked through on the way, so a damaged one is found here and not in training. JPEGs that libjpeg reads
with warnings are stored anew, as Pillow shows them, so that every decoder reads them alike.
"""

import io
import struct
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from bdkd_dist.data import jpeg
from bdkd_dist.data.jpeg_header import has_end, plain_size

Check = Literal["full", "headers"]
"""``full``: every image is decoded to its end; ``headers``: of JPEGs kept as they are, only that the end is there."""

RAW_PX = 64 * 64
ORIENTATION = 0x0112
TURNED = range(2, 9)
UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError),
    *(KeyError, IndexError, TypeError, NotImplementedError, OverflowError),  # of Pillow's rarer readers
)
"""What :func:`store` raises for an image that cannot be decoded."""


class Stored(NamedTuple):
    """A JPEG file, or (H, W, 3) pixels."""

    content: bytes | npt.NDArray[np.uint8]
    height: int
    width: int

    @property
    def num_bytes(self) -> int:
        """What it takes on the disk."""
        return num_bytes(self.content)


def num_bytes(content: bytes | npt.NDArray[np.uint8]) -> int:
    """Return how many bytes an encoded file or pixels take."""
    return len(content) if isinstance(content, bytes) else content.nbytes


def store(image: bytes | npt.NDArray[np.uint8], max_side_px: int, jpeg_quality: int, check: Check = "full") -> Stored:
    """Return how an image is stored (see the module's text).

    Args:
        image: An encoded file, or (H, W, 3) uint8 pixels.
        max_side_px: Larger images are shrunk.
        jpeg_quality: For images that are encoded anew.
        check: How thoroughly a JPEG is looked through that is stored as it is.

    Raises:
        OSError: The file cannot be decoded; Pillow raises others of :data:`UNDECODABLE` too.
    """
    if isinstance(image, np.ndarray):
        return _encode(Image.fromarray(image), max_side_px, jpeg_quality, "4:4:4")
    if (size := plain_size(image)) and _fits(*size, max_side_px) and _sound(image, check):
        return Stored(image, *size)
    with _opened(image) as opened:
        if _passes(opened, max_side_px) and _sound(image, check):
            return Stored(image, opened.height, opened.width)
        subsampling = "4:2:0" if opened.format in ("JPEG", "MPO") else "4:4:4"
        opened.draft(None, (2 * max_side_px, 2 * max_side_px))  # a large JPEG decodes at 1/2, 1/4 or 1/8
        return _encode(_rgb(ImageOps.exif_transpose(opened)), max_side_px, jpeg_quality, subsampling)


def _opened(image: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(image))
    except UnidentifiedImageError:  # its own words hold an address in memory
        raise OSError("no image of a known format" if image else "it is empty") from None


def _fits(height: int, width: int, max_side_px: int) -> bool:
    return height * width > RAW_PX and max(height, width) <= max_side_px


def _sound(image: bytes, check: Check) -> bool:
    """Whether a JPEG may be stored as it is. Without the native decoder libjpeg's warnings go unseen."""
    if check == "headers":
        return has_end(image)
    if jpeg.available():
        return jpeg.check(image)
    with _opened(image) as opened:
        opened.load()
    return True


def _passes(image: Image.Image, max_side_px: int) -> bool:
    return (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and _fits(image.height, image.width, max_side_px)
        and image.getexif().get(ORIENTATION) not in TURNED
    )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode == "P":
        image = image.convert("RGBA")  # palettes may hold transparency
    return image.convert("RGB")


def _encode(rgb: Image.Image, max_side_px: int, jpeg_quality: int, subsampling: str) -> Stored:
    rgb.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    if rgb.height * rgb.width <= RAW_PX:
        return Stored(np.asarray(rgb), rgb.height, rgb.width)
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=jpeg_quality, subsampling=subsampling)
    return Stored(encoded.getvalue(), rgb.height, rgb.width)
