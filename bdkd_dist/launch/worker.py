"""One training process from end to end: data, pair, loop, final evaluation, records. The same under every launcher."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from bdkd_dist import distributed
from bdkd_dist.config import Recipe
from bdkd_dist.cores import usable_cores
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.dataset import Dataset, load_dataset
from bdkd_dist.data.loader import Loader, open_loader
from bdkd_dist.data.order import rank_shard
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.control import Control
from bdkd_dist.engine.evaluate import Outputs, calibrated, predictions
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import NetworkDiagnosis, Observer, Observers
from bdkd_dist.engine.patience import patiently
from bdkd_dist.errors import UserError, first_line
from bdkd_dist.launch.mirror import BEAT_S, RunCheckpoints
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.records.figures import reliability_figure, save_png
from bdkd_dist.records.metric_lines import MetricLines
from bdkd_dist.records.predictions import write_predictions
from bdkd_dist.records.results import write_results
from bdkd_dist.records.tensorboard import TensorBoardObserver

FINISHED_WITHIN_S = 3600.0
"""Calibrating, drawing and sending the results take minutes; what takes longer than this hangs."""


def work(
    recipe: Recipe,
    folder: RunFolder,
    device: torch.device,
    progress: Observer,
    control: Control,
    warn: Callable[[str], None],
) -> None:
    """Train to the end, or on from the folder's newest checkpoint, and write the results.

    Args:
        recipe: What to train.
        folder: Where everything is kept; the recipe's own.
        device: Where this rank computes.
        progress: Shows the run to a person; told on rank 0.
        control: Told of every step, and asked between steps what is wanted.
        warn: Says one line to the person.

    Raises:
        Superseded: Another attempt at the run began; nothing more is written.
        Interrupted: ``control`` wants it to stop; the same command goes on.
        Diverged: A loss is not finite.
        UserError: The batch does not fit into the device's memory, or the data are not what they were.
    """
    observers = [progress]
    if distributed.rank() == 0:
        observers = [TensorBoardObserver(folder.path, recipe.to_yaml()), MetricLines(folder.path), progress]
    with training(recipe, folder, device, observers, control, warn) as trainer, enough_memory(recipe):
        trainer.run()
        trainer.checkpoints.wait()
        finish(trainer, folder)


@contextmanager
def training(
    recipe: Recipe,
    folder: RunFolder,
    device: torch.device,
    observers: Sequence[Observer],
    control: Control,
    warn: Callable[[str], None],
) -> Iterator[Trainer]:
    """Yield the trainer of this rank at the newest checkpoint, with its loaders open; see :func:`work`.

    Args:
        recipe: What to train.
        folder: Where everything is kept; the recipe's own.
        device: Where this rank computes.
        observers: Told of the run on rank 0.
        control: Told of every step, and asked between steps what is wanted.
        warn: Says one line to the person.
    """
    dataset = load_dataset(recipe.data)
    distributed.meet()  # who lacks the images has left, and the others need not wait for it
    with ExitStack() as stack:
        loaders = open_loaders(recipe, dataset, device, stack)
        observer = Observers()
        checkpoints = Checkpoints(Path(str(folder)) / "checkpoints", warn)  # rank 0 alone reads and writes
        if distributed.rank() == 0:
            checkpoints = stack.enter_context(RunCheckpoints(folder, warn, control.beat))
            observer = Observers(observers)
        stack.callback(observer.close)
        yield Trainer(recipe, dataset, loaders, device, checkpoints, observer, control)


def for_evaluation(recipe: Recipe) -> Recipe:
    """Return the recipe for one process that only evaluates: what is compiled or recorded would not pay."""
    launch, train = recipe.launch.model_copy(update={"workers": 1}), recipe.train.model_copy(update={"compile": False})
    return recipe.model_copy(update={"launch": launch, "train": train})


@contextmanager
def enough_memory(recipe: Recipe) -> Iterator[None]:
    """Say in one line that the batch does not fit into the device's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"train.batch_size={recipe.train.batch_size}: the device's memory is too small ({first_line(error)}); "
            "take a smaller batch, more workers, or train.precision=bf16"
        ) from None


