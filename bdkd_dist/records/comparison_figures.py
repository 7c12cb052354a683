"""The figures of a comparison: accuracy against calibration, and reliability diagrams of the methods."""

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from bdkd_dist.files import atomic_write
from bdkd_dist.records.comparison import Comparison, Method
from bdkd_dist.records.figures import COLOURS, INK, MARKERS, PNG_DPI, new_figure, reliability_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_IN, MARGIN_IN, LINE_IN, TITLE_IN, AXIS_IN = 3.6, 0.7, 0.19, 0.35, 0.55
PER_ROW = 3
"""Reliability diagrams side by side: as many as stand on a page without shrinking."""
LEAST_SPAN = 0.5
"""Percentage points that an axis covers."""
TITLE_CHARACTERS = 26
"""What fits above a diagram."""


def accuracy_ece_figure(comparison: Comparison) -> "Figure":
    """Draw top-1 accuracy against ECE on the test images, a panel for each network.

    A small mark is a run, a large one the mean of a method's runs, with bars of one standard deviation where there are
    several. Right and down is better.

    Returns:
        The figure, 4.3 inches wide a panel, 100 dots per inch; the legend stands below.
    """
    networks = comparison.networks
    names = [named(method) for method in comparison.methods]
    width_in = (PANEL_IN + MARGIN_IN) * len(networks)
    columns = 1 if max(map(len, names)) > 14 * width_in / 2 else 2  # about 14 letters an inch
    legend_in = LINE_IN * -(-len(names) // columns) + 0.15
    height_in = TITLE_IN + PANEL_IN + AXIS_IN + legend_in
    figure = new_figure(width_in, height_in)
    for number, network in enumerate(networks):
        left_in = number * (PANEL_IN + MARGIN_IN) + MARGIN_IN - 0.1
        place = (left_in / width_in, (legend_in + AXIS_IN) / height_in, PANEL_IN / width_in, PANEL_IN / height_in)
        axes = figure.add_axes(place)
        for order, method in enumerate(comparison.methods):
            if network in method.networks:
                _draw_method(axes, method, network, order)
        _finish_panel(axes, network, first=number == 0)
    handles, labels = _handles(names)
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=((MARGIN_IN - 0.2) / width_in, 0),
        ncols=columns,
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
        handletextpad=0.5,
        labelspacing=0.35,
        borderaxespad=0.2,
    )
    return figure


def reliability_rows(comparison: Comparison) -> list["Figure"]:
    """Draw the students' reliability diagrams, and of a single method the teacher's; a method's runs are pooled.

    Returns:
        Figures of at most :data:`PER_ROW` diagrams, as evenly filled as can be.
    """
    networks = comparison.students if len(comparison.methods) > 1 else comparison.networks
    diagrams = {
        _title(method, network, alone=len(networks) == 1): method.reliability(network)
        for network in networks
        for method in comparison.having(network)
    }
    titles = list(diagrams)
    count = -(-len(titles) // PER_ROW)
    borders = [-(-len(titles) * row // count) for row in range(count + 1)]
    return [
        reliability_figure({title: diagrams[title] for title in titles[start:end]}) for start, end in pairwise(borders)
    ]


def save_stacked_png(figures: Sequence["Figure"], path: Path) -> None:
    """Write figures one below the other as one PNG, whole or not at all."""
    from PIL import Image

    images = []
    for figure in figures:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=PNG_DPI)
        images.append(Image.open(drawn).convert("RGB"))
    whole = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    content = io.BytesIO()
    whole.save(content, format="png")
    atomic_write(path, content.getvalue())


def named(method: Method) -> str:
    """Return a method's letter and label."""
    return f"{method.key}  {method.label}"


def _draw_method(axes: "Axes", method: Method, network: str, order: int) -> None:
    """Draw a method, the ``order``-th, and its runs."""
    top1, ece = 100 * method.values(network, "top1"), 100 * method.values(network, "ece")
    colour, marker = _look(order)
    x, y = top1.mean(), ece.mean()
    if len(top1) > 1:
        axes.scatter(top1, ece, s=20, color=colour, marker=marker, alpha=0.55, linewidths=0, zorder=2, clip_on=False)
        axes.errorbar(
            x, y, xerr=top1.std(ddof=1), yerr=ece.std(ddof=1), color=colour, linewidth=1, capsize=2.5, zorder=2.5
        )
    axes.scatter(x, y, s=62, color=colour, marker=marker, edgecolors="white", linewidths=0.8, zorder=3, clip_on=False)
    axes.annotate(
        method.key, (x, y), (5, 4), textcoords="offset points", fontsize=9, color=INK, fontweight="bold", zorder=4
    )


def _finish_panel(axes: "Axes", network: str, first: bool) -> None:
    axes.margins(0.12)
    axes.set_xlim(*_limits(axes.get_xlim()))
    axes.set_ylim(*_limits(axes.get_ylim()))
    axes.set_title(network, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel("top-1 accuracy (%), higher is better", color=INK, fontsize=9)
    if first:
        axes.set_ylabel("ECE (%), lower is better", color=INK, fontsize=9)
    style(axes, grid="both")


def _limits(of_data: tuple[float, float]) -> tuple[float, float]:
    """Return limits of an axis of percentages: not so near that noise looks like a difference."""
    low, high = of_data
    spare = max(0.0, LEAST_SPAN - (high - low)) / 2
    return max(0.0, low - spare), min(100.0, high + spare)


def _look(order: int) -> tuple[str, str]:
    """Return colour and mark of the ``order``-th method; no pair comes twice among the first 36."""
    return COLOURS[order % len(COLOURS)], MARKERS[(order + order // len(COLOURS)) % len(MARKERS)]


def _handles(names: Sequence[str]) -> tuple[list, list[str]]:
    from matplotlib.lines import Line2D

    looks = [_look(order) for order in range(len(names))]
    handles = [Line2D([], [], linestyle="", markersize=7, color=colour, marker=marker) for colour, marker in looks]
    return handles, list(names)


def _title(method: Method, network: str, alone: bool) -> str:
    text = named(method) if alone else f"{method.key}  {network}, {method.label}"
    return text if len(text) <= TITLE_CHARACTERS else text[: TITLE_CHARACTERS - 1].rstrip(" ,") + "…"
