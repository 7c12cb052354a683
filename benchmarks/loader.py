"""Images per second of the two loaders, beside FFCV's own loader, torchvision's, and decoding alone.

All read the same JPEGs (in the operating system's cache) and make random resized crops of 224 px with flips, as for
ImageNet. torchvision's v2 transforms come twice, behind Pillow and behind its own decoder. `decode only` decodes every
JPEG in full with libjpeg-turbo (as FFCV calls it: the fast transform) and does nothing else: the floor that only a
loader can pass which decodes less. Every contestant has the same number of threads or processes.
Each first reads all images once, uncounted; then all take turns, and the median of the repeats counts.
Last comes the time from the start of a fresh Python to the first batch of our fast loader, its kernels compiled before.

    python benchmarks/loader.py --data FOLDER --threads 2     # FOLDER holds train-*.parquet with a column `image`
    python benchmarks/loader.py --synthetic --threads 2       # 500x375 JPEGs made up here

Needs FFCV. Run it on a machine that does nothing else.
"""

import argparse
import io
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from machine import header, rounds
from PIL import Image

from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.data.loader import open_loader
from bdkd_dist.data.order import epoch_order, rank_batches

PX = 224
Contestant = Callable[[], int]
"""Reads one epoch and returns the number of images."""


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder) / "images.beton"
        jpegs = synthetic(arguments.images) if arguments.synthetic else photographs(arguments.data, arguments.images)
        write(beton, list(jpegs))
        speeds = measure(contestants(beton, arguments.batch_size, arguments.threads), arguments.repeats)
        report(speeds, Beton(beton), arguments)
        report_start(beton, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder with train-*.parquet")
    source.add_argument("--synthetic", action="store_true", help="make up 500x375 JPEGs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def photographs(folder: Path, count: int) -> Iterator[bytes]:
    import pyarrow.parquet as pq

    left = count
    for shard in sorted(folder.glob("train-*.parquet")):
        for row in pq.read_table(shard, columns=["image"]).slice(0, left).to_pylist():
            left -= 1
            yield row["image"]["bytes"]


def synthetic(count: int) -> Iterator[bytes]:
    """Yield JPEGs of about 50 kB: smooth shapes and some grain."""
    for index in range(count):
        generator = np.random.default_rng(index)
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))
        grain = generator.normal(0, 6, (375, 500, 1))
        stream = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        yield stream.getvalue()


def write(path: Path, jpegs: list[bytes]) -> None:
    with BetonWriter(path, len(jpegs)) as writer:
        for index, content in enumerate(jpegs):
            with Image.open(io.BytesIO(content)) as image:
                writer.append_jpeg(content, image.height, image.width, index % 10)


def contestants(beton: Path, batch_size: int, threads: int) -> dict[str, Contestant]:
    return {
        "ffcv (ours)": ours("ffcv", beton, batch_size, threads),
        "torch (ours)": ours("torch", beton, batch_size, threads),
        "ffcv (stock)": stock_ffcv(beton, batch_size, threads),
        "torchvision (PIL)": torchvision(_Pillow(beton), batch_size, threads),
        "torchvision (own)": torchvision(_Decoded(beton), batch_size, threads),
        "decode only": decode_only(beton, threads),
    }


def ours(kind: str, beton: Path, batch_size: int, threads: int) -> Contestant:
    transform = Transform(PX, "resized", 0, 0.08, 4 / 3, True, 0.875, 0)
    loader = open_loader(kind, Beton(beton), transform, threads)  # type: ignore[arg-type]
    indices, numbers = np.arange(len(Beton(beton))), itertools.count()

    def epoch() -> int:
        number = next(numbers)
        batches = rank_batches(epoch_order(indices, 0, number), batch_size, 0, 1)
        return count(batch.images for batch in loader.batches(number, batches))

    return epoch


