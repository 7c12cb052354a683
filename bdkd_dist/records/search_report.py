"""What is kept of a search: its trials as Parquet, the chosen one as a recipe, pictures, and all of it as a page."""

from collections.abc import Sequence
from pathlib import Path

from bdkd_dist.config import Recipe
from bdkd_dist.engine.observer import NetworkDiagnosis
from bdkd_dist.files import atomic_write
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.comparison import Run, pooled
from bdkd_dist.records.figures import save_png
from bdkd_dist.records.results import read_results
from bdkd_dist.records.search_figures import pareto_figure
from bdkd_dist.records.search_page import Drawn, SearchSummary, search_page
from bdkd_dist.records.search_tables import best_yaml, chosen, of_test, write_trials
from bdkd_dist.records.search_values_figures import importance_figure, parallel_figure
from bdkd_dist.records.trials import Trial
from bdkd_dist.records.wording import students_first

__all__ = ["BEST", "FILES", "PAGE", "SearchSummary", "write_report"]

TABLE, BEST, PAGE, PARETO, IMPORTANCE, PARALLEL = (
    "trials.parquet",
    "best.yaml",
    "report.html",
    "pareto.png",
    "importance.png",
    "parallel.png",
)
FILES = (TABLE, BEST, PARETO, IMPORTANCE, PARALLEL, PAGE)
"""What :func:`write_report` may leave: the recipe and the last two pictures only where there is ground for them."""
DIAGRAMS = 6
"""Reliability diagrams at most, those of the best trials."""


def write_report(
    folder: Path, search: SearchSummary, trials: Sequence[Trial], goal: Goal, recipe: Recipe
) -> list[Path]:
    """Write :data:`FILES`, each whole or not at all, the page last, and return the paths of those that there are.

    Args:
        folder: The search's. Of trials that were tested, ``trials/<name>/results.json`` and
            ``predictions/test.parquet`` are read there.
        search: What it was.
        trials: All of them.
        goal: What they are ranked by.
        recipe: What the search varied; its ``run.name`` is the search's.

    Raises:
        UserError: A chosen trial's predictions are damaged.
    """
    best = chosen(trials, goal)
    results = {
        trial.number: read_results(folder / "trials" / trial.name / "results.json")
        for trial in trials
        if (folder / "trials" / trial.name / "results.json").is_file()
    }
    diagrams = _diagrams(folder, best, recipe)
    write_trials(folder / TABLE, trials, {trial: of_test(measured) for trial, measured in results.items()})
    made = {TABLE, PAGE}
    if best:
        atomic_write(folder / BEST, best_yaml(recipe, best[0], goal).encode())
        made.add(BEST)
    drawn = Drawn(pareto_figure(trials, goal), importance_figure(trials, goal), parallel_figure(trials, goal))
    for name, figure in ((PARETO, drawn.pareto), (IMPORTANCE, drawn.importance), (PARALLEL, drawn.parallel)):
        if figure is not None:
            save_png(figure, folder / name)
            made.add(name)
    for name in set(FILES) - made:
        (folder / name).unlink(missing_ok=True)  # an earlier report's
    search_page(search, trials, goal, recipe, drawn, results, diagrams).write(folder / PAGE)
    return [folder / name for name in FILES if name in made]


def _diagrams(folder: Path, best: Sequence[Trial], recipe: Recipe) -> dict[str, NetworkDiagnosis]:
    """Return the test split's reliability of the students of chosen trials, and of a single one's teacher, by title."""
    diagrams: dict[str, NetworkDiagnosis] = {}
    for trial in best:
        run_folder = folder / "trials" / trial.name
        predictions = run_folder / "predictions" / "test.parquet"
        if not predictions.is_file():
            continue
        run = Run.read(f"trials/{trial.name}", recipe, run_folder / "results.json", predictions)
        for name in students_first(run.said):
            if (name != "teacher" or len(best) == 1) and len(diagrams) < DIAGRAMS:
                diagrams[f"trial {trial.number}, {name}"] = pooled(run.said[name].confidence, run.said[name].correct)
    return diagrams
