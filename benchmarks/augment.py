"""Milliseconds of the resident loader's epochs and of what is done to batches on the device.

    .venv/bin/python benchmarks/augment.py [--images 50000] [--rounds 7] [--device cpu|cuda]

First an epoch of 32 px images in batches of 256 (as CIFAR's), read by the resident loader and, where FFCV is, by the
FFCV loader; each first reads one uncounted. Then batches of 256 images of 32 px and 64 of 224 px: appearance and
mixing, each sample by parameters of its own, beside torchvision's v2 transforms on the same tensors: called once for
the batch, so that all its samples share their parameters, and called for each image. Of v2's MixUp, which takes no
uint8, the images are float32 already. Contestants take turns, medians count.
"""

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from bdkd_dist.config import Data
from bdkd_dist.data.appearance import Appearance
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.data.loader import chosen, open_loader
from bdkd_dist.data.mixing import Mixing
from bdkd_dist.data.order import epoch_order, rank_batches

CLASSES = 100
JITTER = (0.4, 0.4, 0.4, 0.1)
Work = Callable[[int], object]
"""Takes the number of the round."""


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{datetime.date.today()}  {hardware} ({platform.machine()}), torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        epochs(Path(folder) / "images.beton", arguments.images, arguments.rounds, device)
    for count, px in ((256, 32), (64, 224)):
        batches(count, px, arguments.rounds, device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def epochs(path: Path, count: int, rounds: int, device: torch.device) -> None:
    generator = np.random.default_rng(0)
    with BetonWriter(path, count) as writer:
        for label in range(count):
            writer.append_raw(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8), label % CLASSES)
    beton, indices = Beton(path), np.arange(count)
    for crop in ("pad", "resized"):
        transform = Transform(32, crop, 4, 0.08, 4 / 3, True, 1.0, 0)  # type: ignore[arg-type]
        work: dict[str, Work] = {}
        for kind in ("resident", "ffcv") if chosen("auto") == "ffcv" else ("resident",):
            loader = open_loader(kind, beton, transform, torch.get_num_threads(), device=device)  # type: ignore[arg-type]

            def epoch(number: int, loader=loader) -> None:  # type: ignore[no-untyped-def]
                for _ in loader.batches(number, rank_batches(epoch_order(indices, 0, number), 256, 0, 1)):
                    pass

            work[kind] = epoch
        times = measure(work, rounds, device)
        line = ", ".join(f"{kind} {1e3 * s:.1f} ms ({count / s:,.0f} images/s)" for kind, s in times.items())
        ratio = f", ffcv/resident = {times['ffcv'] / times['resident']:.2f}" if "ffcv" in times else ""
        print(f"an epoch of {count:,} images of 32 px, crop={crop}: {line}{ratio}")


def batches(count: int, px: int, rounds: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (px, px), mode="bilinear").to(torch.uint8)
    images = smooth.permute(0, 2, 3, 1).contiguous().to(device)
    labels = torch.randint(0, CLASSES, (count,), generator=generator).to(device)
    print(f"\na batch of {count} images of {px} px, in ms")
    print(f"{'':<22}{'ours':>8}{'v2, batch':>11}{'v2, each':>10}{'batch/ours':>12}{'each/ours':>11}")
    for name, work in contestants(images, labels).items():
        times = measure(work, rounds, device)
        theirs = [times[kind] for kind in ("batch", "each") if kind in times]
        figures = [f"{1e3 * times['ours']:8.2f}"]
        if theirs:
            batch, each = f"{1e3 * theirs[0]:11.2f}", f"{1e3 * theirs[-1]:10.2f}" if len(theirs) > 1 else f"{'':10}"
            figures += [batch, each, *(f"{t / times['ours']:{12 - i}.2f}" for i, t in enumerate(theirs))]
        print(f"{name:<22}{''.join(figures)}")


def contestants(images: Tensor, labels: Tensor) -> dict[str, dict[str, Work]]:
    count, px = len(images), images.shape[1]
    indices, first = torch.arange(count), images.permute(0, 3, 1, 2)
    as_float = first.float()

    def ours(**augment: object) -> Work:
        data = Data(dataset="digits", num_classes=CLASSES, image_px=px, augment=augment)  # type: ignore[arg-type]
        appearance, mixing = Appearance.training(data, 0), Mixing.training(data, 0)
        return lambda epoch: mixing(appearance(images, indices, epoch), labels, indices, epoch, CLASSES)

    def theirs(transform: Callable[[Tensor], Tensor]) -> dict[str, Work]:
        return {"batch": lambda _: transform(first), "each": lambda _: [transform(image) for image in first]}

    names = ("brightness", "contrast", "saturation", "hue")
    jitter: dict[str, object] = dict(zip(names, JITTER, strict=True))
    mixup, cutmix = v2.MixUp(num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)
    everything = jitter | {"rand_ops": 2, "cutout_px": px // 4, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    return {
        "colour jitter": {"ours": ours(**jitter)} | theirs(v2.ColorJitter(*JITTER)),
        "RandAugment, 2 ops": {"ours": ours(rand_ops=2)} | theirs(v2.RandAugment(2)),
        "cutout": {"ours": ours(cutout_px=px // 4)} | theirs(v2.RandomErasing(1.0, (1 / 16, 1 / 16), (1, 1))),
        "mixup": {"ours": ours(mixup_alpha=1.0), "batch": lambda _: mixup(as_float, labels)},
        "cutmix": {"ours": ours(cutmix_alpha=1.0), "batch": lambda _: cutmix(first, labels)},
        "everything": {"ours": ours(**everything)},
    }


def measure(work: dict[str, Work], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each, after a round that compiles and allocates."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            began = time.perf_counter()
            run(number)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


if __name__ == "__main__":
    main()