def open_loaders(recipe: Recipe, dataset: Dataset, device: torch.device, stack: ExitStack) -> dict[str, Loader]:
    """Return the loaders of the three splits; the stack closes them."""
    threads = loader_threads(recipe)
    evaluation = Transform.evaluation(recipe.data)
    transforms = {
        "train": Transform.training(recipe.data, recipe.train.seed),
        "validation": evaluation,
        "test": evaluation,
    }
    loaders = {}
    for split, transform in transforms.items():
        beton = getattr(dataset, split).beton
        # An evaluation reads in the files' order, and where it is a part of the training images few of each page.
        cache = recipe.data.cache if split == "train" else "os"
        loader = open_loader(recipe.data.loader, beton, transform, threads, cache, device)
        stack.callback(loader.close)
        loaders[split] = loader
    return loaders


def loader_threads(recipe: Recipe) -> int:
    """Return the loader's threads or processes of this worker: by default its share of the cores."""
    return recipe.data.threads or max(1, usable_cores() // distributed.local_world_size())


def finish(trainer: Trainer, folder: RunFolder) -> None:
    """Evaluate validation and test with the networks as they are; write results, figures and predictions."""
    recipe, dataset = trainer.recipe, trainer.dataset
    outputs, evaluator = {}, trainer.precise_evaluator()
    for split in ("validation", "test"):
        indices = getattr(dataset, split).indices
        batches = rank_shard(indices, recipe.train.batch_size, trainer.rank, trainer.world)
        outputs[split] = evaluator.outputs(trainer.loaders[split].batches(0, batches))
    with beating(trainer.control.beat):
        _record(trainer, folder, outputs["validation"], outputs["test"])


@contextmanager
def beating(beat: Callable[[], None]) -> Iterator[None]:
    """Call ``beat`` every second of a block that has no steps, for :data:`FINISHED_WITHIN_S` at most."""
    ended, until = threading.Event(), time.monotonic() + FINISHED_WITHIN_S

    def run() -> None:
        while not ended.wait(BEAT_S) and time.monotonic() < until:
            beat()

    thread = threading.Thread(target=run, name="beating", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _record(trainer: Trainer, folder: RunFolder, validation: Outputs, test: Outputs) -> None:
    recipe, dataset = trainer.recipe, trainer.dataset
    results, states = calibrated(validation, test, recipe.data.num_classes)
    gathered = predictions(test)
    if gathered is None:
        return
    checkpoints = trainer.checkpoints
    checkpoints.check()

    def write() -> None:
        indices, labels, networks = gathered
        folder.predictions.mkdir(parents=True, exist_ok=True)
        write_predictions(folder.predictions / "test.parquet", indices, labels, networks, dataset.class_names)
        folder.figures.mkdir(exist_ok=True)
        for split, by_network in states.items():
            diagnoses = {
                name: NetworkDiagnosis(state.compute(), state.reliability()) for name, state in by_network.items()
            }
            save_png(reliability_figure(diagnoses), folder.figures / f"reliability_{split}.png")

    patiently(write, checkpoints.warn, checkpoints.pause)
    folder.push(folder.predictions, folder.figures, say=checkpoints.warn)
    # Last: a folder with results is a finished run.
    said = {
        **results,
        "step": trainer.step,
        "epochs": trainer.epoch,
        # The test images' own: runs that differ in their training images alone can be compared.
        "data": {"fingerprint": dataset.fingerprint, "test_fingerprint": dataset.test_fingerprint},
    }
    patiently(lambda: write_results(folder.results, said), checkpoints.warn, checkpoints.pause)
    folder.push(folder.results, say=checkpoints.warn)
