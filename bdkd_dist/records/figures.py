"""What all figures share, drawn without pyplot (no global state, no display), and reliability diagrams."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bdkd_dist.engine.observer import NetworkDiagnosis
from bdkd_dist.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette: told apart with every common kind of colour vision."""
MARKERS = "osD^vP"
"""Tell lines and points apart in print."""
INK, FAINT, PALEST = "#222222", "#8A8A8A", "#E4E4E4"
DASHES = (0, (4, 3))
PNG_DPI = 160

# Of the same palette; the hatches serve print.
BARS: dict[str, dict[str, Any]] = {
    "accuracy": {"facecolor": "#56B4E9", "edgecolor": "white", "linewidth": 0.6},
    "over-confident": {"facecolor": "#F7DFCC", "edgecolor": "#D55E00", "linewidth": 0.7, "hatch": "////"},
    "under-confident": {"facecolor": "#CCECE3", "edgecolor": "#009E73", "linewidth": 0.7, "hatch": "\\\\\\\\"},
}
TICKS = range(0, 101, 20)
RARE_PERCENT, RARE_ALPHA = 0.5, 0.35
"""Bins with a smaller share of the samples are pale: their height is mostly chance."""
PANEL_WIDTH_IN, HEIGHT_IN = 3.3, 4.7


def new_figure(width_in: float, height_in: float) -> "Figure":
    """Return a figure without axes, white, 100 dots per inch."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=100, facecolor="white")


def style(axes: "Axes", grid: Literal["both", "x", "y"] | None = None) -> None:
    """Give axes the looks that all figures share, and ``grid``'s ticks their lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8, colors=INK, color=FAINT, length=3)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=PALEST, linewidth=0.6)


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=PNG_DPI)
    atomic_write(path, content.getvalue())


def reliability_figure(networks: Mapping[str, NetworkDiagnosis]) -> "Figure":
    """Draw a reliability diagram of each network side by side.

    A bar per confidence bin is as high as the accuracy of its samples; the shaded part reaches from there to their
    mean confidence, where a calibrated network's bar would end, in one colour where the network is over-confident
    and in another where it is under-confident. Its height times the bin's share of the samples, drawn below, is what
    the bin adds to the ECE (Guo et al., 2017; DeGroot and Fienberg, 1983).

    Returns:
        The figure, 3.3 inches wide per network, 100 dots per inch.
    """
    width_in = PANEL_WIDTH_IN * len(networks)
    figure = new_figure(width_in, HEIGHT_IN)
    grid = figure.add_gridspec(
        2,
        len(networks),
        height_ratios=(3.6, 1),
        hspace=0.09,
        wspace=0.3,
        left=0.58 / width_in,
        right=1 - 0.14 / width_in,
        top=1 - 0.6 / HEIGHT_IN,
        bottom=(0.86 if len(networks) == 1 else 0.7) / HEIGHT_IN,
    )
    for column, (name, diagnosis) in enumerate(networks.items()):
        upper = figure.add_subplot(grid[0, column])
        lower = figure.add_subplot(grid[1, column])
        _draw_bins(upper, diagnosis)
        _draw_shares(lower, diagnosis)
        _title(upper, name, diagnosis.metrics)
        if column == 0:
            upper.set_ylabel("accuracy (%)", color=INK, fontsize=9)
            lower.set_ylabel("samples (%)", color=INK, fontsize=9)
    _legend(figure, columns=3 if len(networks) == 1 else 5)
    return figure


def _draw_bins(axes: "Axes", diagnosis: NetworkDiagnosis) -> None:
    left, width = _bins(diagnosis)
    accuracy = 100 * np.array(diagnosis.reliability.accuracy)
    confidence = 100 * np.array(diagnosis.reliability.confidence)
    rare = _shares(diagnosis) < RARE_PERCENT
    for chosen, alpha in ((~rare, 1.0), (rare, RARE_ALPHA)):
        axes.bar(left[chosen], accuracy[chosen], width[chosen], align="edge", alpha=alpha, **BARS["accuracy"])
        for label, gap in (("over-confident", confidence > accuracy), ("under-confident", confidence < accuracy)):
            here = gap & chosen
            height = (confidence - accuracy)[here]
            axes.bar(left[here], height, width[here], accuracy[here], align="edge", alpha=alpha, **BARS[label])
    axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=DASHES)
    _set_ticks(axes, x_ticks=(), y_ticks=TICKS)
    axes.set_ylim(0, 100)


def _legend(figure: "Figure", columns: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(label=label, **style) for label, style in BARS.items()]
    rare = Patch(label=f"< {RARE_PERCENT} % of samples", alpha=RARE_ALPHA, **BARS["accuracy"])
    diagonal = Line2D([], [], color=INK, linewidth=1, linestyle=DASHES, label="calibrated")
    # Below the axes: no corner inside them is free of bars for every network.
    figure.legend(
        handles=[diagonal, *handles, rare],
        loc="lower center",
        ncols=columns,
        fontsize=7 if columns == 3 else 7.5,
        frameon=False,
        handlelength=1.3 if columns == 3 else 1.6,  # a single panel is narrow
        columnspacing=0.7 if columns == 3 else 1.2,
        borderaxespad=0.2,
    )


def _draw_shares(axes: "Axes", diagnosis: NetworkDiagnosis) -> None:
    left, width = _bins(diagnosis)
    shares = _shares(diagnosis)
    axes.bar(left, shares, width, align="edge", color=FAINT, edgecolor="white", linewidth=0.6)
    top = next((limit for limit in (10, 20, 50) if shares.max() <= limit), 100)
    _set_ticks(axes, x_ticks=TICKS, y_ticks=(0, top // 2, top))
    axes.set_ylim(0, top)
    axes.set_xlabel("confidence (%)", color=INK, fontsize=9)


def _bins(diagnosis: NetworkDiagnosis) -> tuple[np.ndarray, np.ndarray]:
    edges = 100 * np.array(diagnosis.reliability.edges)
    return edges[:-1], np.diff(edges)


def _shares(diagnosis: NetworkDiagnosis) -> np.ndarray:
    count = np.array(diagnosis.reliability.count)
    return 100 * count / max(1, count.sum())


def _title(axes: "Axes", name: str, metrics: Mapping[str, float]) -> None:
    axes.text(0, 1.095, name, transform=axes.transAxes, fontsize=11, fontweight="bold", color=INK)
    figures = f"ECE {metrics['ece']:.2%}   accuracy {metrics['top1']:.2%}".replace("%", " %")
    axes.text(0, 1.03, figures, transform=axes.transAxes, fontsize=9, color=INK)


def _set_ticks(axes: "Axes", x_ticks: Sequence[int], y_ticks: Sequence[int]) -> None:
    axes.set_xticks(x_ticks)
    axes.set_yticks(y_ticks)
    axes.set_xlim(0, 100)
    style(axes, grid="y")
