"""Shards to prepare, and preparations as the command makes them, some broken off."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from fake_sources import data, encode, noise, write_shard

from bdkd_dist.config import Data
from bdkd_dist.data.converting import Rules, convert_all
from bdkd_dist.data.prepare import Progress, prepare_into
from bdkd_dist.data.prepared import MANIFEST, Prepared
from bdkd_dist.data.sources import Piece, Sample, Source, SourceSplit, find_source, labelled

IMAGES = 20
SHARDS = {"train": 3, "test": 1}


def write_shards(tmp_path: Path) -> Data:
    """Four shards of 20 images, of which no two are alike."""
    for number, (split, count) in enumerate(SHARDS.items()):
        for shard in range(count):
            seed = 1000 * number + 100 * shard
            images: list[bytes | None] = [encode(noise(72, 72, seed + n), "JPEG") for n in range(IMAGES)]
            write_shard(tmp_path / "in" / f"{split}-{shard:05d}.parquet", images, [n % 2 for n in range(IMAGES)])
    return data(root=str(tmp_path / "in"), prepared=str(tmp_path / "cache"))


def into(
    out: Path, settings: Data, rules: Rules | None = None, progress: Progress | None = None, threads: int = 2
) -> Prepared:
    """Prepare as the command does."""
    convert = partial(convert_all, threads=threads)
    source = labelled(find_source(settings))
    return prepare_into(source, out, rules or Rules(), lambda tasks, tell: convert(tasks, tell=tell), progress)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WHOLE = [MANIFEST, "test-00000.beton", *(f"train-{n:05d}.beton" for n in range(3))]


class Cut(Exception):
    """What breaks a preparation off."""


def cut_after(images: int) -> Progress:
    def progress(split: str, done: int, total: int) -> None:
        if split == "train" and done >= images:
            raise Cut

    return progress


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def source_of(pieces: dict[str, list[list[bytes]]]) -> Source:
    """Return a source in memory, labelled 0, 1, 0, 1, … through each piece."""
    splits = {}
    for split, contents in pieces.items():
        made = []
        for number, images in enumerate(contents):
            labels = np.arange(len(images)) % 2
            size = sum(map(len, images))
            made.append(Piece(f"piece {number}", labels, partial(read, images, f"{split}-{number}"), size))
        splits[split] = SourceSplit(tuple(made))
    return Source("made", ("a", "b"), splits, "f" * 64)


def read(images: list[bytes], name: str) -> Iterator[Sample]:
    for row, image in enumerate(images):
        yield Sample(image, row % 2, f"{name} row {row}")


def prepare_made(source: Source, out: Path, rules: Rules) -> Prepared:
    return prepare_into(source, out, rules, lambda tasks, tell: convert_all(tasks, 2, tell))


def picture(seed: int) -> bytes:
    return encode(noise(72, 72, seed), "JPEG")
