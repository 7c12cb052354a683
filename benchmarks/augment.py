"""Milliseconds of the resident loader's epochs and of what is done to batches on the device.

    .venv/bin/python benchmarks/augment.py [--images 50000] [--rounds 7] [--device cpu|cuda]

First an epoch of 32 px images in batches of 256 (as CIFAR's), read by the resident loader and, where FFCV is, by the
FFCV loader; each first reads one uncounted. Then batches of 256 images of 32 px and 64 of 224 px: appearance and
mixing, each sample by parameters of its own, beside torchvision's v2 transforms on the same tensors: called once for
the batch, so that all its samples share their parameters, and called for each image. Of v2's MixUp, which takes no
uint8, the images are float32 already. Contestants take turns, medians count.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from images import write_raw
from machine import Work, header, rounds
from torch import Tensor
from torchvision.transforms import v2

from bdkd_dist.config import Augmentation, Data
from bdkd_dist.data.appearance import Appearance
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.loader import Loader, chosen, open_loader
from bdkd_dist.data.mixing import Mixing
from bdkd_dist.data.order import epoch_order, rank_batches

CLASSES = 100
JITTER = (0.4, 0.4, 0.4, 0.1)


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    print(header(threads=True, packages=["torchvision"]))
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


def epochs(path: Path, count: int, num_rounds: int, device: torch.device) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    beton = write_raw(path, pixels, np.arange(count) % CLASSES)
    crops: tuple[Literal["pad", "resized"], ...] = ("pad", "resized")
    kinds: tuple[Literal["resident", "ffcv"], ...] = ("resident", "ffcv")
    for crop in crops:
        transform = Transform(32, crop, 4, 0.08, 4 / 3, True, 1.0, 0)
        work: dict[str, Work] = {
            kind: reading(open_loader(kind, beton, transform, torch.get_num_threads(), device=device), count)
            for kind in kinds[: 2 if chosen("auto") == "ffcv" else 1]
        }
        times = medians(work, num_rounds, device)
        line = ", ".join(f"{kind} {1e3 * s:.1f} ms ({count / s:,.0f} images/s)" for kind, s in times.items())
        ratio = f", ffcv/resident = {times['ffcv'] / times['resident']:.2f}" if "ffcv" in times else ""
        print(f"an epoch of {count:,} images of 32 px, crop={crop}: {line}{ratio}")


def reading(loader: Loader, count: int) -> Work:
    """An epoch, each time the next one."""
    indices, numbers = np.arange(count), itertools.count()

    def epoch() -> None:
        number = next(numbers)
        for _ in loader.batches(number, rank_batches(epoch_order(indices, 0, number), 256, 0, 1)):
            pass

    return epoch


def batches(count: int, px: int, num_rounds: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (px, px), mode="bilinear").to(torch.uint8)
    images = smooth.permute(0, 2, 3, 1).contiguous().to(device)
    labels = torch.randint(0, CLASSES, (count,), generator=generator).to(device)
    print(f"\na batch of {count} images of {px} px, in ms")
    print(f"{'':<22}{'ours':>8}{'v2, batch':>11}{'v2, each':>10}{'batch/ours':>12}{'each/ours':>11}")
    for name, work in contestants(images, labels).items():
        times = medians(work, num_rounds, device)
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

    def ours(**augment: Any) -> Work:
        data = Data(dataset="digits", num_classes=CLASSES, image_px=px, augment=Augmentation(**augment))
        appearance, mixing, epochs = Appearance.training(data, 0), Mixing.training(data, 0), itertools.count()

        def batch() -> None:
            epoch = next(epochs)
            mixing(appearance(images, indices, epoch), labels, indices, epoch, CLASSES)

        return batch

    def theirs(transform: Callable[[Tensor], Tensor]) -> dict[str, Work]:
        return {"batch": lambda: transform(first), "each": lambda: [transform(image) for image in first]}

    names = ("brightness", "contrast", "saturation", "hue")
    jitter: dict[str, Any] = dict(zip(names, JITTER, strict=True))
    mixup, cutmix = v2.MixUp(num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)
    everything = jitter | {"rand_ops": 2, "cutout_px": px // 4, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    return {
        "colour jitter": {"ours": ours(**jitter)} | theirs(v2.ColorJitter(*JITTER)),
        "RandAugment, 2 ops": {"ours": ours(rand_ops=2)} | theirs(v2.RandAugment(2)),
        "cutout": {"ours": ours(cutout_px=px // 4)} | theirs(v2.RandomErasing(1.0, (1 / 16, 1 / 16), (1, 1))),
        "mixup": {"ours": ours(mixup_alpha=1.0), "batch": lambda: mixup(as_float, labels)},
        "cutmix": {"ours": ours(cutmix_alpha=1.0), "batch": lambda: cutmix(first, labels)},
        "everything": {"ours": ours(**everything)},
    }


def medians(work: dict[str, Work], num_rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each."""
    return {name: statistics.median(taken) for name, taken in rounds(work, num_rounds, device=device).items()}


if __name__ == "__main__":
    main()
