"""A run in this process: Ray Train's in-process mode where Ray is installed, plain torch where it is not."""

import importlib.util
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from bdkd_dist.config import Recipe
from bdkd_dist.engine.observer import Observer
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.worker import work


def train(recipe: Recipe, folder: RunFolder, progress: Observer, warn: Callable[[str], None]) -> None:
    """Train in this process; Ctrl-C once finishes the step and checkpoints. See :func:`work` for what it raises."""
    device = torch.device("cuda" if wants_cuda(recipe) else "cpu")
    with stop_on_sigint(warn) as should_stop:

        def worker() -> None:
            work(recipe, folder, device, progress, should_stop, warn)

        if importlib.util.find_spec("ray") is None:
            worker()
            return
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # says at length that this is the local mode
        from ray.train import ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(worker, scaling_config=ScalingConfig(num_workers=0)).fit()


def wants_cuda(recipe: Recipe) -> bool:
    """Whether the recipe's workers compute on GPUs here."""
    enough = torch.cuda.device_count() >= recipe.launch.workers
    return recipe.launch.device == "cuda" or (recipe.launch.device == "auto" and enough)


@contextmanager
def stop_on_sigint(warn: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yield a question whether Ctrl-C was pressed; pressed a second time it interrupts at once."""
    pressed = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        warn("stopping with a checkpoint; Ctrl-C again stops at once and loses what follows the last one")

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
