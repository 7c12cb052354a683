"""Small betons, and reading them whole: what the tests of loaders share."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.data.loader import Batch, open_loader

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
every_loader = pytest.mark.parametrize("kind", ["torch", pytest.param("ffcv", marks=needs_ffcv)])
COUNT = 60


def make(crop: Any, image_px: int, **changes: Any) -> Transform:
    fields = {
        "pad_px": 4,
        "min_area": 0.08,
        "max_aspect": 4 / 3,
        "flip": True,
        "eval_crop": 1.0,
        "seed": 3,
    }
    return Transform(image_px=image_px, crop=crop, **(fields | changes))


def picture(index: int) -> np.ndarray:
    """A smooth image, as photographs are, of a size of its own."""
    generator = np.random.default_rng(index)
    height, width = generator.integers(90, 160, 2)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_jpegs(path: Path) -> Path:
    """Write ``COUNT`` pictures as JPEGs of several sizes, labels 0 to 6."""
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            pixels = picture(index)
            writer.append_jpeg(jpeg(pixels), *pixels.shape[:2], label=index % 7)
    return path


def order(batch_size: int = 16, count: int = COUNT) -> list[np.ndarray]:
    shuffled = np.random.default_rng(1).permutation(count)
    return [shuffled[start : start + batch_size] for start in range(0, count, batch_size)]


def read(kind: Any, path: Path, transform: Transform, epoch: int = 0, threads: int = 1, **options: Any) -> list[Batch]:
    loader = open_loader(kind, Beton(path), transform, threads)
    try:
        return list(loader.batches(epoch, order(**options)))
    finally:
        loader.close()


def images(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def assert_equal(got: list[Batch], want: list[Batch]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        for name in Batch._fields:
            assert torch.equal(getattr(one, name), getattr(other, name)), name
