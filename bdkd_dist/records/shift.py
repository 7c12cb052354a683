"""Accuracy and calibration under shift: as JSON, as tables and as a picture; and confidence on other data.

What is kept is ``{"networks": {network: {"temperature": T, "clean": figures, "corruptions": {corruption: [figures of
severity 1, …]}}}}`` with figures ``{"raw": metrics, "temperature_scaled": metrics}``, and what describes it beside.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from bdkd_dist.files import atomic_write, json_text
from bdkd_dist.records.figures import COLOURS, DASHES, INK, MARKERS, PALEST, new_figure, style
from bdkd_dist.records.printing import titled_table
from bdkd_dist.records.wording import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = {
    "top-1 %": ("raw", "top1"),
    "ECE %": ("raw", "ece"),
    "ECE %, T-scaled": ("temperature_scaled", "ece"),
}
LINES = ((0, ("raw", "top1")), (1, ("raw", "ece")), (1, ("temperature_scaled", "ece")))
"""What is drawn in which row of panels."""
MEAN_WIDTH_IN, PANEL_WIDTH_IN, HEIGHT_IN = 2.6, 1.4, 4.8


def shift_path(folder: Path) -> Path:
    """Return the file of figures under shift."""
    return folder / "shift.json"


def ood_path(folder: Path, source: str) -> Path:
    """Return the file of the comparison with another data set."""
    return folder / f"ood-{_name(source)}.json"


def write(path: Path, measured: dict[str, Any]) -> None:
    """Write what was measured as JSON, whole or not at all; nan as null."""
    atomic_write(path, json_text(measured, indent=2))


def read(path: Path) -> dict[str, Any]:
    """Return what :func:`write` wrote; null stays None."""
    return json.loads(path.read_text())


def by_severity(network: dict[str, Any], kind: str, metric: str) -> np.ndarray:
    """Return a metric of one network, (corruptions, 6): on clean images and at severities 1 to 5; nan where absent.

    Args:
        network: One of ``measured["networks"]``.
        kind: ``raw`` or ``temperature_scaled``.
        metric: A name of :meth:`bdkd_dist.metrics.CalibrationState.compute`.
    """
    rows = [[network["clean"], *severities] for severities in network["corruptions"].values()]
    return np.array([[figures[kind][metric] for figures in row] for row in rows], float)


def severity_table(measured: dict[str, Any]) -> Table:
    """Return each network's accuracy and ECE, raw and temperature-scaled, by severity: means over corruptions."""
    networks = measured["networks"]
    corruptions = len(next(iter(networks.values()))["corruptions"])
    title = f"test under {corruptions} corruptions, their mean by severity"
    table = titled_table(title, ("network", ""), ("clean", "1", "2", "3", "4", "5"))
    for name, network in networks.items():
        for row, (kind, metric) in ROWS.items():
            values = by_severity(network, kind, metric).mean(0)
            first, last = row == next(iter(ROWS)), row == list(ROWS)[-1]
            table.add_row(name if first else "", row, *map(percent, values), end_section=last)
    return table


def corruption_table(measured: dict[str, Any]) -> Table:
    """Return each network's accuracy and ECE by corruption: means over severities 1 to 5."""
    table = titled_table("by corruption, mean over severities 1 to 5", ("network", "corruption"), ROWS)
    for name, network in measured["networks"].items():
        means = [by_severity(network, kind, metric)[:, 1:].mean(1) for kind, metric in ROWS.values()]
        corruptions = list(network["corruptions"])
        for row, corruption in enumerate(corruptions):
            cells = (percent(values[row]) for values in means)
            last = corruption == corruptions[-1]
            table.add_row("" if row else name, corruption, *cells, end_section=last)
    return table


