"""Tars of images, read where they lie: nothing is unpacked.

Three layouts of ``train*.tar``, ``val*.tar`` and ``test*.tar`` (in the root, or in folders named like the splits) are
told apart by looking:

- Members ``…/<class>/<image>``: the last folder is the class.
- WebDataset: ``key.jpg`` with ``key.cls``, which holds an integer.
- A tar per class, ``train/<class>.tar``, or such tars inside one tar (ImageNet's own): the tar's name is the class.
"""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import PurePosixPath
from sys import intern
from typing import Any, NamedTuple

import numpy as np

from bdkd_dist.config import Data
from bdkd_dist.data.sources.base import (
    PIECE_BYTES,
    SMALL_PIECE_BYTES,
    SMALL_PIECE_FILES,
    SPLIT_OF,
    Labels,
    Piece,
    Sample,
    Source,
    SourceSplit,
    cut,
    fingerprint,
    is_image,
    mixed_order,
    source_name,
)
from bdkd_dist.data.sources.storage import File, Place, in_parallel
from bdkd_dist.errors import UserError
from bdkd_dist.uris import shown

WEB_SUFFIXES = {"jpg", "jpeg", "png", "webp"}
CLASS_NAMES = "classnames.txt"


class _Image(NamedTuple):
    """A member of a tar."""

    tar: File
    path: str
    offset: int
    size: int
    label: str
    """The class's name or, in a WebDataset, its number; empty if it has none."""


class _Index(NamedTuple):
    """The images of a tar."""

    images: list[_Image]
    is_web: bool


def fingerprint_of_tars(found: dict[str, list[File]], beside: list[File], data: Data) -> str:
    """Return the source's fingerprint, for which nothing is read."""
    tars = [tar for split in sorted(found) for tar in found[split]]
    return fingerprint("tar", data, [*tars, *_class_names(beside)])


def tar_files(place: Place, found: dict[str, list[File]], beside: list[File], data: Data) -> Source:
    """Read the headers of all tars, in parallel; the images are read where they lie.

    Training images come as the tars have them; where whole classes follow one another, in a fixed random order, so that
    any stretch of them mixes classes. Those of the other splits keep their order.

    Args:
        place: The root.
        found: The tars of each split.
        beside: The files in the root and in its folders; ``classnames.txt`` names the classes of a WebDataset.
        data: The source's settings.

    Raises:
        UserError: No tar of training images, one cut short, or an image without a class.
    """
    if "train" not in found:
        raise UserError(f"data.root={shown(str(data.root))} has no train*.tar")
    every = [(split, tar) for split in sorted(found) for tar in found[split]]
    indices: dict[str, list[_Index]] = {split: [] for split in sorted(found)}
    for (split, _), index in zip(every, in_parallel(lambda pair: _index(place, pair[1]), every), strict=True):
        indices[split].append(index)
    images = {split: [image for index in these for image in index.images] for split, these in indices.items()}
    if not any(image.label for image in images.get("test", ())):
        indices.pop("test", None)  # unlabelled, as published for contests
        images.pop("test", None)
    kinds = {index.is_web for these in indices.values() for index in these if index.images}
    if len(kinds) > 1:
        raise UserError(
            f"data.root={shown(str(data.root))}: labels are in .cls members of some tars and in folders of others"
        )
    number, names = _numbers(place, images, beside) if kinds == {True} else _folders(place, images)
    splits = {}
    for split, these in images.items():
        if unlabelled := next((image for image in these if not image.label), None):
            raise UserError(
                f"{place.where(unlabelled.tar.path)}: {unlabelled.path} has no class: it lies in no class folder, has "
                "no .cls beside it and is not in a tar per class (train/<class>.tar)"
            )
        splits[split] = _split(place, split, these, np.array([number[image.label] for image in these], np.int64))
    return Source(source_name(place, data), names, splits, fingerprint_of_tars(found, beside, data))


# --- headers


def _index(place: Place, tar: File) -> _Index:
    """Find the images of a tar and what each is labelled."""
    images, numbers = [], {}
    with _opened(place, tar) as file:
        try:
            for path, offset, size in _members(file):
                if path.suffix == ".cls":
                    numbers[_key(path)] = _read(file, offset, size).strip().decode()
                elif is_image(path.name):
                    images.append((path, offset, size))
        except tarfile.TarError as error:
            raise UserError(f"{place.where(tar.path)} is cut short or no tar: {error}") from None
    if not numbers:
        return _Index([_Image(tar, str(p), offset, size, _folder(tar, p)) for p, offset, size in images], False)
    images = [(p, offset, size) for p, offset, size in images if p.name.partition(".")[2].lower() in WEB_SUFFIXES]
    if len({_key(path) for path, _, _ in images}) < len(images):
        raise UserError(f"{place.where(tar.path)} has two images of one key")
    return _Index([_Image(tar, str(p), offset, size, numbers.get(_key(p), "")) for p, offset, size in images], True)


