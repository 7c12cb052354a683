"""Train a recipe, or evaluate a run: the command lines without the command line."""

from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console

from bdkd_dist import config
from bdkd_dist.config import Data, Recipe
from bdkd_dist.data.dataset import Dataset, find_prepared, load_dataset, open_dataset
from bdkd_dist.data.foreign import prepare_foreign
from bdkd_dist.data.loader import chosen
from bdkd_dist.data.order import num_batches
from bdkd_dist.data.prepared import verify
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import Observers
from bdkd_dist.errors import UserError
from bdkd_dist.launch import local, named_run, preflight, worker
from bdkd_dist.launch.prepare import preparing
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.records.printing import warner
from bdkd_dist.records.progress import Progress


def train(recipe: Recipe, console: Console, address: str | None = None) -> RunFolder:
    """Train the recipe to its end, going on from a checkpoint where its run folder holds one.

    Args:
        recipe: What to train.
        console: Where progress goes.
        address: Of the Ray cluster whose nodes train; without one this machine does.

    Raises:
        UserError: Something that the user can mend, found before any work.
        Interrupted: Ctrl-C; the state is kept.
        Diverged: A loss is not finite.
    """
    folder = RunFolder.of(recipe)
    preflight.check(recipe, folder, on_cluster=address is not None)
    warn = warner(console)
    with folder.locked(warn):
        folder.check_owner(recipe)
        if folder.finished:
            console.print(f"{folder} is finished; to train again choose another run.name or delete it", soft_wrap=True)
            folder.fetch("results.json", say=warn)
            return folder
        dataset = prepared(recipe.data, console)
        check_fits(recipe, dataset)
        folder.describe(recipe, warn)
        _, *students = recipe.models.by_role.values()
        console.print(
            f"training {recipe.models.teacher} → {' + '.join(students)} with {recipe.objective.name} on "
            f"{len(dataset.train.indices):,} images ({len(dataset.validation.indices):,} validation, "
            f"{len(dataset.test.indices):,} test), {workers(recipe)} worker(s), "
            f"loader {chosen(recipe.data.loader)}, in {folder}",
            highlight=False,
            soft_wrap=True,
        )
        schedule, epochs = recipe.schedule, recipe.train.epochs
        if schedule.kind == "step" and schedule.milestones[0] >= epochs:
            warn(
                f"schedule.milestones={list(schedule.milestones)}: none comes within train.epochs={epochs}, the "
                "learning rate stays what it is; set them too, or schedule.kind=cosine"
            )
        progress = Progress(epochs, console)
        try:
            if address is None and recipe.launch.max_workers == 1:
                local.train(recipe, folder, progress, warn)
            else:
                from bdkd_dist.launch import ray_train

                ray_train.train(recipe, progress, warn, address)
        finally:
            progress.close()
        folder.fetch("results.json", say=warn)
    return folder


def evaluate(
    run: str, overrides: Sequence[str], console: Console, shift: bool = False, ood: str | None = None
) -> RunFolder:
    """Evaluate a run's newest checkpoint, or the checkpoint given; write results, figures and predictions.

    Those of a finished run's last checkpoint go where the run's end put them; those of any other checkpoint into
    ``evaluations/step-…`` of the run folder, so that the run can go on.

    Args:
        run: Path or URI of a run folder or of a file in its ``checkpoints``.
        overrides: For this evaluation alone, e.g. ``data.root=…`` where the images lie elsewhere now.
        console: Where progress goes.
        shift: Measure under corruptions of the test images too.
        ood: Compare confidence on the images of this data set too: a folder as ``data.root`` takes, or ``digits``.

    Returns:
        The folder that holds the results.
    """
    from bdkd_dist.launch.shift import record_ood, record_shift  # imports torchvision, which training may not need

    folder, name = named_run.find(run)
    recipe = worker.for_evaluation(_overridden(folder.read_recipe(), overrides))
    preflight.check(recipe, folder)
    checkpoints = named_run.checkpoints(folder, name)
    with preparing(console) as show:
        dataset = load_dataset(recipe.data, show)
        other = None if ood is None else (ood, prepare_foreign(ood, recipe.data, show))
    device = local.own_device(recipe)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        loaders = worker.open_loaders(recipe, dataset, device, stack)
        trainer = Trainer(recipe, dataset, loaders, device, checkpoints, Observers())
        last = folder.finished and trainer.epoch == recipe.train.epochs
        target = folder if last else folder / f"evaluations/step-{trainer.step:08d}"
        worker.finish(trainer, target)
        if shift:
            record_shift(trainer, target, console)
        if other is not None:
            record_ood(trainer, *other, target)
        if shift or other is not None:
            target.push(target.figures, *sorted(target.path.glob("*.json")))
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


def workers(recipe: Recipe) -> str:
    """Return the number of workers as a person says it."""
    low, high = recipe.launch.min_workers, recipe.launch.max_workers
    return str(low) if low == high else f"{low} to {high}"


def check_fits(recipe: Recipe, dataset: Dataset) -> None:
    """Raise UserError where the recipe asks for more than the data set holds."""
    images, batch, most = len(dataset.train), recipe.train.batch_size, recipe.launch.max_workers
    if batch > images:
        raise UserError(f"train.batch_size={batch}: larger than the {images:,} training images")
    if (smallest := images // num_batches(images, batch)) < 2 * most:
        raise UserError(
            f"train.batch_size={batch}: a batch of {smallest} leaves less than two images to some of "
            f"launch.workers={most}"
        )


def _overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    changed = config.override(recipe, overrides)
    for key, there, here in config.differences(recipe, changed):
        raise UserError(
            f"{key}={here}: the run was trained with {there}; only {', '.join(config.NOT_IDENTITY)} change here"
        )
    return changed
