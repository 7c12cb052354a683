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

import ctypes
import io
import mmap
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from bdkd_dist.data.prepared import sha256_of
from bdkd_dist.errors import UserError

VERSION = 2
JPEG, RAW = 0, 1
MIN_PAGE_BYTES = 2**21
MAX_PAGE_BYTES = 2**31
MAX_SIDE_PX = 2**16 - 1
WRITE_BYTES = 2**20  # that much stays in a core's cache
MAP_FIXED = 0x10  # of <sys/mman.h>, the same on Linux and macOS

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

    Image bytes go to the file by the MiB; besides, memory holds 48 bytes a sample. A sample larger than a page doubles
    the page size until it fits: the samples before it stay within pages, because pages nest.

    Args:
        path: The file to write; it is written as ``<path>.partial`` and renamed at the end.
        num_samples: How many samples will be appended at most: room for their metadata is kept.
        page_bytes: The unit of FFCV's reading, a power of two from 2 MiB to 2 GiB.

    Attributes:
        sha256: Of the file, once it is complete.
    """

    sha256: str

    def __init__(self, path: str | Path, num_samples: int, page_bytes: int = 4 * MIN_PAGE_BYTES) -> None:
        assert num_samples > 0
        assert MIN_PAGE_BYTES <= page_bytes <= MAX_PAGE_BYTES
        assert page_bytes.bit_count() == 1
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.page_bytes = page_bytes
        self._num_samples = num_samples
        self._done = 0
        self._rows = array("q")  # mode, width, height, offset, label and bytes of each sample
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._end = _align(METADATA_OFFSET + num_samples * SAMPLE.itemsize, page_bytes)
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
            UserError: No sample was appended; nothing is left behind.
        """
        if self._done == 0:
            self._discard()
            raise UserError(f"{self.path}: no sample came, {self._num_samples} were declared")
        table = _align(self._end, self.page_bytes)
        header = np.array([(VERSION, len(FIELDS), self.page_bytes, self._done, table)], HEADER)
        samples, allocations = self._tables()
        with self._file as file:
            self._write()
            file.seek(0)
            file.write(header.tobytes() + FIELDS.tobytes() + samples.tobytes())
            file.seek(table)
            file.write(allocations.tobytes())
            file.flush()
            with ThreadPoolExecutor(1) as other:  # the disk works while a core does
                on_disk = other.submit(os.fsync, file.fileno())
                self.sha256 = sha256_of(self.partial)
                on_disk.result()
        self.partial.replace(self.path)

    def _append(self, mode: int, content: bytes, height: int, width: int, label: int) -> None:
        if self._done == self._num_samples:
            raise UserError(f"{self.path}: more than the {self._done} declared samples came")
        if not (0 < height <= MAX_SIDE_PX and 0 < width <= MAX_SIDE_PX):
            raise UserError(f"{self.path}: sample {self._done} has {height}x{width} px (at most {MAX_SIDE_PX} a side)")
        size_bytes = len(content)
        offset = self._place(size_bytes)
        if self._done == 0 or offset != self._end:
            self._write()
            self._file.seek(offset)
        self._waiting.append(content)
        self._waiting_bytes += size_bytes
        if self._waiting_bytes >= WRITE_BYTES:
            self._write()
        self._rows.extend((mode, width, height, offset, label, size_bytes))
        self._done += 1
        self._end = offset + size_bytes

    def _write(self) -> None:
        """Write what is waiting, which lies back to back."""
        self._file.write(b"".join(self._waiting))
        self._waiting.clear()
        self._waiting_bytes = 0

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Return metadata and allocation table of the samples."""
        rows = np.frombuffer(self._rows, np.int64).reshape(-1, 6)
        samples, allocations = np.zeros(self._done, SAMPLE), np.zeros(self._done, ALLOCATION)
        for column, name in enumerate(("mode", "width", "height", "offset", "label")):
            samples[name] = rows[:, column]
        allocations["sample"] = np.arange(self._done)
        allocations["offset"], allocations["bytes"] = rows[:, 3], rows[:, 5]
        return samples, allocations

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
        with suppress(OSError):  # a full disk does not take what is still buffered
            self._file.close()
        self.partial.unlink(missing_ok=True)


def copy_tables(source: BinaryIO, path: Path, num_bytes: int) -> None:
    """Write a file of a beton's length with its header and tables, zeros in place of its images.

    Args:
        source: The beton; three stretches of it are read.
        path: The file to write, sparse.
        num_bytes: The beton's length.
    """
    head = source.read(METADATA_OFFSET)
    with path.open("wb") as file:
        file.truncate(num_bytes)
        file.write(head)
        if len(head) < METADATA_OFFSET:
            return  # whoever opens it will say so
        _, _, _, count, table = np.frombuffer(head[: HEADER.itemsize], HEADER)[0].tolist()
        if METADATA_OFFSET + count * SAMPLE.itemsize <= table <= num_bytes:
            file.write(source.read(count * SAMPLE.itemsize))
            for one in (source, file):
                one.seek(table)
            file.write(source.read(num_bytes - table))


class Beton:
    """The images and labels of one or several files, mapped into memory one behind the other and read as one.

    Attributes:
        paths: The files, in order.
        bytes: (total,) uint8, read-only: all files, each from a multiple of the operating system's page on.
        labels: (N,) int64.
        heights: (N,) int64, in pixels.
        widths: (N,) int64, in pixels.
        is_jpeg: (N,) bool; the others are raw pixels.
        offsets: (N,) int64: where each sample's stored bytes begin in ``bytes``.
        sizes: (N,) int64: how many they are.
        pages: (N,) int64: the number of the page that holds each sample, counted through all files.
        in_page: (N,) int64: where in its page each sample's stored bytes begin.

    Raises:
        UserError: A file is missing, truncated, no beton, or has another version or other fields.
    """

    def __init__(self, *paths: str | Path) -> None:
        assert paths
        self.paths = tuple(Path(path) for path in paths)
        self.bytes, spans = _map(self.paths)
        tables = [_Tables(path, self.bytes[span]) for path, span in zip(self.paths, spans, strict=True)]
        counts = [len(table.samples) for table in tables]
        samples = np.concatenate([table.samples for table in tables])
        self.labels = samples["label"].astype(np.int64)
        self.heights = samples["height"].astype(np.int64)
        self.widths = samples["width"].astype(np.int64)
        self.is_jpeg = samples["mode"] == JPEG
        self.offsets = samples["offset"].astype(np.int64) + np.repeat([span.start for span in spans], counts)
        self.sizes = np.concatenate([table.sizes for table in tables])
        self._firsts = np.cumsum([0, *counts])[:-1]
        self._page_firsts = np.cumsum([0, *(table.num_pages for table in tables)])
        self._tables = tables
        self.pages = np.concatenate([t.pages + first for t, first in zip(tables, self._page_firsts, strict=False)])
        self.in_page = np.concatenate([table.in_page for table in tables])

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type["Beton"], tuple[Path, ...]]:
        return Beton, self.paths  # another process maps the files itself

    def named(self, index: int) -> str:
        """Return how a message names a sample: its file and its place in it."""
        file = self._file_of(index)
        return f"{self.paths[file]}: sample {index - self._firsts[file]}"

    def page(self, number: int) -> tuple[Path, int, int]:
        """Return the file that holds a page, the page's offset in it and its size in bytes."""
        file = int(np.searchsorted(self._page_firsts, number, side="right")) - 1
        table = self._tables[file]
        offset = int(number - self._page_firsts[file]) * table.page_bytes
        return table.path, offset, min(table.page_bytes, table.file_bytes - offset)

    def encoded(self, index: int) -> npt.NDArray[np.uint8]:
        """Return a sample's stored bytes, without a copy and read-only: a JPEG file, or H·W·3 raw bytes."""
        start = self.offsets[index]
        return self.bytes[start : start + self.sizes[index]]

    def pixels(self, index: int) -> npt.NDArray[np.uint8]:
        """Return a sample as (H, W, 3) uint8; raw pixels come without a copy and read-only."""
        content = self.encoded(index)
        if not self.is_jpeg[index]:
            return content.reshape(self.heights[index], self.widths[index], 3)
        from PIL import Image

        with Image.open(io.BytesIO(content.tobytes())) as image:
            return np.asarray(image.convert("RGB"))

    def _file_of(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1


class _Tables:
    """One file's tables, checked.

    Attributes:
        samples: (n,) of :data:`SAMPLE`.
        sizes: (n,) int64, bytes of each sample.
        pages: (n,) int64, the page of each sample.
        in_page: (n,) int64, where in its page it begins.
        page_bytes: The file's own page size.
        num_pages: Whole and partial pages of the file.
    """

    def __init__(self, path: Path, content: npt.NDArray[np.uint8]) -> None:
        self.path, self.file_bytes = path, len(content)
        self.samples, allocations = self._read(content)
        self.sizes = self._sizes_of(allocations)
        raw_bytes = self.samples["height"].astype(np.int64) * self.samples["width"] * 3
        if not np.all((self.samples["mode"] == JPEG) | ((self.samples["mode"] == RAW) & (self.sizes == raw_bytes))):
            raise UserError(f"{path} is damaged: raw images do not have their size")
        self.pages, self.in_page = np.divmod(self.samples["offset"].astype(np.int64), self.page_bytes)
        self.num_pages = -(-self.file_bytes // self.page_bytes)

    def _read(self, content: npt.NDArray[np.uint8]) -> tuple[np.ndarray, np.ndarray]:
        size = len(content)
        if size < METADATA_OFFSET:
            raise UserError(f"{self.path} is not a beton file, or is truncated ({size} bytes)")
        header = content[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION:
            raise UserError(f"{self.path} is not a beton file of version {VERSION}")
        fields = content[HEADER.itemsize : METADATA_OFFSET].view(FIELD)
        if header["num_fields"] != len(FIELDS) or not np.array_equal(
            fields[["type", "name"]], FIELDS[["type", "name"]]
        ):
            raise UserError(f"{self.path} does not hold the two fields image (RGB) and label (integer)")
        self.page_bytes = int(header["page_bytes"])
        if not (MIN_PAGE_BYTES <= self.page_bytes <= MAX_PAGE_BYTES and self.page_bytes.bit_count() == 1):
            raise UserError(f"{self.path} is damaged: its pages have {self.page_bytes} bytes")
        count, table = int(header["num_samples"]), int(header["table_offset"])
        metadata_end = METADATA_OFFSET + count * SAMPLE.itemsize
        if not metadata_end <= table or size != table + count * ALLOCATION.itemsize:
            raise UserError(f"{self.path} is truncated: it has {size} bytes")
        return content[METADATA_OFFSET:metadata_end].view(SAMPLE), content[table:].view(ALLOCATION)

    def _sizes_of(self, allocations: np.ndarray) -> npt.NDArray[np.int64]:
        """Return each sample's size; FFCV's writer with several workers leaves the table out of order."""
        table = np.sort(allocations, order="offset")
        offsets = self.samples["offset"].astype(np.int64)
        place = np.searchsorted(table["offset"], offsets).clip(max=len(table) - 1)
        sizes = table["bytes"][place].astype(np.int64)
        inside = offsets + sizes <= self.file_bytes - allocations.nbytes
        if not np.all((table["offset"][place] == offsets) & inside):
            raise UserError(f"{self.path} is damaged: its tables do not agree")
        return sizes


def _map(paths: tuple[Path, ...]) -> tuple[npt.NDArray[np.uint8], list[slice]]:
    """Map files into one span of addresses; return it, and where each file lies in it.

    Space is reserved by an anonymous mapping that belongs to Python, and the files are mapped over it: when the last
    array on it is gone, all of it is given back.
    """
    spans, end = [], 0
    for path in paths:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if size == 0:
            raise UserError(f"{path} is not a beton file (it is empty)")
        spans.append(slice(end, end + size))
        end = _align(end + size, mmap.PAGESIZE)
    reserved = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    joined = np.frombuffer(reserved, np.uint8)
    for path, span in zip(paths, spans, strict=True):
        _map_over(path, joined.ctypes.data + span.start, span.stop - span.start)
    return joined, spans


def _map_over(path: Path, address: int, size: int) -> None:
    """Map a file read-only over reserved addresses, which Python's own ``mmap`` cannot do."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_longlong,
    ]
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if system.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, descriptor, 0) != address:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} is not a beton file ({error})") from None


def _align(offset: int, page_bytes: int) -> int:
    return -(-offset // page_bytes) * page_bytes
