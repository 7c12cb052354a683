"""A run in this process, which needs no Ray."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from bdkd_dist.config import Recipe
from bdkd_dist.cores import usable_cores
from bdkd_dist.engine.control import Control, Wish
from bdkd_dist.engine.observer import Observer
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.worker import work

STOPPING = "stopping with a checkpoint; Ctrl-C again stops at once and loses what follows the last one"


def train(recipe: Recipe, folder: RunFolder, progress: Observer, warn: Callable[[str], None]) -> None:
    """Train in this process; Ctrl-C or SIGTERM finishes the step and checkpoints. :func:`work` says what it raises."""
    device = own_device(recipe)
    with stop_on_signal(warn) as pressed:
        work(recipe, folder, device, progress, _Pressed(pressed), warn)


def own_device(recipe: Recipe) -> torch.device:
    """Return where this process computes for the recipe; on the CPU with no more threads than it may use."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # torch does not see a container's limit
    return torch.device("cuda" if wants_cuda(recipe) else "cpu")


def wants_cuda(recipe: Recipe, gpus: float | None = None) -> bool:
    """Whether the recipe's workers compute on GPUs.

    Args:
        recipe: Says so, or leaves it to what there is.
        gpus: How many there are; by default those that torch sees here.
    """
    launch = recipe.launch
    there = torch.cuda.device_count() if gpus is None else gpus
    enough = there >= launch.min_workers * launch.gpus_per_worker
    return launch.device == "cuda" or (launch.device == "auto" and enough)


class _Pressed(Control):
    """Wants the run to stop once a signal came."""

    def __init__(self, pressed: Callable[[], bool]):
        self.pressed = pressed

    def wish(self) -> Wish:
        """See :meth:`Control.wish`."""
        return Wish.STOP if self.pressed() else Wish.GO_ON


@contextmanager
def stop_on_signal(warn: Callable[[str], None], line: str = STOPPING) -> Iterator[Callable[[], bool]]:
    """Yield a question whether Ctrl-C was pressed or SIGTERM came; a second Ctrl-C interrupts at once.

    SIGTERM is how a job, a container or a batch system is asked to end.

    Args:
        warn: Says one line to the person.
        line: What that is told at the first signal.
    """
    pressed = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not pressed:
            warn(line)
        pressed = True

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: pressed
    finally:
        for number, former in before.items():
            signal.signal(number, former)
