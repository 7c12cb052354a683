"""Share of a training step that is not the two networks' own forward and backward.

    .venv/bin/python benchmarks/step.py [--recipe cifar100_r56_r20] [--batch-size 64] [--rounds 15]

Ours is ``Trainer``'s whole step on a batch in memory: normalisation, both networks, objective, backward, optimiser,
records. The floor is both networks' forward and backward on the same normalised batch with a fixed gradient at the
logits. Rounds alternate, medians count; the last line is the share.
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

from bdkd_dist import config
from bdkd_dist.data.dataset import Dataset, Subset
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
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, placeholder(recipe), {}, device, Checkpoints(Path(folder)), Observers())
    trainer.pair.train()
    batch = random_batch(recipe, device)
    times: dict[str, list[float]] = {"step": [], "networks": []}
    work: dict[str, Callable[[], None]] = {
        "step": lambda: trainer._train_step(batch),
        "networks": floor(trainer, batch),
    }
    for round_ in range(arguments.rounds + 2):
        for name, run in work.items():
            seconds = timed(run, device)
            if round_ >= 2:  # the first rounds allocate
                times[name].append(seconds)
    step, networks = (statistics.median(times[name]) for name in ("step", "networks"))
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{datetime.date.today()}  {hardware} ({platform.machine()}), torch {torch.__version__}")
    print(
        f"{arguments.recipe}, batch {arguments.batch_size}: step {1e3 * step:.2f} ms, networks {1e3 * networks:.2f} ms"
    )
    print(f"share of the step outside the networks: {100 * (step - networks) / step:.1f} %")


def placeholder(recipe: config.Recipe) -> Dataset:
    """A data set of the right size; no image of it is read."""
    subset = Subset(Path(), np.arange(10 * recipe.train.batch_size), np.zeros(10 * recipe.train.batch_size, np.int64))
    return Dataset(subset, subset, subset, tuple(map(str, range(recipe.data.num_classes))), "", "")


def random_batch(recipe: config.Recipe, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size, px = recipe.train.batch_size, recipe.data.image_px
    images = torch.randint(0, 256, (size, px, px, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, recipe.data.num_classes, (size,), generator=generator)
    return Batch(images.to(device), labels.to(device), torch.arange(size))


def floor(trainer: Trainer, batch: Batch) -> Callable[[], None]:
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


def timed(run: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
