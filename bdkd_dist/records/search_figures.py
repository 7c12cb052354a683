"""What a search reached: accuracy against calibration, and both as the trials trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.figures import COLOURS, DASHES, FAINT, INK, new_figure, style
from bdkd_dist.records.search_tables import chosen, network
from bdkd_dist.records.trials import Status, Trial
from bdkd_dist.records.wording import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINISHED, CHOSEN, PALE = COLOURS[0], COLOURS[1], "#C4C4C4"
TRACES = (CHOSEN, FINISHED, *COLOURS[2:])
"""Colours of chosen trials' curves; of more trials than these the best have one."""
LEAST_SPAN = 0.5
"""Percentage points that an axis covers at least, half at 0 and 100: noise should not look like a difference."""
FENCE = 3.0
"""Interquartile ranges beyond the quartiles from which on a point is an outlier and may lie outside the frame."""
LABEL_APART = 0.045
"""Of the frame's size: nearer points share one label."""


def pareto_figure(trials: Sequence[Trial], goal: Goal) -> "Figure":
    """Draw top-1 accuracy against ECE on the validation split, a point a trial; right and down is better.

    The frame is that of the trials that were trained to the end; others beyond it are triangles at its edge. The line
    bounds what finished trials that meet the constraints reach.

    Returns:
        The figure, 6.4 × 5.4 inches, 100 dots per inch.
    """
    points = _points(trials, goal)
    best = [trial for trial in chosen(trials, goal) if trial.number in points]
    line = pareto_front(trials, goal)
    figure = new_figure(6.4, 5.4)
    axes = figure.add_axes((0.105, 0.225, 0.87, 0.75))
    _set_frame(axes, trials, goal, points, [*best, *line])
    _draw_front(axes, goal, [points[trial.number] for trial in line])
    for trial in trials:
        if trial.number in points:
            draw_point(axes, points[trial.number], trial.status, trial in best)
    _label_points(axes, best, points)
    _draw_bounds(axes, goal)
    style(axes, grid="both")
    axes.set_xlabel(f"{network(goal)} top-1 accuracy on validation (%), higher is better", color=INK, fontsize=9)
    axes.set_ylabel("ECE (%), lower is better", color=INK, fontsize=9)
    _pareto_legend(figure, axes, trials, points, bounded=any(_bounds(goal)))
    return figure


