"""Share of a training step that is not the two networks' own forward and backward.

    .venv/bin/python benchmarks/step.py [--recipe cifar100_r56_r20] [--batch-size 64] [--rounds 15]

Ours is ``Trainer``'s whole step on a batch in memory: normalisation, both networks, objective, backward, optimiser,
records. The floor is both networks' forward and backward on the same normalised batch with a fixed gradient at the
logits. Rounds alternate, medians count; the last line is the share.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from images import whole, write_raw
from machine import Work, header, rounds

from bdkd_dist import config
from bdkd_dist.data.loader import Batch
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import Observers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar100_r56_r20")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    overrides = [f"train.batch_size={arguments.batch_size}"]
    recipe = config.load(arguments.recipe, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = trainer_of(recipe, device)
    batch = random_batch(recipe, device)
    work: dict[str, Work] = {"step": lambda: trainer._train_step(batch), "networks": floor(trainer, batch)}
    times = rounds(work, arguments.rounds, warm_up=2, device=device)
    step, networks = (statistics.median(times[name]) for name in ("step", "networks"))
    print(header(threads=True))
    print(
        f"{arguments.recipe}, batch {arguments.batch_size}: step {1e3 * step:.2f} ms, networks {1e3 * networks:.2f} ms"
    )
    print(f"share of the step outside the networks: {100 * (step - networks) / step:.1f} %")


def trainer_of(recipe: config.Recipe, device: torch.device) -> Trainer:
    """A trainer that gets its batches by hand: of its data set only the size matters."""
    count = 10 * recipe.train.batch_size
    with tempfile.TemporaryDirectory() as folder:
        beton = write_raw(
            Path(folder) / "images.beton", np.zeros((count, 1, 1, 3), np.uint8), np.zeros(count, np.int64)
        )
        dataset = whole(beton, recipe.data.num_classes)
        trainer = Trainer(recipe, dataset, {}, device, Checkpoints(Path(folder)), Observers())
    trainer.pair.train()
    return trainer


def random_batch(recipe: config.Recipe, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size, px = recipe.train.batch_size, recipe.data.image_px
    images = torch.randint(0, 256, (size, px, px, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, recipe.data.num_classes, (size,), generator=generator)
    return Batch(images.to(device), labels.to(device), torch.arange(size))


def floor(trainer: Trainer, batch: Batch) -> Work:
    """Both networks' forward and backward alone."""
    pixels = trainer.pair.normalise(batch.images)
    networks = list(trainer.pair.networks.values())
    gradient = torch.randn(len(pixels), trainer.recipe.data.num_classes, device=pixels.device) / len(pixels)

    def run() -> None:
        with trainer.pair.autocast(pixels.device):
            logits = [network(pixels) for network in networks]
        torch.autograd.backward(logits, [gradient.to(part.dtype) for part in logits])
        for network in networks:
            network.zero_grad(set_to_none=True)

    return run


if __name__ == "__main__":
    main()
