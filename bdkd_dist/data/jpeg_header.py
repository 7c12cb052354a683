"""What the segments before a JPEG's pixels say, read in a few microseconds (ITU-T T.81, annex B)."""

import struct

SEGMENT = struct.Struct(">BBH")
"""``FF``, what it is, and how many bytes it has with this number."""
BASELINE_TO_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
OTHER_FRAMES = frozenset({0xC3, *range(0xC5, 0xD0)} - {0xC8, 0xCC})
START_OF_SCAN = 0xDA
EXIF_OR_XMP, MULTI_PICTURE = 0xE1, 0xE2
END_OF_IMAGE = b"\xff\xd9"


def plain_size(encoded: bytes) -> tuple[int, int] | None:
    """Return the height and width of a JPEG that all readers show alike.

    Returns:
        None for a file that is no JPEG, breaks off before its pixels, or leaves something to be judged: EXIF or XMP,
        which may turn it; several pictures in one file; CMYK; 12 bits; a lossless or arithmetic-coded frame.
    """
    if encoded[:2] != b"\xff\xd8":
        return None
    size, start, last = None, 2, len(encoded) - SEGMENT.size
    while start <= last:
        mark, kind, num_bytes = SEGMENT.unpack_from(encoded, start)
        if mark != 0xFF:
            return None
        if kind == 0xFF:  # a fill byte
            start += 1
            continue
        if kind == START_OF_SCAN:
            return size
        if kind == EXIF_OR_XMP or (kind == MULTI_PICTURE and encoded[start + 4 : start + 7] == b"MPF"):
            return None
        if kind in BASELINE_TO_PROGRESSIVE:
            size = _frame(encoded[start + 4 : start + 10])
            if size is None:
                return None
        if kind in OTHER_FRAMES:
            return None
        start += 2 + num_bytes
    return None


def has_end(encoded: bytes) -> bool:
    """Return whether a JPEG's end follows its last pixels; anything may follow the end, as some cameras have it."""
    if encoded.endswith(END_OF_IMAGE):
        return True
    return encoded.rfind(END_OF_IMAGE) > encoded.rfind(b"\xff\xda")


def _frame(content: bytes) -> tuple[int, int] | None:
    """Return height and width of a frame header of 8 bits and one or three components."""
    if len(content) < 6 or content[0] != 8 or content[5] not in (1, 3):
        return None
    height, width = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
    return (height, width) if height and width else None
