"""Images that come as arrays: scikit-learn's digits and torchvision's CIFAR."""

import hashlib
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bdkd_dist.config import Data
from bdkd_dist.data.sources.base import Labels, Piece, Sample, Source, SourceSplit, fingerprint
from bdkd_dist.data.sources.storage import File
from bdkd_dist.data.splits import stratified
from bdkd_dist.errors import UserError

CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def digits(data: Data) -> Source:
    """8×8 grey values 0 to 16, as RGB of ``data.image_px``; a fifth of each class is the test split."""
    # Of scikit-learn only the file: importing the package takes longer than all of this.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("data.dataset=digits: scikit-learn is not installed, whose images these are")
    table = np.loadtxt(Path(package.origin).with_name("datasets") / "data/digits.csv.gz", delimiter=",")
    labels = table[:, -1].astype(np.int64)
    grey = np.floor(table[:, :-1].reshape(-1, 8, 8) * (255 / 16) + 0.5).astype(np.uint8)
    train, test = stratified(labels, 0.2, salt="test")
    splits = {}
    for name, where in (("train", train), ("test", test)):
        enlarged = partial(_enlarged, grey[where], labels[where], data.image_px)
        piece = Piece(name, labels[where], enlarged, 3 * data.image_px**2 * len(where))
        splits[name] = SourceSplit((piece,))
    pixels = hashlib.sha256(grey.tobytes() + labels.tobytes()).hexdigest()
    return Source("digits", tuple("0123456789"), splits, fingerprint("digits", data, [pixels]))


def _enlarged(grey: npt.NDArray[np.uint8], labels: Labels, side_px: int) -> Iterator[Sample]:
    from PIL import Image

    for position, (image, label) in enumerate(zip(grey, labels, strict=True)):
        larger = np.asarray(Image.fromarray(image).resize((side_px, side_px), Image.Resampling.BICUBIC))
        yield Sample(np.repeat(larger[..., None], 3, axis=-1), int(label), f"image {position}")


def cifar(root: Path, data: Data, how: str) -> Source:
    """Torchvision's CIFAR in ``root``, fetched where ``data.download`` allows it.

    Args:
        root: torchvision's folder.
        data: Names the data set.
        how: What a user without a network may give instead.

    Raises:
        UserError: The files are damaged or cannot be fetched.
    """
    from filelock import FileLock
    from torchvision import datasets

    make = getattr(datasets, data.dataset.upper())
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / f"{data.dataset}.lock"):
            sets = {name: make(root, train=name == "train", download=data.download) for name in ("train", "test")}
    except (OSError, HTTPException, RuntimeError) as error:
        if data.download:
            raise UserError(
                f"data.download=true: cannot fetch {data.dataset} ({error}); without a network set data.root to {how}"
            ) from None
        raise UserError(
            f"torchvision's {data.dataset} in {root} is incomplete or altered: delete it, or data.download=true"
        ) from None
    splits = {name: _split(name, s.data, np.asarray(s.targets, np.int64)) for name, s in sets.items()}
    names = sorted([make.meta["filename"], *(name for name, _ in make.train_list + make.test_list)])
    files = [_file(root, f"{make.base_folder}/{name}") for name in names]
    return Source(data.dataset, tuple(sets["train"].classes), splits, fingerprint("torchvision", data, files))


def _file(root: Path, path: str) -> File:
    stat = (root / path).stat()
    return File(path, stat.st_size, stat.st_mtime_ns)


def _split(name: str, images: npt.NDArray[np.uint8], labels: Labels) -> SourceSplit:
    return SourceSplit((Piece(name, labels, partial(_samples, images, labels), images.nbytes),))


def _samples(images: npt.NDArray[np.uint8], labels: Labels) -> Iterator[Sample]:
    for position, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Sample(image, int(label), f"image {position}")
