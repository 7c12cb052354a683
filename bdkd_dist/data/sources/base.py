"""What every source is: named splits, cut into pieces that can be read on their own."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bdkd_dist.config import Data
from bdkd_dist.data.prepared import FORMAT
from bdkd_dist.data.randomness import bits
from bdkd_dist.data.sources.storage import File, Place

Labels = npt.NDArray[np.int64]

SPLIT_OF = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
PIECE_BYTES = 2**30
"""Larger shards and tars are cut."""
SMALL_PIECE_BYTES = 2**29
SMALL_PIECE_FILES = 16_384
"""A piece of images that lie apart, in files of their own, is not larger than this."""
ORDER_KEY = 0x6F72646572  # any constant: the order of training images is the same for every seed


class Sample(NamedTuple):
    """One image as its source has it."""

    image: bytes | npt.NDArray[np.uint8]
    """An encoded file, or (H, W, 3) pixels."""
    label: int
    origin: str
    """The file, or the shard and row, for messages."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a split that is read, stored and, if interrupted, repeated on its own."""

    name: str
    """For messages and reports."""
    labels: Labels
    """(n,)."""
    iterate: Callable[[], Iterator[Sample]]
    """Streams the images in the labels' order; picklable, so that it may run in another process or on another node."""
    encoded_bytes: int
    """What the images take in the source, about."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SourceSplit:
    """The images of a split: its pieces, one behind the other."""

    pieces: tuple[Piece, ...]

    @cached_property
    def labels(self) -> Labels:
        """(N,) labels of all pieces."""
        return np.concatenate([piece.labels for piece in self.pieces] or [np.empty(0, np.int64)])

    @property
    def encoded_bytes(self) -> int:
        """What the images take in the source, about."""
        return sum(piece.encoded_bytes for piece in self.pieces)

    def iterate(self) -> Iterator[Sample]:
        """Stream the images of all pieces."""
        for piece in self.pieces:
            yield from piece.iterate()

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)


@dataclass(frozen=True)
class Source:
    """A data set with official splits ``train``, ``test`` and, where it has one, ``validation``."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, SourceSplit]
    fingerprint: str
    """SHA-256 over the source's files (relative name, size, time of change) and what shapes the prepared files."""


def fingerprint(kind: str, data: Data, entries: Iterable[str | File]) -> str:
    """Return the SHA-256 that changes with the source's files and with what shapes the prepared ones."""
    shape = [data.image_px] if kind == "digits" else []
    digest = hashlib.sha256(json.dumps([FORMAT, kind, data.max_side_px, data.jpeg_quality, *shape]).encode())
    for entry in entries:
        text = entry if isinstance(entry, str) else f"{entry.path} {entry.size} {entry.mtime_ns}"
        digest.update(f"\n{text}".encode())
    return digest.hexdigest()


def source_name(place: Place, data: Data) -> str:
    """Return the data set's name, that of its folder where it is the user's own."""
    return data.dataset if data.dataset != "files" else place.name


def files_by_split(files: Iterable[File], suffix: str) -> dict[str, list[File]]:
    """Sort files such as ``train-0.tar``, ``data/train_0.tar`` and ``train/0.tar`` by their split; others are left out.

    A folder named like a split decides, otherwise the first word in the file's name that is a split's.
    """
    found: dict[str, list[File]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if path.suffix == suffix:
            words = [path.parent.name, *re.findall("[a-z]+", path.stem)]
            if split := next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None):
                found.setdefault(split, []).append(file)
    return found


def is_image(path: str) -> bool:
    """Whether a file is an image by its name; ``._name.jpg`` and the like are none."""
    name = PurePosixPath(path)
    return name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith(".")


def cut(sizes_bytes: Sequence[int], most_bytes: int, most_count: int | None = None) -> Iterator[slice]:
    """Cut items, in order, into stretches of at most so many bytes and items, but at least one item each."""
    start, total_bytes = 0, 0
    for position, size_bytes in enumerate(sizes_bytes):
        if position > start and (total_bytes + size_bytes > most_bytes or position - start == most_count):
            yield slice(start, position)
            start, total_bytes = position, 0
        total_bytes += size_bytes
    if len(sizes_bytes):
        yield slice(start, len(sizes_bytes))


def mixed_order(count: int) -> Labels:
    """Return positions 0 to ``count`` - 1 in a random order that is always the same, so that neighbours mix classes."""
    return np.argsort(bits(ORDER_KEY, 0, np.arange(count), 0), kind="stable")