def _members(file: Any, start: int = 0, folder: str = "") -> Iterator[tuple[PurePosixPath, int, int]]:
    """Yield the path, offset and size of each file in a tar; a tar in it is a folder called by its name."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            path = PurePosixPath(folder, member.name)
            if member.islnk() or member.issym():
                if is_image(member.name):
                    raise tarfile.ReadError(f"{path} is a link; pack the images themselves (--hard-dereference)")
            elif member.isreg() and path.suffix == ".tar":
                inner = tar.extractfile(member)
                yield from _members(inner, start + member.offset_data, f"{path.with_suffix('')}/")
            elif member.isreg():
                yield path, start + member.offset_data, member.size
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes any bad header for the end
            raise tarfile.ReadError("no end mark")


def _folder(tar: File, path: PurePosixPath) -> str:
    """Return the class that the folder of an image, or else its tar, is called by."""
    if path.parent.name and path.parent.name not in SPLIT_OF:
        return intern(path.parent.name)
    own = PurePosixPath(tar.path)
    return own.stem if own.parent.name in SPLIT_OF else ""


def _key(path: PurePosixPath) -> str:
    return f"{path.parent}/{path.name.partition('.')[0]}"


# --- classes


def _folders(place: Place, images: dict[str, list[_Image]]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Number the classes of the training images by name."""
    names = sorted({image.label for image in images["train"] if image.label})
    number = {name: position for position, name in enumerate(names)}
    for image in (image for these in images.values() for image in these):
        if image.label and image.label not in number:
            where = f"{place.where(image.tar.path)}: {image.path}"
            raise UserError(f"{where} is of class '{image.label}', which the training images do not have")
    return number, tuple(names)


def _numbers(
    place: Place, images: dict[str, list[_Image]], beside: list[File]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Read what the ``.cls`` members hold; the names are their numbers unless there is a file of names."""
    number = {}
    for image in (image for these in images.values() for image in these):
        try:
            number[image.label] = int(image.label or -1)
        except ValueError:
            where = f"{place.where(image.tar.path)}: the .cls of {image.path}"
            raise UserError(f"{where} holds '{image.label}' (allowed: an integer)") from None
    for listed in _class_names(beside):
        with place.reading(listed.path):
            return number, tuple(place.read(listed).decode().splitlines())
    most = max((number[image.label] for image in images["train"]), default=-1)
    return number, tuple(str(k) for k in range(most + 1))


def _class_names(beside: list[File]) -> list[File]:
    """Return the file of names, if there is one."""
    return [file for file in beside if PurePosixPath(file.path).name == CLASS_NAMES][:1]


# --- images


def _split(place: Place, name: str, images: list[_Image], labels: Labels) -> SourceSplit:
    if mixed := name == "train" and _in_runs(labels):
        order = mixed_order(len(images))
        images, labels = [images[position] for position in order], labels[order]
        stretches = list(cut([image.size for image in images], SMALL_PIECE_BYTES, SMALL_PIECE_FILES))
    else:
        stretches = list(_by_tar(images))
    pieces = []
    for some in stretches:
        these = tuple(images[some])
        where = f"{name} tars" if mixed else these[0].tar.path
        title = f"{where} images {some.start} to {some.stop - 1}"
        read = partial(_samples, place, these, labels[some], mixed)
        pieces.append(Piece(title, labels[some], read, sum(image.size for image in these)))
    return SourceSplit(tuple(pieces))


def _in_runs(labels: Labels) -> bool:
    """Whether a class follows itself much more often than in a random order."""
    shares = np.bincount(labels.clip(0)) / max(len(labels), 1)
    return len(labels) > 1 and bool(np.mean(labels[1:] != labels[:-1]) < 0.5 * (1 - np.sum(shares**2)))


def _by_tar(images: list[_Image]) -> Iterator[slice]:
    start = 0
    for _, group in groupby(images, key=lambda image: image.tar):
        sizes = [image.size for image in group]
        yield from (slice(start + some.start, start + some.stop) for some in cut(sizes, PIECE_BYTES))
        start += len(sizes)


def _samples(place: Place, images: tuple[_Image, ...], labels: Labels, mixed: bool) -> Iterator[Sample]:
    contents = place.ahead(partial(_content, place), images) if mixed else _stream(place, images)
    for image, label, content in zip(images, labels, contents, strict=True):
        yield Sample(content, int(label), f"{image.tar.path} member {image.path}")


def _stream(place: Place, images: tuple[_Image, ...]) -> Iterator[bytes]:
    """Yield images of one tar that lie one behind the other."""
    with _opened(place, images[0].tar) as file:
        for image in images:
            yield _read(file, image.offset, image.size)


def _content(place: Place, image: _Image) -> bytes:
    with place.open(image.tar) as file:
        return _read(file, image.offset, image.size)


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = file.read(size)
    if len(content) != size:
        raise OSError(f"it ends {size - len(content)} bytes early")
    return content


@contextmanager
def _opened(place: Place, tar: File) -> Iterator[Any]:
    """Open a tar for reads one behind the other."""
    with place.open(tar) as opened:
        yield opened if place.is_local else io.BufferedReader(opened, place.buffer_bytes)
