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
import os
import tempfile
from pathlib import Path

import torch
from images import whole
from loader import photographs, synthetic, write
from machine import clock, header

from bdkd_dist import config
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.loader import Loader, chosen, open_loader
from bdkd_dist.data.order import epoch_order, rank_batches
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import Observers

CLASSES = 10
"""What `loader.write` deals out."""


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.beton"
        write(
            path, list(photographs(arguments.data, arguments.images) if arguments.data else synthetic(arguments.images))
        )
        recipe = recipe_of(arguments)
        loader = open_loader("auto", Beton(path), Transform.training(recipe.data, seed=0), arguments.threads)
        trainer = Trainer(recipe, whole(Beton(path), CLASSES), {}, device, Checkpoints(Path(folder)), Observers())
        waiting, training, images = measure(trainer, loader, arguments.epochs)
        loader.close()
    print(header(threads=True))
    print(
        f"{arguments.teacher} with {arguments.student}, {arguments.px} px, batch {arguments.batch_size}, "
        f"{chosen('auto')} loader with {arguments.threads} threads: {images / (waiting + training):.0f} images/s"
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


def recipe_of(arguments: argparse.Namespace) -> config.Recipe:
    overrides = {
        "models.teacher": arguments.teacher,
        "models.student": arguments.student,
        "data.image_px": arguments.px,
        "train.batch_size": arguments.batch_size,
        "train.precision": arguments.precision,
        "data.num_classes": CLASSES,
        "train.epochs": arguments.epochs + 1,
    }
    return config.load("imagenet_r34_r18", ["launch.device=auto", *(f"{k}={value}" for k, value in overrides.items())])


def measure(trainer: Trainer, loader: Loader, epochs: int) -> tuple[float, float, int]:
    """Return the seconds spent waiting for batches and in steps, and the number of images of those steps."""
    waiting = training = 0.0
    images = 0
    trainer.pair.train()
    for epoch in range(epochs + 1):
        order = epoch_order(trainer.dataset.train.indices, 0, epoch)
        loading = loader.batches(epoch, rank_batches(order, trainer.recipe.train.batch_size, 0, 1))
        trainer._train_step(next(loading))
        ended = clock(trainer.device)
        for batch in loading:
            before, arrived = ended, clock()
            trainer._train_step(batch)
            ended = clock(trainer.device)
            if epoch > 0:
                waiting += arrived - before
                training += ended - arrived
                images += len(batch.labels)
    return waiting, training, images


if __name__ == "__main__":
    main()