def stock_ffcv(beton: Path, batch_size: int, threads: int) -> Contestant:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    image = [RandomResizedCropRGBImageDecoder((PX, PX)), RandomHorizontalFlip(), ToTensor()]
    loader = Loader(
        str(beton),
        batch_size,
        threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    return lambda: count(batch[0] for batch in loader)


class _Pillow(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, beton: Path) -> None:
        from torchvision.transforms import v2

        self.beton = Beton(beton)
        self.transform = v2.Compose([v2.RandomResizedCrop(PX), v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.beton)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(io.BytesIO(self.beton.encoded(index).tobytes())) as image:
            return self.transform(image.convert("RGB")), int(self.beton.labels[index])


class _Decoded(_Pillow):
    def __init__(self, beton: Path) -> None:
        from torchvision.transforms import v2

        super().__init__(beton)
        self.transform = v2.Compose([v2.RandomResizedCrop(PX), v2.RandomHorizontalFlip()])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from torchvision.io import ImageReadMode, decode_jpeg

        encoded = torch.from_numpy(self.beton.encoded(index).copy())
        return self.transform(decode_jpeg(encoded, mode=ImageReadMode.RGB)), int(self.beton.labels[index])


def torchvision(images: _Pillow, batch_size: int, threads: int) -> Contestant:
    loader = torch.utils.data.DataLoader(
        images,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=threads,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
    return lambda: count(batch[0] for batch in loader)


def decode_only(beton: Path, threads: int) -> Contestant:
    from ffcv.libffcv import imdecode
    from numba import njit

    file = Beton(beton)
    native = njit(nogil=True)(imdecode)

    @njit(nogil=True)
    def decode(jpeg: np.ndarray, height: int, width: int, out: np.ndarray) -> int:
        return native(jpeg, out, height, width, height, width, 0, 0, 1, 1, False, False)

    def part(indices: np.ndarray) -> int:
        out = np.empty(int((file.heights[indices] * file.widths[indices]).max()) * 3, np.uint8)
        for index in indices:
            assert decode(file.encoded(index), file.heights[index], file.widths[index], out) == 0
        return len(indices)

    pool = ThreadPoolExecutor(threads)
    parts = np.array_split(np.arange(len(file)), -(-len(file) // 16))
    return lambda: sum(pool.map(part, parts))


def count(batches: Iterable[torch.Tensor]) -> int:
    return sum(len(images) for images in batches)


def measure(contestants: dict[str, Contestant], repeats: int) -> dict[str, list[float]]:
    """Return images/s of each contestant and repeat."""
    images = {name: epoch() for name, epoch in contestants.items()}  # the uncounted round
    seconds = rounds(contestants, repeats, warm_up=0)
    return {name: [images[name] / taken for taken in seconds[name]] for name in contestants}


def report(speeds: dict[str, list[float]], beton: Beton, arguments: argparse.Namespace) -> None:
    pixels = float(np.median(beton.heights * beton.widths)) ** 0.5
    print(header(packages=["torchvision", "numba", "pillow"]))
    print(
        f"{len(beton)} JPEGs, typically {pixels:.0f} px square; crops of {PX} px; "
        f"batches of {arguments.batch_size}; {arguments.threads} threads or processes; {arguments.repeats} repeats"
    )
    print(f"{'':18}{'images/s':>10}{'slowest':>10}{'fastest':>10}")
    for name, values in speeds.items():
        print(f"{name:18}{statistics.median(values):10.0f}{min(values):10.0f}{max(values):10.0f}")
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ours, floor = median["ffcv (ours)"], median["decode only"]
    best = max(median["torchvision (PIL)"], median["torchvision (own)"])
    print(f"torch/torchvision-PIL = {median['torch (ours)'] / median['torchvision (PIL)']:.2f}")
    print(f"ffcv/torch = {ours / median['torch (ours)']:.2f}")
    print(f"ffcv/stock-ffcv = {ours / median['ffcv (stock)']:.2f}")
    print(f"ffcv/best-torchvision = {ours / best:.2f}")
    print(f"ffcv/decode-only = {ours / floor:.2f}")


FIRST_BATCH = """
import sys, time
import numpy as np
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.loader import open_loader
loader = open_loader("ffcv", Beton(sys.argv[1]), Transform({px}, "resized", 0, 0.08, 4 / 3, True, 0.875, 0), {threads})
next(loader.batches(0, [np.arange({batch_size})]))
print(time.time())
"""


def report_start(beton: Path, arguments: argparse.Namespace) -> None:
    """Print the seconds from the start of a process to its first batch; its end is not counted."""
    code = FIRST_BATCH.format(px=PX, threads=arguments.threads, batch_size=arguments.batch_size)
    durations = []
    for _ in range(arguments.repeats):
        start = time.time()
        done = subprocess.run([sys.executable, "-c", code, str(beton)], check=True, capture_output=True, text=True)
        durations.append(float(done.stdout) - start)
    print(f"process start to first batch, warm: {statistics.median(durations):.2f} s")


if __name__ == "__main__":
    main()
