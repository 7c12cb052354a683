"""Small sources of images for the tests of the data room."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bdkd_dist.config import Data
from bdkd_dist.data.sources import Source, open_source
from bdkd_dist.errors import UserError

FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def data(**settings: Any) -> Data:
    """Return settings of a source of the user's own, two classes."""
    return Data(**({"dataset": "files", "num_classes": 2, "image_px": 32} | settings))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture that survives JPEG: slow gradients, different in every channel and direction."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y, 255 * (1 - x) * y], axis=-1).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNGS = [encode(noise(4, 4, seed)) for seed in range(6)]
"""Small images, all different."""


def refuse(complaint: str, **settings: object) -> None:
    """Check what opening a source complains of."""
    with pytest.raises(UserError, match=complaint):
        open_source(data(**settings))


def images(source: Source, split: str) -> list[object]:
    return [sample.image for sample in source.splits[split].iterate()]


def write_shard(
    path: Path,
    images: list[bytes | None],
    labels: list[int],
    names: list[str] | None = None,
    image_column: str = "image",
    label_column: str = "label",
    **options: Any,
) -> None:
    """Write a Parquet file in the hub's layout."""
    column = pa.array([{"bytes": image, "path": None} for image in images], FILE)
    table = pa.table({image_column: column, label_column: pa.array(labels, pa.int64())})
    if names:
        table = table.replace_schema_metadata({"class_names": json.dumps(names)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def write_splits(root: Path, **splits: list[int]) -> None:
    """Write a shard of each split, of so many images with these labels."""
    for name, labels in splits.items():
        write_shard(root / f"{name}-00000-of-00001.parquet", PNGS[: len(labels)], labels)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_folder(root: Path, counts: dict[str, dict[str, int]], side_px: int = 16) -> None:
    """Write ``root/<split>/<class>/<n>.png`` of noise."""
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                (folder / f"{n}.png").write_bytes(encode(noise(side_px, side_px, seed=n)))


def write_cifar100(root: Path, train: np.ndarray, test: np.ndarray) -> dict[str, Path]:
    """Write (N, 32, 32, 3) images, labelled 0 to N - 1, in the layout of the CIFAR-100 pickles."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, images in (("train", train), ("test", test)):
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {"data": flat, "fine_labels": [n % 100 for n in range(len(images))]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {n}" for n in range(100)]}))
    return {name: folder / name for name in ("train", "test", "meta")}
