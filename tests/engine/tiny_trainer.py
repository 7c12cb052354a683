"""A trainer of small networks on random images, for the tests of the engine room."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bdkd_dist import config
from bdkd_dist.data.dataset import Dataset, Subset
from bdkd_dist.data.loader import Batch, Loader
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.control import Control, Wish
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import EvalLog, Observers, StepLog

SAMPLES = 38
"""No multiple of the batch: five batches of eight or seven."""


class Noise(Loader):
    """Random images, a function of the index; a real loader is tested with whole runs."""

    def batches(self, epoch: int, index_batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        for indices in index_batches:
            images = [
                torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(int(i))) for i in indices
            ]
            labels = torch.from_numpy(np.asarray(indices) % 3)
            yield Batch(torch.stack(images).to(torch.uint8), labels, torch.from_numpy(np.asarray(indices)))

    def close(self) -> None:
        pass


class Recorder(Observers):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[StepLog] = []
        self.evaluations: list[EvalLog] = []

    def stepped(self, log: StepLog) -> None:
        self.steps.append(log)

    def evaluated(self, log: EvalLog) -> None:
        self.evaluations.append(log)


class StopAt(Control):
    """Wants a stop once so many steps are done."""

    def __init__(self, step: int | None):
        self.step = step
        self.trainer: Trainer | None = None

    def wish(self) -> Wish:
        return Wish.STOP if self.trainer is not None and self.trainer.step == self.step else Wish.GO_ON


def trainer(
    folder: Path,
    *overrides: str,
    observer: Observers | None = None,
    stop_at: int | None = None,
    device: str = "cpu",
) -> Trainer:
    small = ["models.teacher=resnet8", "models.student=resnet8", "data.num_classes=3", "train.batch_size=8"]
    recipe = config.load("digits", [*small, "train.epochs=2", "schedule.warmup_epochs=0", *overrides])
    indices = np.arange(SAMPLES)
    subset = Subset(Path(), indices, indices % 3)
    dataset = Dataset(subset, subset, subset, ("a", "b", "c"), "fingerprint", "of test")
    loaders = {"train": Noise(), "validation": Noise()}
    control = StopAt(stop_at)
    made = Trainer(
        recipe,
        dataset,
        loaders,
        torch.device(device),
        Checkpoints(folder),
        observer or Observers(),
        control,
    )
    control.trainer = made
    return made


def final_state(folder: Path, world: int, *overrides: str) -> dict[str, Any]:
    """Train on so many gloo ranks, a process each, and return the last checkpoint."""
    folder.mkdir()
    mp.spawn(_rank_main, (world, str(folder), overrides), nprocs=world)
    state = Checkpoints(folder / "checkpoints").load_newest()
    assert state is not None
    return state


def _rank_main(rank: int, world: int, folder: str, overrides: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    trainer(Path(folder) / "checkpoints", *overrides).run()
    if world > 1:
        dist.barrier()  # a rank that leaves while another still talks to it can crash that one
        dist.destroy_process_group()
