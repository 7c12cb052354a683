"""What a search tried: parallel coordinates, a panel for each value, and which values mattered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bdkd_dist.metrics.goals import SHORT, Goal
from bdkd_dist.records.figures import FAINT, INK, new_figure, style
from bdkd_dist.records.search_figures import FINISHED, PALE, draw_point, frame
from bdkd_dist.records.search_tables import network, ranked, varied
from bdkd_dist.records.trials import Trial
from bdkd_dist.records.wording import is_percent, label, short_names, value_text

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DECADES = 10.0
"""Positive numbers whose largest is more than so many times the smallest are on a logarithmic axis."""
FEW = 6
"""So many different numbers, each tried twice or more, stand at even distances, as words do."""
TICKS = 5
LEAST_TRIALS = 8
"""With fewer finished trials than this nothing can be said of what mattered."""
TREES, SEED = 128, 0
AXIS_IN, PARALLEL_IN = 1.05, 4.6
PER_ROW, PANEL_IN = 4, 2.1
WORST_COLOUR = 0.9
"""Of the palette, whose last tenth is too pale on white."""


@dataclass(frozen=True)
class Scale:
    """Where the values of a key stand between 0 and 1, on an axis of their kind."""

    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    choices: tuple[str, ...] | None = None
    """As they are said, where they are no numbers or few."""

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Scale":
        """Return the scale of all of a key's values; there is at least one."""
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        different = sorted(set(values)) if numbers else sorted(set(map(value_text, values)))
        if not numbers or (len(different) <= FEW and 2 * len(different) <= len(values)):
            return cls(choices=tuple(map(value_text, different)))
        low, high = float(different[0]), float(different[-1])
        return cls(low, high, is_log=low > 0 and high / low > DECADES)

    def at(self, value: Any) -> float:
        """Return the place of a value."""
        if self.choices is not None:
            return (self.choices.index(value_text(value)) + 0.5) / len(self.choices)
        low, high, own = map(math.log, (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return (own - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and what stands there."""
        if self.choices is not None:
            return [((n + 0.5) / len(self.choices), choice) for n, choice in enumerate(self.choices)]
        return [(self.at(value), value_text(float(value))) for value in self._round_values()]

    def _round_values(self) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        steps = (1.0,) if self.is_log and self.high / self.low > 300 else (1.0, 2.0, 5.0)
        locator = LogLocator(subs=steps, numticks=20) if self.is_log else MaxNLocator(TICKS, steps=[1, 2, 5, 10])
        spare = 1e-9 * (self.high - self.low)
        inside = [v for v in locator.tick_values(self.low, self.high) if self.low - spare <= v <= self.high + spare]
        return inside if len(inside) > 1 else sorted({self.low, self.high})


def parallel_figure(trials: Sequence[Trial], goal: Goal) -> "Figure | None":
    """Draw a line a trial through what was tried and what came of it, on axes side by side.

    Trials that were trained to their end are coloured by their rank, the best drawn last. The others, which have seen
    less, are grey and end before the last axes: what the goal looks at, top-1 and ECE, the better end on top.

    Returns:
        The figure, about an inch an axis wide, 100 dots per inch; None where nothing was varied or reported.
    """
    order = [trial for trial in ranked(trials, goal) if trial.reports and trial.status != "failed"]
    keys = [key for key in varied(order) if len({value_text(trial.values.get(key)) for trial in order}) > 1]
    if not keys:
        return None
    names = short_names(keys)
    axes_of = {_wrapped(names[key]): _value_places(order, key) for key in keys}
    axes_of |= {_metric_title(name): _metric_places(order, name, mode) for name, mode in _measured(goal).items()}
    ended = sum(trial.status == "finished" for trial in order)

    figure = new_figure(max(6.4, AXIS_IN * len(axes_of) + 0.3), PARALLEL_IN)
    axes = figure.add_axes((0, 0.16, 1, 0.71))
    axes.set_axis_off()
    axes.set_xlim(-0.62, len(axes_of) - 0.6)
    axes.set_ylim(-0.04, 1.04)
    places = np.array([place for place, _ in axes_of.values()])  # (axes, trials)
    for rank, trial in reversed(list(enumerate(order))):
        finished = trial.status == "finished"
        colour = _rank_colour(rank, ended) if finished else PALE
        axes.plot(
            places[:, rank], color=colour, linewidth=1.6 if finished else 0.8, alpha=0.9, zorder=3 if finished else 2
        )
    for column, (title, (_, ticks)) in enumerate(axes_of.items()):
        _draw_axis(axes, column, title, ticks)
    _rank_legend(figure, goal, ended, others=len(order) > ended)
    return figure


def slice_figure(trials: Sequence[Trial], goal: Goal) -> "Figure | None":
    """Draw the goal's first metric against the values of each key, a panel a key, a point a trial.

    Returns:
        The figure, 2.1 inches a panel, 100 dots per inch; None where nothing was varied or reported.
    """
    drawn = [trial for trial in trials if trial.reports and trial.status != "failed"]
    keys = [key for key in varied(drawn) if len({value_text(trial.values.get(key)) for trial in drawn}) > 1]
    if not keys:
        return None
    name, names = goal.names[0], short_names(keys)
    rows = -(-len(keys) // PER_ROW)
    columns = -(-len(keys) // rows)
    width_in, height_in = 0.8 + PANEL_IN * columns, 0.1 + (PANEL_IN + 0.15) * rows
    figure = new_figure(width_in, height_in)
    for number, key in enumerate(keys):
        row, column = divmod(number, columns)
        left, bottom = 0.75 + PANEL_IN * column, height_in - (PANEL_IN + 0.15) * row - 1.8
        axes = figure.add_axes((left / width_in, bottom / height_in, 1.95 / width_in, 1.65 / height_in))
        axes.set_xlim(-0.05, 1.05)
        axes.set_ylim(*_metric_frame(drawn, name))
        _draw_slice(axes, [trial for trial in drawn if key in trial.values], key, name)
        axes.set_xlabel(names[key], color=INK, fontsize=8.5)
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel(label(name, unit=" (%)"), color=INK, fontsize=8.5)
    return figure


def importance_figure(trials: Sequence[Trial], goal: Goal) -> "Figure | None":
    """Draw which values the rank of the finished trials hung on.

    By fANOVA (Hutter, Hoos and Leyton-Brown, 2014): a random forest is fitted to the trials, and its variance is split
    among the keys. It uses all trials; PED-ANOVA compares the best tenth with the others, which of a few dozen trials
    are two or three. Ranks stand for scores, so that one trial that went astray does not make up the variance.

    Returns:
        The figure, 6.4 inches wide, 100 dots per inch; None with fewer than :data:`LEAST_TRIALS` finished trials, or
        with fewer than two keys that all of them have and that differ.
    """
    shares = importances(trials, goal)
    if not shares:
        return None
    finished = sum(trial.status == "finished" for trial in trials)
    names = short_names(list(shares))
    height_in = 0.75 + 0.3 * len(shares)
    figure = new_figure(6.4, height_in)
    axes = figure.add_axes((0.3, 0.58 / height_in, 0.62, 1 - 0.68 / height_in))
    bars = axes.barh([names[key] for key in shares], [100 * share for share in shares.values()], color=FINISHED)
    axes.bar_label(bars, [f" {100 * share:.0f} %" for share in shares.values()], fontsize=8, color=INK)
    axes.invert_yaxis()
    style(axes, grid="x")
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_xlim(0, 108 * max(shares.values()))
    score = score_name(goal)
    axes.set_xlabel(
        f"share of the explained variance of the rank by {score} (%), fANOVA of {finished} trials",
        color=INK,
        fontsize=8.5,
        x=0.35,
    )
    return figure


def score_name(goal: Goal) -> str:
    """Return the metric that ranks trials, constraints apart: see :meth:`Goal.score`."""
    return SHORT["nll"] if goal.is_pareto else goal.names[0]


def importances(trials: Sequence[Trial], goal: Goal) -> dict[str, float]:
    """Return each key's share of the variance that the values explain, largest first; see :func:`importance_figure`."""
    finished = [trial for trial in trials if trial.status == "finished" and trial.reports]
    keys = [
        key
        for key in varied(finished)
        if all(key in trial.values for trial in finished)
        and len({value_text(trial.values[key]) for trial in finished}) > 1
    ]
    scores = [goal.score(trial.metrics) for trial in finished]
    if len(finished) < LEAST_TRIALS or len(keys) < 2 or len(set(scores)) < 2:
        return {}
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    domains = {key: _distribution([trial.values[key] for trial in finished]) for key in keys}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        for trial, rank in zip(finished, rankdata(scores), strict=True):
            params = {key: _param(trial.values[key], domains[key]) for key in keys}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=domains, value=float(rank)))
        evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=SEED)
        return get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distribution(values: Sequence[Any]) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    scale = Scale.of(values)
    if scale.choices is not None:
        return CategoricalDistribution(scale.choices)
    return FloatDistribution(scale.low, scale.high, log=scale.is_log)


