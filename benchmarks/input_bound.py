r"""Share of training's time that is spent waiting for the loader.

    .venv/bin/python benchmarks/input_bound.py         # small networks, for a machine without a GPU
    .venv/bin/python benchmarks/input_bound.py --teacher resnet34 --student resnet18 --px 224 --batch-size 256 \
        --precision bf16 --images 8192

The steps are ``Trainer``'s, on random resized crops of 500x375 JPEGs made up here (``--data FOLDER`` takes those of
train-*.parquet instead); FFCV's loader is used where it is, else torch's. Each step is waited for, so that what
is counted as waiting for the loader is nothing else; the epoch's first batch, on which the loader starts, is left out.
The last line is the share.
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from loader import photographs, synthetic, write

from bdkd_dist import config
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.dataset import Dataset, Subset
from bdkd_dist.data.loader import Loader, chosen, open_loader
from bdkd_dist.data.order import epoch_order, rank_batches
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import Observers


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.beton"
        write(
            path, list(photographs(arguments.data, arguments.images) if arguments.data else synthetic(arguments.images))
        )
        recipe = recipe_of(arguments, device)
        loader = open_loader("auto", Beton(path), Transform.training(recipe.data, seed=0), arguments.threads)
        trainer = Trainer(recipe, dataset(Beton(path)), {}, device, Checkpoints(Path(folder)), Observers())
        waiting, training, images = measure(trainer, loader, arguments.epochs)
        loader.close()
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{datetime.date.today()}  {hardware}, {os.cpu_count()} cores ({platform.machine()}), "
        f"torch {torch.__version__}, {chosen('auto')} loader with {arguments.threads} threads"
    )
    print(
        f"{arguments.teacher} with {arguments.student}, {arguments.px} px, batch {arguments.batch_size}: "
        f"{images / (waiting + training):.0f} images/s"
    )
    print(f"share of the time spent waiting for the loader: {100 * waiting / (waiting + training):.1f} %")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--data", type=Path, help="folder with train-*.parquet")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=3, help="counted ones; one more comes before")
    return parser.parse_args()


def recipe_of(arguments: argparse.Namespace, device: torch.device) -> config.Recipe:
    overrides = {
        "models.teacher": arguments.teacher,
        "models.student": arguments.student,
        "data.image_px": arguments.px,
        "train.batch_size": arguments.batch_size,
        "train.precision": arguments.precision,
        "data.num_classes": 10,
        "train.epochs": arguments.epochs + 1,
    }
    return config.load("imagenet_r34_r18", ["launch.device=auto", *(f"{k}={value}" for k, value in overrides.items())])


def dataset(beton: Beton) -> Dataset:
    subset = Subset(beton, np.arange(len(beton)), beton.labels)
    return Dataset(subset, subset, subset, tuple(map(str, range(10))), "", "")


def measure(trainer: Trainer, loader: Loader, epochs: int) -> tuple[float, float, int]:
    """Return the seconds spent waiting for batches and in steps, and the number of images of those steps."""
    waiting = training = 0.0
    images = 0
    trainer.pair.train()
    for epoch in range(epochs + 1):
        order = epoch_order(trainer.dataset.train.indices, 0, epoch)
        loading = loader.batches(epoch, rank_batches(order, trainer.recipe.train.batch_size, 0, 1))
        trainer._train_step(next(loading))
        clock = finished(trainer.device)
        for batch in loading:
            arrived = time.perf_counter()
            trainer._train_step(batch)
            ended = finished(trainer.device)
            if epoch > 0:
                waiting, training, images = (
                    waiting + arrived - clock,
                    training + ended - arrived,
                    images + len(batch.labels),
                )
            clock = ended
    return waiting, training, images


def finished(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