def ood_table(compared: dict[str, Any]) -> Table:
    """Return how well each network's confidence tells test images from those of another data set.

    Args:
        compared: ``source``, ``split``, ``images_inside``, ``images_outside`` and, under ``networks``, ``auroc``,
            ``fpr95``, ``confidence_inside`` and ``confidence_outside`` of each network.
    """
    source = f"{_name(compared['source'])} ({compared['split']})"
    title = f"{compared['images_inside']:,} test images against {compared['images_outside']:,} of {source}"
    table = titled_table(title, ("network",), ("AUROC %", "FPR at 95 % TPR, %", "confidence, test %", "other %"))
    for name, figures in compared["networks"].items():
        keys = ("auroc", "fpr95", "confidence_inside", "confidence_outside")
        table.add_row(name, *(percent(figures[key]) for key in keys))
    return table


def shift_figure(measured: dict[str, Any]) -> "Figure":
    """Draw accuracy and ECE against severity: first their means over corruptions, then under each corruption.

    Dashed lines are temperature-scaled, with T fitted on clean validation images: where they rise, it does not hold
    under shift (after Ovadia et al., "Can you trust your model's uncertainty?", 2019).

    Returns:
        The figure, 11 × 4.8 inches for six corruptions, 100 dots per inch.
    """
    networks = measured["networks"]
    corruptions = list(next(iter(networks.values()))["corruptions"])
    width_in = MEAN_WIDTH_IN + PANEL_WIDTH_IN * len(corruptions)
    figure = new_figure(width_in, HEIGHT_IN)
    panels = figure.subplots(
        2,
        1 + len(corruptions),
        sharex=True,
        sharey="row",
        squeeze=False,
        width_ratios=(1.6, *(1 for _ in corruptions)),
        gridspec_kw={
            "left": 0.55 / width_in,
            "right": 1 - 0.1 / width_in,
            "top": 0.93,
            "bottom": 0.175,
            "wspace": 0.1,
            "hspace": 0.12,
        },
    )
    for number, network in enumerate(networks.values()):
        for row, (kind, metric) in LINES:
            values = by_severity(network, kind, metric)
            for axes, line in zip(panels[row], (values.mean(0), *values), strict=True):
                _draw(axes, line, number, scaled=kind == "temperature_scaled")
    for column, title in enumerate((f"mean of {len(corruptions)}", *corruptions)):
        for axes in panels[:, column]:
            _style(axes, first=column == 0)
        panels[0, column].set_title(title.replace("_", " "), fontsize=9, color=INK, fontweight="bold")
        panels[1, column].set_xlabel("severity" if column else "severity (0: clean images)", color=INK, fontsize=8)
    for axes, label in zip(panels[:, 0], ("accuracy (%)", "ECE (%)"), strict=True):
        axes.set_ylabel(label, color=INK, fontsize=9)
        axes.set_ylim(bottom=0)
    panels[0, 0].set_ylim(top=100)
    _legend(figure, list(networks))
    return figure


def _draw(axes: "Axes", line: np.ndarray, number: int, scaled: bool) -> None:
    """Draw the line of a network, the ``number``-th, from clean images to severity 5."""
    colour = COLOURS[number % len(COLOURS)]
    axes.plot(
        range(len(line)),
        100 * line,
        color=colour,
        linestyle=DASHES if scaled else "-",
        linewidth=1.4,
        marker=MARKERS[number % len(MARKERS)],
        markersize=3.5,
        markerfacecolor="white" if scaled else colour,
        clip_on=False,
        zorder=2.5 if scaled else 3,  # at T = 1 the raw line shows
    )


def _style(axes: "Axes", first: bool) -> None:
    axes.set_xticks(range(6), "012345")
    style(axes, grid="y")
    if not first:
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_color(PALEST)


def _legend(figure: "Figure", networks: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    styles = [
        {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)], "label": name}
        for n, name in enumerate(networks)
    ]
    handles = [Line2D([], [], markersize=4.5, **style) for style in styles]  # type: ignore[arg-type]
    scaled = Line2D([], [], color=INK, linestyle=DASHES, label="temperature-scaled, T from clean validation images")
    figure.legend(handles=[*handles, scaled], loc="lower center", ncols=8, fontsize=8, frameon=False)


def _name(source: str) -> str:
    """Return the last part of a data set's path."""
    return Path(source).resolve().name
