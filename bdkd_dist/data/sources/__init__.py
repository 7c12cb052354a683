"""Where images come from: Parquet shards, image folders, tars, torchvision's CIFAR, scikit-learn's digits.

:func:`open_source` reads names, sizes and labels only; the images of a split stream from its pieces.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdkd_dist.config import Data
from bdkd_dist.data.sources.arrays import CIFAR_FOLDERS, cifar, digits
from bdkd_dist.data.sources.base import Piece, Sample, Source, SourceSplit, files_by_split, is_image, source_name
from bdkd_dist.data.sources.folders import flat_folder, image_folder
from bdkd_dist.data.sources.parquet import fingerprint_of_shards, parquet_shards
from bdkd_dist.data.sources.storage import File, Place, in_parallel
from bdkd_dist.data.sources.tars import fingerprint_of_tars, tar_files
from bdkd_dist.data.splits import with_test
from bdkd_dist.errors import UserError
from bdkd_dist.uris import shown

__all__ = ["Piece", "Sample", "Source", "SourceSplit", "find_source", "labelled", "listed_source", "open_source"]

HOW = (
    "a folder of Parquet shards (train-*.parquet), an image folder (train/<class>/...) or a folder of tars "
    "(train*.tar: of class folders, a WebDataset, or train/<class>.tar)"
)


def open_source(data: Data) -> Source:
    """Find the source that ``data`` names and check its splits, classes and labels.

    Where there is no labelled ``test`` split, a ``validation`` split is the test split (ImageNet as it comes).

    Raises:
        UserError: No source there, an unreadable one, or classes other than ``data.num_classes``.
    """
    return _checked(find_source(data), data)


def find_source(data: Data, without_classes: bool = False) -> Source:
    """Find the source that ``data`` names, with the splits, classes and labels that it has.

    Args:
        data: Names it; ``data.root`` is a path or a URI of a file system that pyarrow knows.
        without_classes: Take a folder of images for a test split whose labels are all 0, too.

    Raises:
        UserError: No source there, or an unreadable one.
    """
    if data.dataset == "digits":
        return digits(data)
    place = Place.of(data.root) if data.root is not None else None
    if place and (source := _found(place, data, without_classes)):
        return source
    if data.dataset in CIFAR_FOLDERS and (place is None or place.is_local):
        root = Path(place.root) if place else Path(data.prepared).expanduser() / "torchvision"
        if data.download or (root / CIFAR_FOLDERS[data.dataset]).is_dir():
            return cifar(root, data, HOW)
    if place is None:
        download = ", or data.download=true" if data.dataset in CIFAR_FOLDERS else ""
        raise UserError(f"data.root is not set: give {HOW}{download}")
    state = "holds none of these: give" if place.is_folder() else "does not exist: give"
    raise UserError(f"data.root={shown(str(data.root))} {state} {HOW}")


def labelled(source: Source) -> Source:
    """Return a source without splits that are empty or, as published for contests, unlabelled (-1 throughout).

    Raises:
        UserError: No split is left, or a label is not that of a class.
    """
    if not (splits := {name: split for name, split in source.splits.items() if _has_labels(split)}):
        raise UserError(f"{source.name} holds no images with labels")
    _check_labels(splits, len(source.class_names), source.name)
    return replace(source, splits=splits)


def listed_source(data: Data) -> tuple[str, str] | None:
    """Return the name and the fingerprint that a source of shards or tars has, from their names, sizes and times alone.

    Returns:
        None for other sources, which say no more when they are listed than when they are found.

    Raises:
        UserError: The place cannot be listed.
    """
    if data.dataset == "digits" or data.root is None:
        return None
    place = Place.of(data.root)
    if not (content := _listing(place)):
        return None
    if content.shards:
        return source_name(place, data), fingerprint_of_shards(content.shards, data)
    if content.tars:
        return source_name(place, data), fingerprint_of_tars(content.tars, content.files, data)
    return None


class _Content(NamedTuple):
    """What lies in a root and in the folders in it."""

    files: list[File]
    folders: dict[str, list[str]]
    """Those in each folder of the root."""
    shards: dict[str, list[File]]
    tars: dict[str, list[File]]
    """Empty where the images lie in folders."""


def _listing(place: Place) -> _Content | None:
    if not place.is_folder():
        return None
    files, folders = place.listing()
    inside = dict(zip(folders, in_parallel(place.listing, folders), strict=True))
    files += [file for these, _ in inside.values() for file in these]
    shards, tars = files_by_split(files, ".parquet"), files_by_split(files, ".tar")
    if "train" in inside and inside["train"][1]:
        tars = {}
    return _Content(files, {folder: of for folder, (_, of) in inside.items()}, shards, tars)


def _found(place: Place, data: Data, without_classes: bool) -> Source | None:
    """Look what lies in the root and the folders in it."""
    if not (content := _listing(place)):
        return None
    if content.shards:
        return parquet_shards(place, content.shards, data)
    if content.tars:
        return tar_files(place, content.tars, content.files, data)
    if "train" in content.folders:
        return image_folder(place, content.folders, data)
    images = [file for file in content.files if is_image(file.path) and "/" not in file.path]
    return flat_folder(place, images, data) if without_classes and images else None


def _checked(source: Source, data: Data) -> Source:
    """Settle which split is which and check labels."""
    # Of tests alone it is known that they are published without labels; elsewhere -1 is a mistake, and named.
    there = {name: s for name, s in source.splits.items() if len(s) and (name != "test" or _has_labels(s))}
    splits, K = with_test(there), len(source.class_names)
    where = f"the source {shown(data.root) if data.root else source.name}"
    if "test" not in splits:
        raise UserError(f"{where} has neither a test nor a validation split with labels")
    if "train" not in splits or len(np.unique(splits["train"].labels)) < 2:
        raise UserError(f"{where} has training images of fewer than two classes")
    if data.num_classes != K:
        raise UserError(f"data.num_classes={data.num_classes}: {where} has {K} classes")
    _check_labels(splits, K, where)
    return replace(source, splits=splits)


def _has_labels(split: SourceSplit) -> bool:
    return bool(np.any(split.labels != -1))


def _check_labels(splits: dict[str, SourceSplit], K: int, where: str) -> None:
    for name, split in splits.items():
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= K))
        if len(wrong):
            label = split.labels[wrong[0]]
            raise UserError(f"{where}: {name} image {wrong[0]} has label {label} (allowed: 0 to {K - 1})")
