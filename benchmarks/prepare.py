"""Images and MB per second of preparing JPEGs that are kept as they are, beside FFCV's writer and copying alone.

All begin with the same Parquet shards, in the operating system's cache, and end with files that are on the disk
(fsync). `copy` reads the shards and writes their bytes elsewhere; `copy + sha256` reads the copy again for its sum,
as a preparation does. `check alone` decodes the entropy coding of the same JPEGs from memory and does nothing else: the
floor of a full check. FFCV's `DatasetWriter` gets Pillow's images and encodes them anew; it has as many workers as
ours has threads. All take turns, and the median of the repeats counts.

    python benchmarks/prepare.py --data FOLDER --threads 2    # FOLDER holds train-*.parquet with a column `image`
    python benchmarks/prepare.py --synthetic --threads 2      # 500x375 JPEGs made up here, in shards of 1024

Needs FFCV. Run it on a machine that does nothing else.
"""

import argparse
import io
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from loader import synthetic
from machine import header, rounds
from PIL import Image

from bdkd_dist.config import Data
from bdkd_dist.data import jpeg
from bdkd_dist.data.converting import Rules, convert_all
from bdkd_dist.data.prepare import prepare_into
from bdkd_dist.data.prepared import sha256_of
from bdkd_dist.data.sources import Source, find_source

SHARD_IMAGES = 1024
MAX_SIDE_PX = 1024
Contestant = Callable[[Path], None]
"""Writes into a new folder."""


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        root = arguments.data if arguments.data else write_shards(Path(scratch) / "shards", arguments.images)
        data = Data(dataset="files", num_classes=10, image_px=224, root=str(root), max_side_px=MAX_SIDE_PX)
        source = find_source(data)
        source = Source(source.name, source.class_names, {"train": source.splits["train"]}, source.fingerprint)
        writers = contestants(source, root, arguments.threads)
        if jpeg.available():
            contents = [bytes(sample.image) for sample in source.splits["train"].iterate()]
            writers["check alone"] = partial(check_alone, contents, arguments.threads)
        seconds = measure(writers, Path(scratch), arguments.repeats)
        report(seconds, source, shard_bytes(root), arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", type=Path, help="folder with train-*.parquet")
    which.add_argument("--synthetic", action="store_true", help="make up 500x375 JPEGs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=4096, help="of --synthetic")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be written to")
    return parser.parse_args()


def write_shards(folder: Path, images: int) -> Path:
    folder.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content, "path": None} for content in synthetic(images)]
    for start in range(0, images, SHARD_IMAGES):
        some = rows[start : start + SHARD_IMAGES]
        labels = [(start + n) % 10 for n in range(len(some))]
        table = pa.table({"image": pa.array(some, kind), "label": labels})
        pq.write_table(table, folder / f"train-{start // SHARD_IMAGES:05d}.parquet", compression="none")
    return folder


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("train-*.parquet"))


def shard_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in shards(root))


def contestants(source: Source, root: Path, threads: int) -> dict[str, Contestant]:
    return {
        "full check": partial(ours, source, Rules(MAX_SIDE_PX), threads),
        "headers only": partial(ours, source, Rules(MAX_SIDE_PX, check="headers"), threads),
        "ffcv jpg": partial(ffcv, root, threads),
        "copy": partial(copy, root, threads, False),
        "copy + sha256": partial(copy, root, threads, True),
    }


def ours(source: Source, rules: Rules, threads: int, folder: Path) -> None:
    prepare_into(source, folder / "out", rules, lambda tasks, tell: convert_all(tasks, threads, tell))


class _Pictures:
    """What FFCV's writer indexes: Pillow's images of the shards' rows."""

    def __init__(self, root: Path) -> None:
        tables = [pq.read_table(path, columns=["image", "label"]) for path in shards(root)]
        table = pa.concat_tables(tables)
        self.contents = [row["bytes"] for row in table.column("image").to_pylist()]
        self.labels = table.column("label").to_pylist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.contents[index])).convert("RGB"), self.labels[index]


def ffcv(root: Path, threads: int, folder: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    folder.mkdir()
    path = folder / "train.beton"
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=threads).from_indexed_dataset(_Pictures(root))
    fsync(path)


def copy(root: Path, threads: int, checksum: bool, folder: Path) -> None:
    folder.mkdir()

    def one(path: Path) -> None:
        to = folder / path.name
        with path.open("rb") as source, to.open("wb") as target:
            while block := source.read(2**20):
                target.write(block)
        fsync(to)
        if checksum:
            sha256_of(to)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, shards(root)))


def check_alone(contents: list[bytes], threads: int, folder: Path) -> None:
    folder.mkdir()
    with ThreadPoolExecutor(threads) as pool:
        parts = [contents[start::threads] for start in range(threads)]
        list(pool.map(lambda part: [jpeg.check(content) for content in part], parts))


def fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def measure(contestants: dict[str, Contestant], scratch: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each contestant and repeat."""
    folder = scratch / "written"

    def clear() -> None:
        shutil.rmtree(folder)
        os.sync()

    return rounds({name: partial(write, folder) for name, write in contestants.items()}, repeats, after_each=clear)


def report(seconds: dict[str, list[float]], source: Source, num_bytes: int, arguments: argparse.Namespace) -> None:
    images = len(source.splits["train"])
    native = "native check" if jpeg.available() else "no native check"
    print(header(packages=["pyarrow", "pillow"]))
    print(
        f"{images} JPEGs of {num_bytes / images / 1e3:.0f} kB in {len(source.splits['train'].pieces)} shards; "
        f"{arguments.threads} threads or workers; {arguments.repeats} repeats; {native}"
    )
    print(f"{'':14}{'images/s':>10}{'MB/s':>8}{'slowest':>10}{'fastest':>10}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name:14}{images / median[name]:10.0f}{num_bytes / 1e6 / median[name]:8.0f}"
            f"{images / max(values):10.0f}{images / min(values):10.0f}"
        )
    for name in ("full check", "headers only"):
        for other in ("ffcv jpg", "copy", "copy + sha256"):
            print(f"{name}/{other} = {median[other] / median[name]:.2f}")
    if "check alone" in median:
        for other in ("full check", "ffcv jpg"):
            print(f"check alone/{other} = {median[other] / median['check alone']:.2f}")


if __name__ == "__main__":
    main()
