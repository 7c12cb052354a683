"""FFCV's ``.beton`` files (version 2), written and read with NumPy alone.

Prepared images are kept in this format so that FFCV reads them where it is installed and :class:`Beton` everywhere
else. A file holds two fields per sample: ``image`` (RGB, as JPEG or as raw pixels) and ``label`` (an integer).
All numbers are little-endian; offsets are bytes from the start of the file.

==================  =========================================================================================
header              24 bytes: version u2 (= 2), number of fields u2 (= 2), page size u4 (a power of two),
                    number of samples u8, offset of the allocation table u8
field descriptors   1041 bytes each: type u1 (2 = RGB image, 1 = integer), name 16 × u1 (ASCII, zero-padded),
                    arguments 1024 × u1 (zeros for both types)
metadata            24 bytes a sample: mode u1 (0 = JPEG, 1 = raw), width u2, height u2, data offset u8,
                    3 bytes of padding, label i8
pages               from the next multiple of the page size on: image bytes back to back. No sample crosses a
                    multiple of the page size (FFCV finds the page by shifting the offset); gaps are zeros
allocation table    24 bytes a sample, up to the end of the file: sample index u8, data offset u8, size u8
==================  =========================================================================================

With the same samples and page size the writer's file equals that of FFCV's own ``DatasetWriter`` with one worker,
byte for byte.
"""

import io
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from bdkd_dist.errors import UserError

VERSION = 2
JPEG, RAW = 0, 1
MIN_PAGE_BYTES = 2**21
MAX_PAGE_BYTES = 2**31
MAX_SIDE_PX = 2**16 - 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_bytes", "<u4"),
        ("num_samples", "<u8"),
        ("table_offset", "<u8"),
    ]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "offset", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("bytes", "<u8")])
FIELDS = np.array([(2, b"image", b""), (1, b"label", b"")], FIELD)
METADATA_OFFSET = HEADER.itemsize + FIELDS.nbytes