def curves_figure(trials: Sequence[Trial], goal: Goal) -> "Figure":
    """Draw top-1 accuracy and ECE on the validation split as the trials trained, the chosen ones in colour.

    Returns:
        The figure, 8.8 × 3.9 inches, 100 dots per inch.
    """
    from matplotlib.ticker import MaxNLocator

    strong = chosen(trials, goal)[: len(TRACES)]
    figure = new_figure(8.8, 3.9)
    for column, metric in enumerate(("top1", "ece")):
        axes = figure.add_axes((0.065 + 0.5 * column, 0.245, 0.42, 0.69))
        name = f"{network(goal)}/{metric}"
        for trial in trials:
            if trial not in strong:
                _draw_curve(axes, trial, name, PALE, zorder=2)
        for order, trial in enumerate(strong):
            _draw_curve(axes, trial, name, TRACES[order], zorder=4 - order / 10)
        style(axes, grid="y")
        drawn = [100 * report.metrics.get(name, np.nan) for trial in trials for report in trial.reports]
        kept = [100 * report.metrics.get(name, np.nan) for trial in strong for report in trial.reports]
        axes.set_ylim(*frame(drawn, kept))
        axes.set_xlabel("epochs trained", color=INK, fontsize=9)
        axes.set_title(label(name, unit=" (%)"), loc="left", fontsize=9.5, color=INK, fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _curves_legend(figure, trials, strong)
    return figure


def pareto_front(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Return the finished trials that meet the constraints and that none of these dominates, by rising accuracy.

    Whatever the goal is: in top-1 and ECE of its network.
    """
    own = network(goal)
    both = Goal((f"{own}/top1", f"{own}/ece"), ("max", "min"), goal.constraints)
    finished = [trial for trial in trials if trial.status == "finished"]
    front = [finished[index] for index in both.front([trial.metrics for trial in finished])]
    return sorted(front, key=lambda trial: trial.metrics[f"{own}/top1"])


def frame(values: Sequence[float], kept: Sequence[float] = ()) -> tuple[float, float]:
    """Return the limits of an axis of percentages: around all values but outliers, and around those to be kept."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return 0.0, 100.0
    low, high = np.percentile(finite, (25, 75))
    fence = FENCE * (high - low)
    inside = finite[(finite >= low - fence) & (finite <= high + fence)]
    shown = np.concatenate((inside, [value for value in kept if np.isfinite(value)]))
    spare = max(0.07 * np.ptp(shown), (LEAST_SPAN - np.ptp(shown)) / 2)
    return max(0.0, shown.min() - spare), min(100.0, shown.max() + spare)


def draw_point(axes: "Axes", point: tuple[float, float], status: Status, is_chosen: bool = False) -> None:
    """Draw a trial; where it lies beyond the frame, a triangle at its edge."""
    if is_chosen:
        looks: dict[str, Any] = {"s": 62, "color": CHOSEN, "edgecolors": "white", "linewidths": 0.8, "zorder": 4}
    elif status == "finished":
        looks = {"s": 34, "color": FINISHED, "edgecolors": "white", "linewidths": 0.6, "zorder": 3}
    else:
        looks = {"s": 24, "facecolors": "none", "edgecolors": FAINT, "linewidths": 0.9, "zorder": 2}
    (x, y), marker = _at_edge(axes, *point)
    axes.scatter(x, y, marker=marker, clip_on=marker == "o", **looks)


def _points(trials: Sequence[Trial], goal: Goal) -> dict[int, tuple[float, float]]:
    """Return (top-1, ECE) in percent of each trial, failed ones left out, by number."""
    names = [f"{network(goal)}/{metric}" for metric in ("top1", "ece")]
    found = {}
    for trial in trials:
        x, y = (100 * trial.metrics.get(name, np.nan) for name in names)
        if trial.status != "failed" and np.isfinite(x) and np.isfinite(y):
            found[trial.number] = (x, y)
    return found


def _set_frame(
    axes: "Axes",
    trials: Sequence[Trial],
    goal: Goal,
    points: dict[int, tuple[float, float]],
    kept: Sequence[Trial],
) -> None:
    # Trials that were stopped early lie where they stopped; those that came to their end make the picture.
    ended = [points[t.number] for t in trials if t.status == "finished" and t.number in points]
    limits = []
    for which, bounds in enumerate(_bounds(goal)):
        must = [*(points[trial.number][which] for trial in kept), *(100 * bound for _, bound in bounds)]
        limits.append(frame([point[which] for point in ended or points.values()], must))
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])


def _draw_front(axes: "Axes", goal: Goal, front: Sequence[tuple[float, float]]) -> None:
    if not front:
        return
    least, most = _bounds(goal)
    left = max([axes.get_xlim()[0], *(100 * bound for relation, bound in least if relation == ">=")])
    top = min([axes.get_ylim()[1], *(100 * bound for relation, bound in most if relation == "<=")])
    x, y = zip(*front, strict=True)
    axes.plot(
        (left, *x, x[-1]), (y[0], *y, top), drawstyle="steps-pre", color=INK, linewidth=1, zorder=2.5, label="front"
    )


def _at_edge(axes: "Axes", x: float, y: float) -> tuple[tuple[float, float], str]:
    """Return the point of the frame that is nearest, and a mark: ``o`` within, else a triangle that points outwards."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    beyond = {"<": x < left, ">": x > right, "v": y < low, "^": y > high}
    return (min(max(x, left), right), min(max(y, low), high)), next((mark for mark, out in beyond.items() if out), "o")


def _label_points(axes: "Axes", best: Sequence[Trial], points: dict[int, tuple[float, float]]) -> None:
    """Put its number beside each chosen trial, to the right and below, where nothing better lies."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    labelled: list[tuple[float, float]] = []
    for trial in best:
        x, y = points[trial.number]
        at = ((x - left) / (right - left), (y - low) / (high - low))
        if all(abs(at[0] - x0) > LABEL_APART or abs(at[1] - y0) > LABEL_APART for x0, y0 in labelled):
            labelled.append(at)
            axes.annotate(
                f"{trial.number}",
                (x, y),
                (5, -5),
                textcoords="offset points",
                verticalalignment="top",
                fontsize=9,
                color=INK,
                fontweight="bold",
                zorder=5,
            )


def _bounds(goal: Goal) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Return (relation, bound) of the constraints on top-1 and on ECE of the goal's network."""
    found: tuple[list[tuple[str, float]], ...] = tuple(
        [(c.relation, c.bound) for c in goal.constraints if c.name == f"{network(goal)}/{metric}"]
        for metric in ("top1", "ece")
    )
    return found[0], found[1]