def _param(value: Any, distribution: "optuna.distributions.BaseDistribution") -> Any:
    from optuna.distributions import CategoricalDistribution

    return value_text(value) if isinstance(distribution, CategoricalDistribution) else float(value)


Places = tuple[list[float], list[tuple[float, str]]]
"""Where each trial stands on an axis, and the axis's ticks."""


def _value_places(order: Sequence[Trial], key: str) -> Places:
    scale = Scale.of([trial.values[key] for trial in order if key in trial.values])
    width = 0.2 / len(scale.choices) if scale.choices else 0.0  # within a choice the better ones lie higher
    shifts = [width * (0.5 - rank / max(1, len(order) - 1)) for rank in range(len(order))]
    places = [
        scale.at(trial.values[key]) + shift if key in trial.values else math.nan
        for trial, shift in zip(order, shifts, strict=True)
    ]
    return places, scale.ticks()


def _metric_places(order: Sequence[Trial], name: str, mode: str) -> Places:
    low, high = _metric_frame(order, name)
    scale = Scale(low, high)
    some = any(trial.status == "finished" for trial in order)
    places = [
        min(1.0, max(0.0, scale.at(_metric(trial, name)))) if trial.status == "finished" or not some else math.nan
        for trial in order
    ]
    ticks = scale.ticks()
    if mode == "min":
        return [1 - place for place in places], [(1 - place, text) for place, text in ticks]
    return places, ticks


