"""Compare runs, or the tested trials of searches: the command line without the command line."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bdkd_dist.config import Recipe
from bdkd_dist.errors import UserError, nearest
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.tune.folder import RECORD, SEARCH, TRIALS
from bdkd_dist.records.comparison import Comparison, Run, described
from bdkd_dist.records.comparison_report import is_comparison, methods_table, write_comparison
from bdkd_dist.records.printing import print_line, print_table, warner
from bdkd_dist.records.results import read_results

PREDICTIONS = "predictions/test.parquet"


def compare(where: Sequence[str], out: Path, console: Console) -> Path:
    """Compare runs: print a table of the methods, and write a page, pictures and Parquet files.

    Args:
        where: Paths or URIs of finished runs, or of searches, all of whose tested trials are taken. The first run's
            method is the one that the others are held against.
        out: A folder of this machine that is new, empty, or an earlier comparison's.
        console: Where the table goes.

    Returns:
        The page's path.

    Raises:
        UserError: A run is missing, not finished, named twice or of other data, or ``out`` holds other files. Nothing
            is written then.
    """
    _check_free(out)
    folders = [folder for name in where for folder in _runs_of(name, warner(console))]
    _check_once(folders)
    comparison = Comparison.of([_read(folder, warner(console)) for folder in folders])
    try:
        out.mkdir(parents=True, exist_ok=True)
        page = write_comparison(comparison, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    print_table(console, methods_table(comparison))
    for line in comparison.other_files:
        warner(console)(line)
    print_line(console, f"report  {page}")
    return page


def _check_free(out: Path) -> None:
    """Raise UserError where writing would take what is not a comparison's."""
    if ":/" in str(out):
        raise UserError(f"--out {out}: give a folder of this machine")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(not name.startswith(".") for name in os.listdir(out)) and not is_comparison(out):
        raise UserError(f"--out {out} exists and holds no comparison; choose another folder")


def _runs_of(name: str, say: Callable[[str], None]) -> Iterator[RunFolder]:
    """Yield the run of that name, or the tested trials of the search; say how many are left out."""
    folder = RunFolder(name)
    if not folder.place.is_folder():
        raise UserError(f"there is no run {folder}{nearest(folder.place.name, _beside(folder))}")
    trials = folder.place / TRIALS
    if not trials.is_folder() and not folder.place.exists(SEARCH):
        if not folder.finished and folder.place.exists(RECORD):
            raise UserError(
                f"{folder} is a trial that was not tested; a search with --test all tests those that finish"
            )
        if not folder.finished and folder.place.exists("recipe.yaml"):
            raise UserError(f"{folder} is not finished (it holds no results.json); the command that trains it goes on")
        yield folder
        return
    names = trials.listing()[1] if trials.is_folder() else []
    tested = [trial for trial in (folder / f"{TRIALS}/{name}" for name in names) if trial.finished]
    if not tested:
        raise UserError(f"{folder}: none of its {len(names)} trials is tested yet (holds results.json)")
    if len(tested) < len(names):
        say(f"{folder}: {len(names) - len(tested)} of {len(names)} trials were not tested, and are left out")
    yield from tested


def _beside(folder: RunFolder) -> list[str]:
    """Return the names of the folders beside one that is not there."""
    above = folder.place.parent
    return above.listing()[1] if above.is_folder() else []


def _check_once(folders: Sequence[RunFolder]) -> None:
    seen: dict[str, RunFolder] = {}
    for folder in folders:
        here = folder.where.partition("?")[0].rstrip("/") if folder.is_remote else os.path.realpath(folder.where)
        if (first := seen.setdefault(here, folder)) is not folder:
            also = "" if str(first) == str(folder) else f" ({first} and {folder})"
            raise UserError(f"{folder} is given twice{also}")


def _read(folder: RunFolder, say: Callable[[str], None]) -> Run:
    recipe = folder.read_recipe()
    folder.fetch("results.json", PREDICTIONS)
    predictions = folder.path / PREDICTIONS
    if not predictions.is_file():
        raise UserError(f"{folder} holds no {PREDICTIONS}; bdkd evaluate {folder} writes it")
    run = Run.read(str(folder), recipe, folder.results, predictions, _teacher(folder, recipe, say))
    folder.discard()
    return run


def _teacher(folder: RunFolder, recipe: Recipe, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return what the run computed whose finished teacher taught this one; say so where it cannot be read any more."""
    if recipe.models.teacher_checkpoint is None:
        return None
    try:
        teacher = RunFolder(recipe.models.teacher_checkpoint)
        taught_by = teacher.read_recipe()
    except UserError as error:
        say(f"{folder} is told from other runs by its teacher's path: {error}")
        return None
    try:
        teacher.fetch("results.json", say=say)
        return described(taught_by, read_results(teacher.results))
    except (OSError, ValueError, TypeError, AttributeError):  # damaged, or another version's: of unknown images
        return described(taught_by, {})
    finally:
        teacher.discard()
