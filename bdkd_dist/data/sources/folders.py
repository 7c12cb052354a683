"""Image folders: ``train/<class>/…``, ``val/<class>/…``, ``test/<class>/…``."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from bdkd_dist.config import Data
from bdkd_dist.data.sources.base import (
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


def image_folder(place: Place, folders: dict[str, list[str]], data: Data) -> Source:
    """Read a tree of class folders; a test folder without classes is unlabelled.

    The training images come in a fixed random order, so that any stretch of them has all classes; the others by name.

    Args:
        place: The root.
        folders: Those in the root, among them ``train``, and the folders in each.
        data: The source's settings.

    Raises:
        UserError: No class folders, an empty one, or one that ``train`` does not have.
    """
    splits, files = {}, []
    names = [path.removeprefix("train/") for path in folders["train"]]
    for folder in sorted((f for f in folders if f in SPLIT_OF), key=SPLIT_OF.__getitem__):
        found = folders[folder]
        if not found and folder == "test":
            continue
        if not found:
            raise UserError(f"{place.where(folder)} holds no class folders ({folder}/<class>/...)")
        if strange := [path for path in found if path.removeprefix(f"{folder}/") not in names]:
            raise UserError(f"{place.where(strange[0])}: a class that {place.where('train')} does not have")
        images = dict(zip(found, in_parallel(partial(_images, place), found), strict=True))
        of_class = [images.get(f"{folder}/{name}", []) for name in names]
        files += (new := [file for these in of_class for file in these])
        labels = np.repeat(np.arange(len(names)), [len(these) for these in of_class])
        splits[SPLIT_OF[folder]] = _split(place, SPLIT_OF[folder], new, labels)
    absent = np.bincount(splits["train"].labels, minlength=len(names)) == 0
    if absent.any():
        raise UserError(f"{place.where(folders['train'][int(absent.argmax())])} holds no images")
    return Source(source_name(place, data), tuple(names), splits, fingerprint("folder", data, [*names, *files]))


def flat_folder(place: Place, images: list[File], data: Data) -> Source:
    """Images without classes, as a test split whose labels are all 0."""
    splits = {"test": _split(place, "test", images, np.zeros(len(images), np.int64))}
    return Source(source_name(place, data), ("",), splits, fingerprint("flat folder", data, images))


def _images(place: Place, folder: str) -> list[File]:
    """Return the images at any depth, by name."""
    return [file for file in place.listing(folder, recursive=True)[0] if is_image(file.path)]


def _split(place: Place, name: str, files: list[File], labels: Labels) -> SourceSplit:
    order = mixed_order(len(files)) if name == "train" else np.arange(len(files))
    files, labels = [files[position] for position in order], labels[order]
    pieces = []
    for some in cut([file.size for file in files], SMALL_PIECE_BYTES, SMALL_PIECE_FILES):
        read = partial(_samples, place, tuple(files[some]), labels[some])
        title = f"{name} files {some.start} to {some.stop - 1}"
        pieces.append(Piece(title, labels[some], read, sum(file.size for file in files[some])))
    return SourceSplit(tuple(pieces))


def _samples(place: Place, files: tuple[File, ...], labels: Labels) -> Iterator[Sample]:
    for file, label, content in zip(files, labels, place.ahead(place.read, files), strict=True):
        yield Sample(content, int(label), file.path)
