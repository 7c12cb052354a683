"""Train a recipe, or evaluate a run: the command lines without the command line."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bdkd_dist import config
from bdkd_dist.config import Data, Recipe
from bdkd_dist.data.dataset import Dataset, find_prepared, load_dataset, open_dataset
from bdkd_dist.data.foreign import prepare_foreign
from bdkd_dist.data.loader import chosen
from bdkd_dist.data.order import num_batches
from bdkd_dist.data.prepared import verify
from bdkd_dist.engine.checkpoint import Checkpoints, load
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import Observers
from bdkd_dist.errors import UserError
from bdkd_dist.launch import local, preflight, worker
from bdkd_dist.launch.prepare import preparing
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.records.environment import write_environment
from bdkd_dist.records.files import atomic_write
from bdkd_dist.records.progress import Progress


def train(recipe: Recipe, console: Console) -> RunFolder:
    """Train the recipe to its end, going on from a checkpoint where its run folder holds one.

    Raises:
        UserError: Something that the user can mend, found before any work.
        Interrupted: Ctrl-C; the state is kept.
        Diverged: A loss is not finite.
    """
    folder = RunFolder.of(recipe)
    preflight.check(recipe, folder)
    with folder.locked():
        folder.check_owner(recipe)
        if folder.finished:
            console.print(f"{folder.path} is finished; to train again choose another run.name or delete it")
            return folder
        dataset = prepared(recipe.data, console)
        check_fits(recipe, dataset)
        atomic_write(folder.recipe, recipe.to_yaml().encode())
        write_environment(folder.environment)
        _, *students = recipe.models.by_role.values()
        console.print(
            f"training {recipe.models.teacher} → {' + '.join(students)} with {recipe.objective.name} on "
            f"{len(dataset.train.indices):,} images ({len(dataset.validation.indices):,} validation, "
            f"{len(dataset.test.indices):,} test), {recipe.launch.workers} worker(s), "
            f"loader {chosen(recipe.data.loader)}, in {folder.path}",
            highlight=False,
            soft_wrap=True,
        )
        progress = Progress(recipe.train.epochs, console)
        warn = lambda line: console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)  # noqa: E731
        try:
            if recipe.launch.workers == 1:
                local.train(recipe, folder, progress, warn)
            else:
                from bdkd_dist.launch import ray_train

                ray_train.train(recipe, folder, progress, warn)
        finally:
            progress.close()
    return folder


def evaluate(
    run: Path, overrides: Sequence[str], console: Console, shift: bool = False, ood: str | None = None
) -> RunFolder:
    """Evaluate a run's newest checkpoint, or the checkpoint given; write results, figures and predictions.

    Those of a finished run's last checkpoint go where the run's end put them; those of any other checkpoint into
    ``evaluations/step-…`` of the run folder, so that the run can go on.

    Args:
        run: A run folder or a file in its ``checkpoints``.
        overrides: For this evaluation alone, e.g. ``data.root=…`` where the images lie elsewhere now.
        console: Where progress goes.
        shift: Measure under corruptions of the test images too.
        ood: Compare confidence on the images of this data set too: a folder as ``data.root`` takes, or ``digits``.

    Returns:
        The folder that holds the results.
    """
    from bdkd_dist.launch.shift import record_ood, record_shift  # imports torchvision, which training may not need

    run = run.resolve()
    folder = RunFolder(run.parent.parent if run.is_file() else run)
    recipe = _overridden(folder.read_recipe(), overrides)
    recipe = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"workers": 1})})
    preflight.check(recipe, folder)
    checkpoints = _Only(run) if run.is_file() else Checkpoints(folder.checkpoints)
    if not checkpoints.paths():
        raise UserError(f"{folder.path} holds no checkpoint yet")
    with preparing(console) as show:
        dataset = load_dataset(recipe.data, show)
        other = None if ood is None else (ood, prepare_foreign(ood, recipe.data, show))
    device = torch.device("cuda" if local.wants_cuda(recipe) else "cpu")
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        loaders = worker.open_loaders(recipe, dataset, device, stack)
        trainer = Trainer(recipe, dataset, loaders, device, checkpoints, Observers())
        last = folder.finished and trainer.epoch == recipe.train.epochs
        target = folder if last else RunFolder(folder.path / "evaluations" / f"step-{trainer.step:08d}")
        worker.finish(trainer, target)
        if shift:
            record_shift(trainer, target, console)
        if other is not None:
            record_ood(trainer, *other, target)
    return target


def prepared(data: Data, console: Console) -> Dataset:
    """Return the data set as it lies, preparing it with a progress bar where that was not done before.

    Where workers read from copies near them, those are checked instead.
    """
    with preparing(console) as show:
        found = find_prepared(data, show)
    if data.stage == "shared":
        verify(found)
    return open_dataset(found, data)


def check_fits(recipe: Recipe, dataset: Dataset) -> None:
    """Raise UserError where the recipe asks for more than the data set holds."""
    images, batch, workers = len(dataset.train), recipe.train.batch_size, recipe.launch.workers
    if batch > images:
        raise UserError(f"train.batch_size={batch}: larger than the {images:,} training images")
    if (smallest := images // num_batches(images, batch)) < 2 * workers:
        raise UserError(
            f"train.batch_size={batch}: a batch of {smallest} leaves less than two images to some of "
            f"launch.workers={workers}"
        )


class _Only(Checkpoints):
    """One checkpoint, chosen by its path."""

    def __init__(self, path: Path):
        super().__init__(path.parent)
        self._path = path

    def paths(self) -> list[Path]:
        return [self._path]

    def load_newest(self) -> dict[str, Any]:
        try:
            return load(self._path)
        except Exception as error:  # as Checkpoints: torch raises many kinds
            raise UserError(f"{self._path} is not a whole checkpoint ({type(error).__name__})") from None


def _overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    changed = config.override(recipe, overrides)
    for key, there, here in config.differences(recipe, changed):
        raise UserError(
            f"{key}={here}: the run was trained with {there}; only {', '.join(config.NOT_IDENTITY)} change here"
        )
    return changed