class BetonWriter:
    """Writes samples in order; the file appears under its name only when it is complete and on the disk.

    Image bytes go straight to the file, so memory holds 48 bytes a sample. A sample larger than a page doubles the
    page size until it fits: the samples before it stay within pages, because pages nest.

    Args:
        path: The file to write; it is written as ``<path>.partial`` and renamed at the end.
        num_samples: How many samples will be appended.
        page_bytes: The unit of FFCV's reading, a power of two from 2 MiB to 2 GiB.
    """

    def __init__(self, path: str | Path, num_samples: int, page_bytes: int = 4 * MIN_PAGE_BYTES) -> None:
        assert num_samples > 0
        assert MIN_PAGE_BYTES <= page_bytes <= MAX_PAGE_BYTES
        assert page_bytes.bit_count() == 1
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.page_bytes = page_bytes
        self._samples = np.zeros(num_samples, SAMPLE)
        self._allocations = np.zeros(num_samples, ALLOCATION)
        self._done = 0
        self._end = _align(METADATA_OFFSET + self._samples.nbytes, page_bytes)
        self._file = self.partial.open("wb")

    def __enter__(self) -> "BetonWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    def append_jpeg(self, encoded: bytes, height: int, width: int, label: int) -> None:
        """Append a JPEG file as it is; ``height`` and ``width`` are those in its header."""
        self._append(JPEG, encoded, height, width, label)

    def append_raw(self, pixels: npt.NDArray[np.uint8], label: int) -> None:
        """Append (H, W, 3) uint8 pixels."""
        height, width, channels = pixels.shape
        assert (pixels.dtype, channels) == (np.uint8, 3)
        self._append(RAW, pixels.tobytes(), height, width, label)

    def close(self) -> None:
        """Write the tables, bring the file to the disk and give it its name.

        Raises:
            UserError: Fewer samples were appended than declared; nothing is left behind.
        """
        if self._done != len(self._samples):
            self._discard()
            raise UserError(f"{self.path}: {self._done} samples came, {len(self._samples)} were declared")
        table = _align(self._end, self.page_bytes)
        header = np.array([(VERSION, len(FIELDS), self.page_bytes, self._done, table)], HEADER)
        with self._file as file:
            file.seek(0)
            file.write(header.tobytes() + FIELDS.tobytes() + self._samples.tobytes())
            file.seek(table)
            file.write(self._allocations.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.partial.replace(self.path)

    def _append(self, mode: int, content: bytes, height: int, width: int, label: int) -> None:
        if self._done == len(self._samples):
            raise UserError(f"{self.path}: more than the {self._done} declared samples came")
        if not (0 < height <= MAX_SIDE_PX and 0 < width <= MAX_SIDE_PX):
            raise UserError(f"{self.path}: sample {self._done} has {height}x{width} px (at most {MAX_SIDE_PX} a side)")
        offset = self._place(len(content))
        self._samples[self._done] = (mode, width, height, offset, label)
        self._allocations[self._done] = (self._done, offset, len(content))
        self._file.seek(offset)
        self._file.write(content)
        self._done += 1
        self._end = offset + len(content)

    def _place(self, size_bytes: int) -> int:
        """Return the offset at which a sample of this size lies within one page."""
        if size_bytes > MAX_PAGE_BYTES:
            raise UserError(f"{self.path}: sample {self._done} has {size_bytes} bytes (at most {MAX_PAGE_BYTES})")
        while size_bytes > self.page_bytes:
            self.page_bytes *= 2
        last = self._end + size_bytes - 1
        crosses = self._end // self.page_bytes != last // self.page_bytes
        return _align(self._end, self.page_bytes) if crosses else self._end

    def _discard(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)


class Beton:
    """A memory-mapped file of images and labels.

    Attributes:
        labels: (N,) int64.
        heights: (N,) int64, in pixels.
        widths: (N,) int64, in pixels.
        is_jpeg: (N,) bool; the others are raw pixels.

    Raises:
        UserError: The file is missing, truncated, no beton, or has another version or other fields.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._bytes = _map(self.path)
        samples, allocations = self._tables()
        self.labels = samples["label"].astype(np.int64)
        self.heights = samples["height"].astype(np.int64)
        self.widths = samples["width"].astype(np.int64)
        self.is_jpeg = samples["mode"] == JPEG
        self._offsets = samples["offset"].astype(np.int64)
        self._sizes = self._sizes_of(allocations)
        raw_bytes = self.heights * self.widths * 3
        if not np.all(self.is_jpeg | ((samples["mode"] == RAW) & (self._sizes == raw_bytes))):
            raise UserError(f"{self.path} is damaged: raw images do not have their size")

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type["Beton"], tuple[Path]]:
        return Beton, (self.path,)  # another process maps the file itself

    def encoded(self, index: int) -> npt.NDArray[np.uint8]:
        """Return a sample's stored bytes, without a copy and read-only: a JPEG file, or H·W·3 raw bytes."""
        start = self._offsets[index]
        return self._bytes[start : start + self._sizes[index]]

    def pixels(self, index: int) -> npt.NDArray[np.uint8]:
        """Return a sample as (H, W, 3) uint8; raw pixels come without a copy and read-only."""
        content = self.encoded(index)
        if not self.is_jpeg[index]:
            return content.reshape(self.heights[index], self.widths[index], 3)
        from PIL import Image

        with Image.open(io.BytesIO(content.tobytes())) as image:
            return np.asarray(image.convert("RGB"))

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        size = len(self._bytes)
        if size < METADATA_OFFSET:
            raise UserError(f"{self.path} is not a beton file, or is truncated ({size} bytes)")
        header = self._bytes[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION:
            raise UserError(f"{self.path} is not a beton file of version {VERSION}")
        fields = self._bytes[HEADER.itemsize : METADATA_OFFSET].view(FIELD)
        if header["num_fields"] != len(FIELDS) or not np.array_equal(
            fields[["type", "name"]], FIELDS[["type", "name"]]
        ):
            raise UserError(f"{self.path} does not hold the two fields image (RGB) and label (integer)")
        count, table = int(header["num_samples"]), int(header["table_offset"])
        metadata_end = METADATA_OFFSET + count * SAMPLE.itemsize
        if not metadata_end <= table or size != table + count * ALLOCATION.itemsize:
            raise UserError(f"{self.path} is truncated: it has {size} bytes")
        return self._bytes[METADATA_OFFSET:metadata_end].view(SAMPLE), self._bytes[table:].view(ALLOCATION)

    def _sizes_of(self, allocations: np.ndarray) -> npt.NDArray[np.int64]:
        """Return each sample's size; FFCV's writer with several workers leaves the table out of order."""
        table = np.sort(allocations, order="offset")
        place = np.searchsorted(table["offset"], self._offsets).clip(max=len(table) - 1)
        sizes = table["bytes"][place].astype(np.int64)
        inside = self._offsets + sizes <= len(self._bytes) - allocations.nbytes
        if not np.all((table["offset"][place] == self._offsets) & inside):
            raise UserError(f"{self.path} is damaged: its tables do not agree")
        return sizes


def _map(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{path} is not a beton file ({error})") from None


def _align(offset: int, page_bytes: int) -> int:
    return -(-offset // page_bytes) * page_bytes
