"""A search as a page: what was chosen, why, what was tried and what it cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bdkd_dist.config import Recipe
from bdkd_dist.engine.observer import NetworkDiagnosis
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.figures import reliability_figure
from bdkd_dist.records.page import Page
from bdkd_dist.records.progress import duration
from bdkd_dist.records.search_figures import curves_figure
from bdkd_dist.records.search_tables import (
    chosen,
    epochs,
    goal_text,
    heads,
    network,
    of_test,
    ranked,
    value_spans,
    varied,
)
from bdkd_dist.records.search_values_figures import LEAST_TRIALS, score_name, slice_figure
from bdkd_dist.records.trials import Trial
from bdkd_dist.records.wording import METRICS, metric_head, metric_text, short_names, value_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_ROW = 3
"""Reliability diagrams side by side."""


@dataclass(frozen=True)
class SearchSummary:
    """What a search was, in words."""

    name: str
    space: str
    """Its name."""
    space_rows: tuple[tuple[str, str], ...]
    """(dotted key, what is tried)."""
    goal: str
    """As it was typed."""
    search: str
    scheduler: str
    num_trials: int
    seed: int
    command: str
    """That makes the search go on, or again."""
    began: str
    """Dates and times, as a person reads them."""
    ended: str
    device: str = "device"
    """What is held while a trial trains: ``CPU`` or ``GPU``."""


@dataclass(frozen=True)
class Drawn:
    """The figures that are kept as pictures too; None where there is no ground for one."""

    pareto: "Figure"
    importance: "Figure | None"
    parallel: "Figure | None"


def search_page(
    search: SearchSummary,
    trials: Sequence[Trial],
    goal: Goal,
    recipe: Recipe,
    drawn: Drawn,
    results: Mapping[int, Mapping[str, Any]],
    diagrams: Mapping[str, NetworkDiagnosis],
) -> Page:
    """Return the report of a search.

    Args:
        search: What it was.
        trials: All of them.
        goal: What they are ranked by.
        recipe: What the search varied.
        drawn: Its figures.
        results: By number, what :func:`bdkd_dist.records.results.read_results` returned of tested trials.
        diagrams: Of the test split, by title.
    """
    best = chosen(trials, goal)
    page = Page(f"Search {search.name}", _lead(trials, recipe))
    _chosen(page, trials, best, goal, results)
    _trade_off(page, drawn.pareto, goal, trials)
    _diagrams(page, diagrams)
    _curves(page, trials, goal)
    _values(page, trials, goal, drawn)
    _searched(page, search, goal)
    _spent(page, search, trials, recipe)
    _all_trials(page, trials, goal, results)
    _failed(page, trials)
    return page


def _lead(trials: Sequence[Trial], recipe: Recipe) -> str:
    students = ", ".join(name for role, name in recipe.models.by_role.items() if role != "teacher")
    return (
        f"{recipe.data.dataset}, {recipe.models.teacher} → {students}, {recipe.train.epochs} epochs a trial; "
        f"{_counted(trials)}."
    )


def _counted(trials: Sequence[Trial]) -> str:
    counts = Counter[str](trial.status for trial in trials)
    words = {
        "finished": "trained to the end",
        "stopped": "stopped early",
        "running": "not at its end",
        "failed": "failed",
    }
    parts = [f"{counts[status]} {what}" for status, what in words.items() if counts[status]]
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}: {', '.join(parts)}"


def _chosen(
    page: Page,
    trials: Sequence[Trial],
    best: Sequence[Trial],
    goal: Goal,
    results: Mapping[int, Mapping[str, Any]],
) -> None:
    page.heading("What was chosen")
    if not best:
        page.text(_nothing(trials, goal))
        return
    if goal.is_pareto:
        page.text(
            f"By {goal_text(goal)}: {_plural(len(best), 'trial')} that no other one beats in both, by rising "
            f"{score_name(goal)}. The first, trial {best[0].number}, is in best.yaml as a recipe for bdkd train."
        )
    else:
        page.text(
            f"By {goal_text(goal)}: trial {best[0].number}, {best[0].name}. best.yaml is its recipe, for bdkd train."
        )
    page.text(_splits(best, results))
    keys = varied(best)
    names = short_names(keys)
    page.table(
        ("trial", *names.values()),
        [[str(trial.number), *(_cell(trial, key) for key in keys)] for trial in best],
        "What was tried in the chosen trials." if len(best) > 1 else "What was tried in the chosen trial.",
    )
    page.table(
        ("trial", "network", "split", *map(metric_head, METRICS), "T"),
        [row for trial in best for row in _figure_rows(trial, goal, results.get(trial.number), every=len(best) == 1)],
        "T is the temperature that logits are divided by, fitted on validation.",
    )
    for trial in best:
        _schedule(page, trial)


def _nothing(trials: Sequence[Trial], goal: Goal) -> str:
    finished = [trial for trial in ranked(trials, goal) if trial.status == "finished" and trial.reports]
    if not finished:
        return "No trial was trained to the end: nothing is chosen."
    nearest = finished[goal.nearest([trial.metrics for trial in finished])]
    return (
        f"Nothing: no trial trained to the end meets {' and '.join(map(str, goal.constraints)) or 'the goal'}. "
        f"The nearest is trial {nearest.number}: {goal.said(nearest.metrics)}."
    )


def _splits(best: Sequence[Trial], results: Mapping[int, Mapping[str, Any]]) -> str:
    compared = "Trials were compared, stopped and chosen by the validation split alone; temperatures are fitted on it."
    own = sum(trial.number in results for trial in best)
    if not own:
        return f"{compared} The test split has not been looked at."
    of_all = f"for {_plural(len(results), 'trial')}" + ("" if own == len(results) else f", {own} of them chosen")
    return (
        f"{compared} The test split was looked at once, after that, {of_all}. Validation figures of a chosen trial are "
        "somewhat too good, as it was chosen by them; test figures are not."
    )


def _figure_rows(trial: Trial, goal: Goal, results: Mapping[str, Any] | None, every: bool) -> list[list[str]]:
    """Return a row for each network and split: validation as the search saw it, test raw and temperature-scaled."""
    own = network(goal)
    others = sorted({name.partition("/")[0] for name in trial.metrics} - {own}) if every else []
    rows = []
    for name in (own, *others):
        seen = {metric: trial.metrics.get(f"{name}/{metric}") for metric in METRICS}
        rows.append([str(trial.number), name, "validation", *_numbers(seen), "1.00"])
        if results is not None and name in results["test"]:
            test = results["test"][name]
            rows.append([str(trial.number), name, "test", *_numbers(test["raw"]), "1.00"])
            scaled, temperature = test["temperature_scaled"], test["temperature"]
            rows.append([str(trial.number), name, "test, T-scaled", *_numbers(scaled), f"{temperature:.2f}"])
    return rows


def _schedule(page: Page, trial: Trial) -> None:
    spans = value_spans(trial)
    if not spans:
        return
    keys = list(dict.fromkeys(key for _, _, values in spans for key in values))
    names = short_names(keys)
    page.table(
        ("from epoch", "to", *names.values()),
        [
            [str(first), str(last), *(value_text(values[key]) if key in values else "–" for key in keys)]
            for first, last, values in spans
        ],
        f"Trial {trial.number}: its values changed while it trained. A recipe holds the last ones only.",
    )


def _trade_off(page: Page, figure: "Figure", goal: Goal, trials: Sequence[Trial]) -> None:
    page.heading("Accuracy against calibration")
    failed = sum(trial.status == "failed" for trial in trials)
    whose = "finished trials that meet all constraints" if goal.constraints else "finished trials"
    page.figure(
        figure,
        f"A point a trial, on the validation split. Right and down is better; the line bounds what {whose} "
        "reach. Those that were stopped early stand where they stopped, or at the edge where that is beyond it."
        + (f" {failed} failed and are not drawn." if failed else ""),
        f"Scatter plot of the {network(goal)}'s ECE against its top-1 accuracy; the table of trials has its numbers.",
    )


def _diagrams(page: Page, diagrams: Mapping[str, NetworkDiagnosis]) -> None:
    if not diagrams:
        return
    page.heading("Reliability diagrams")
    titles = list(diagrams)
    rows = [titles[start : start + PER_ROW] for start in range(0, len(titles), PER_ROW)]
    for row in rows:
        page.figure(
            reliability_figure({title: diagrams[title] for title in row}),
            "Chosen trials on the test split, as trained. Bars on the diagonal are calibrated." * (row is rows[-1]),
            "Reliability diagrams: accuracy of the test images against the network's confidence, in 15 bins.",
        )


def _curves(page: Page, trials: Sequence[Trial], goal: Goal) -> None:
    page.heading("While they trained")
    page.figure(
        curves_figure(trials, goal),
        "Figures of the validation split after each evaluation. Outliers may lie outside the frame.",
        f"Curves of the {network(goal)}'s top-1 accuracy and ECE by epoch, a line a trial.",
    )


def _values(page: Page, trials: Sequence[Trial], goal: Goal, drawn: Drawn) -> None:
    page.heading("What mattered")
    score = score_name(goal)
    if drawn.importance is not None:
        page.figure(
            drawn.importance,
            "How much of the differences in rank each value explains, alone and with the others, by fANOVA: a random "
            "forest fitted to the trials that were trained to the end. Of a few dozen trials it is a hint, no proof.",
            "Bars: share of the explained variance of each value.",
        )
    else:
        page.text(
            f"How much each value mattered is not said: that takes {LEAST_TRIALS} trials that were trained to the end "
            "and two or more values in which they differ."
        )
    if (slices := slice_figure(trials, goal)) is not None:
        page.figure(
            slices,
            f"{goal.names[0]} on the validation split against each value; hollow points were stopped early, "
            "triangles lie beyond the edge.",
            f"Scatter plots of {goal.names[0]} against each value that was tried.",
        )
    if drawn.parallel is not None:
        page.figure(
            drawn.parallel,
            f"A line a trial, through what was tried and what came of it. Dark lines are the best by {score}; on the "
            "last axes the better end is on top.",
            "Parallel coordinates of all trials.",
        )


def _searched(page: Page, search: SearchSummary, goal: Goal) -> None:
    page.heading("What was searched")
    page.table(("key", "tried"), search.space_rows, f"The space {search.space}; all else is the recipe's.")
    rows = {
        "goal": f"{search.goal}: {goal_text(goal)}",
        "search": search.search,
        "scheduler": search.scheduler,
        "trials at most": str(search.num_trials),
        "seed": str(search.seed),
        "command": search.command,
        "began": search.began,
        "ended": search.ended,
    }
    page.table(("", "this search"), list(rows.items()))


def _spent(page: Page, search: SearchSummary, trials: Sequence[Trial], recipe: Recipe) -> None:
    page.heading("What it cost")
    trained = sum(map(epochs, trials))
    wall_s, device_s = (sum(getattr(trial, name) for trial in trials) for name in ("wall_s", "device_s"))
    text = (
        f"{trained:,} epochs in {_plural(len(trials), 'trial')}; {duration(wall_s)} of training, added up over trials, "
        f"{device_s / 3600:.2f} {search.device} hours."
    )
    saved, saved_s = _saved(trials, recipe)
    if saved:
        text += (
            f" Early stopping saved {saved:,} epochs, {saved / (saved + trained):.0%} of what all trials would "
            f"have trained to the end: about {duration(saved_s)}."
        ).replace("%", " %")
    page.text(text)


def _saved(trials: Sequence[Trial], recipe: Recipe) -> tuple[int, float]:
    """Return the epochs that stopped trials did not train, and the seconds these would have taken."""
    saved, saved_s = 0, 0.0
    for trial in trials:
        if trial.status == "stopped" and (done := epochs(trial)):
            left = max(0, trial.values.get("train.epochs", recipe.train.epochs) - done)
            saved, saved_s = saved + left, saved_s + left * trial.wall_s / done
    return saved, saved_s


def _all_trials(page: Page, trials: Sequence[Trial], goal: Goal, results: Mapping[int, Mapping[str, Any]]) -> None:
    page.heading("All trials")
    best = {trial.number for trial in chosen(trials, goal)}
    keys, own = varied(trials), network(goal)
    shown = {name: head.removeprefix(f"{own} ") for name, head in heads(goal).items()}
    tests = {trial: of_test(measured) for trial, measured in results.items()}
    test_heads = {f"{own}/{of}": f"test {metric_head(of)}" for of in ("top1", "ece", "nll")} if tests else {}
    rows = [
        [
            str(trial.number),
            "chosen" if trial.number in best else trial.status,
            str(epochs(trial)),
            *(metric_text(trial.metrics.get(name), name) for name in shown),
            *(metric_text(tests.get(trial.number, {}).get(name), name) for name in test_heads),
            *(_cell(trial, key) for key in keys),
            f"{trial.wall_s / 60:.1f}",
        ]
        for trial in ranked(trials, goal)
    ]
    page.table(
        ("trial", "status", "epochs", *shown.values(), *test_heads.values(), *short_names(keys).values(), "minutes"),
        rows,
        f"Best first; figures of the {own} on the validation split unless a column says otherwise.",
    )


def _failed(page: Page, trials: Sequence[Trial]) -> None:
    failed = [trial for trial in trials if trial.status == "failed"]
    if not failed:
        return
    page.heading("Failed trials")
    page.table(
        ("trial", "epochs", "reason", "folder below trials"),
        [[str(trial.number), str(epochs(trial)), trial.reason, trial.name] for trial in failed],
    )


def _cell(trial: Trial, key: str) -> str:
    return value_text(trial.values[key]) if key in trial.values else "–"


def _numbers(metrics: Mapping[str, float | None]) -> list[str]:
    return [metric_text(metrics.get(metric), metric) for metric in METRICS]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