def _measured(goal: Goal) -> dict[str, str]:
    """Return the metrics of the last axes, with their better end."""
    own = network(goal)
    better: dict[str, str] = {score_name(goal): "min" if goal.is_pareto else goal.modes[0]}
    return better | {f"{own}/top1": "max", f"{own}/ece": "min"}


def _metric(trial: Trial, name: str) -> float:
    value = trial.metrics.get(name, math.nan)
    return 100 * value if is_percent(name) else value


def _metric_frame(trials: Sequence[Trial], name: str) -> tuple[float, float]:
    """Return limits around what finished trials reached, all trials' where none finished."""
    finished = [trial for trial in trials if trial.status == "finished"] or trials
    values = [_metric(trial, name) for trial in finished]
    if is_percent(name):
        return frame(values)
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = np.percentile(finite, (0, 100))
    fence = np.percentile(finite, 75) + 3 * np.ptp(np.percentile(finite, (25, 75)))
    high = max([value for value in finite if value <= fence], default=high)
    spare = 0.07 * (high - low) or 0.05 * abs(low) or 0.05
    return low - spare, high + spare


def _metric_title(name: str) -> str:
    return label(name, unit=" (%)").replace(" ", "\n", 1)


def _wrapped(name: str) -> str:
    """Return a key's name in lines of at most about 12 letters, broken at its underscores and dots."""
    lines = [""]
    for part in name.replace(".", ".\0").replace("_", "_\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > 13:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _draw_axis(axes: "Axes", column: int, title: str, ticks: Sequence[tuple[float, str]]) -> None:
    from matplotlib.patheffects import withStroke

    axes.plot([column, column], [0, 1], color=FAINT, linewidth=1, zorder=4)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for place, text in ticks:
        axes.plot([column - 0.03, column], [place, place], color=FAINT, linewidth=1, zorder=4)
        axes.text(
            column - 0.055, place, text, ha="right", va="center", fontsize=8, color=INK, zorder=5, path_effects=halo
        )
    axes.text(column, 1.05, title, ha="center", va="bottom", fontsize=8.5, color=INK, fontweight="bold")


def _rank_colour(rank: int, of: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](WORST_COLOUR * rank / max(1, of - 1))


def _rank_legend(figure: "Figure", goal: Goal, ended: int, others: bool) -> None:
    from matplotlib.lines import Line2D

    ranks = sorted({round(share * (ended - 1)) for share in (0, 0.25, 0.5, 0.75, 1)}) if ended else []
    handles = [
        Line2D([], [], color=_rank_colour(rank, ended), linewidth=2.5, label=_rank_label(rank, ended)) for rank in ranks
    ]
    if others:
        handles.append(Line2D([], [], color=PALE, linewidth=1.2, label="stopped early"))
    score = score_name(goal)
    title = f"rank by {score}" + (" and the constraints" if goal.constraints else "")
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=7,
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        title=title,
        title_fontsize=8,
    )


def _rank_label(rank: int, of: int) -> str:
    return "best" if rank == 0 else "last" if rank == of - 1 else str(rank + 1)


def _draw_slice(axes: "Axes", trials: Sequence[Trial], key: str, name: str) -> None:
    scale = Scale.of([trial.values[key] for trial in trials])
    spread = 0.12 / len(scale.choices) if scale.choices else 0.0
    for number, trial in enumerate(trials):
        # Points of one choice lie side by side, at places that have no meaning: multiples of the golden ratio.
        x = scale.at(trial.values[key]) + spread * (2 * (number * 0.618034 % 1) - 1)
        draw_point(axes, (x, _metric(trial, name)), trial.status)
    places, texts = zip(*scale.ticks(), strict=True)
    axes.set_xticks(places, texts)
    style(axes, grid="y")