def _draw_bounds(axes: "Axes", goal: Goal) -> None:
    across, upwards = _bounds(goal)
    looks: dict[str, Any] = {"color": COLOURS[3], "linewidth": 1.2, "linestyle": DASHES, "zorder": 1.5}
    text: dict[str, Any] = {"fontsize": 8, "color": INK, "textcoords": "offset points"}
    for relation, bound in across:
        axes.axvline(100 * bound, **looks)
        said = f"top-1 {_sign(relation)} {100 * bound:g} %"
        side = -1 if 100 * bound > sum(axes.get_xlim()) / 2 else 1
        at, align = (100 * bound, 1), "left" if side > 0 else "right"
        axes.annotate(said, at, (4 * side, -2), axes.get_xaxis_transform(), ha=align, va="top", **text)
    for relation, bound in upwards:
        axes.axhline(100 * bound, **looks)
        said = f"ECE {_sign(relation)} {100 * bound:g} %"
        axes.annotate(said, (0, 100 * bound), (8, 3), axes.get_yaxis_transform(), ha="left", va="bottom", **text)


def _sign(relation: str) -> str:
    return {"<=": "≤", ">=": "≥"}[relation]


def _pareto_legend(
    figure: "Figure", axes: "Axes", trials: Sequence[Trial], points: dict[int, tuple[float, float]], bounded: bool
) -> None:
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"linestyle": "", "marker": "o"}
    handles = [
        Line2D([], [], **dot, markersize=7.5, color=CHOSEN, markeredgecolor="white", label="chosen, with its number"),
        Line2D([], [], **dot, markersize=6, color=FINISHED, markeredgecolor="white", label="trained to the end"),
        Line2D([], [], **dot, markersize=5, markerfacecolor="none", markeredgecolor=FAINT, label="stopped early"),
        Line2D([], [], color=INK, linewidth=1, label="front of what was trained to the end"),
    ]
    if bounded:
        handles.append(Line2D([], [], color=COLOURS[3], linewidth=1.2, linestyle=DASHES, label="constraint"))
    if beyond := sum(_at_edge(axes, *point)[1] != "o" for point in points.values()):
        dot["marker"] = "<"
        text = f"{beyond} beyond the edge"
        handles.append(Line2D([], [], **dot, markersize=5, markerfacecolor="none", markeredgecolor=FAINT, label=text))
    if failed := sum(trial.status == "failed" for trial in trials):
        handles.append(Line2D([], [], linestyle="", label=f"not drawn: {failed} failed"))
    figure.legend(handles=handles, loc="lower center", ncols=2, fontsize=8, frameon=False, labelcolor=INK)


def _draw_curve(axes: "Axes", trial: Trial, name: str, colour: str, zorder: float) -> None:
    epochs = [report.epoch for report in trial.reports]
    values = [100 * report.metrics.get(name, np.nan) for report in trial.reports]
    axes.plot(epochs, values, color=colour, linewidth=0.9 if colour == PALE else 1.8, zorder=zorder)
    ended = {"finished": ".", "stopped": "o", "running": "o", "failed": "x"}[trial.status]
    axes.plot(
        epochs[-1:],
        values[-1:],
        linestyle="",
        marker=ended,
        markersize=4.5,
        color=FAINT if colour == PALE else colour,
        markerfacecolor="white" if ended == "o" else None,
        markeredgewidth=0.8,
        zorder=zorder,
    )


def _curves_legend(figure: "Figure", trials: Sequence[Trial], strong: Sequence[Trial]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=TRACES[order], linewidth=1.8, label=f"trial {trial.number}")
        for order, trial in enumerate(strong)
    ]
    handles.append(Line2D([], [], color=PALE, linewidth=0.9, label="other trials"))
    looks: dict[str, Any] = {"linestyle": "", "markersize": 4.5, "color": FAINT, "markeredgewidth": 0.8}
    if any(trial.status in ("stopped", "running") and trial.reports for trial in trials):
        handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="stopped there", **looks))
    if any(trial.status == "failed" and trial.reports for trial in trials):
        handles.append(Line2D([], [], marker="x", label="failed after that", **looks))
    figure.legend(handles=handles, loc="lower center", ncols=9, fontsize=8, frameon=False, labelcolor=INK)
