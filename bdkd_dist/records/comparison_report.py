"""What is kept of a comparison: a page, pictures and Parquet files; and the table that a terminal shows."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bdkd_dist.files import atomic_write
from bdkd_dist.records.comparison import Comparison, Method
from bdkd_dist.records.comparison_bootstrap import DIFFERENCES, RESAMPLES, Difference
from bdkd_dist.records.comparison_figures import (
    accuracy_ece_figure,
    named,
    reliability_rows,
    save_stacked_png,
)
from bdkd_dist.records.figures import save_png
from bdkd_dist.records.page import Page
from bdkd_dist.records.printing import titled_table
from bdkd_dist.records.wording import METRICS, fixed, metric_head, metric_text, percent

PAGE, SCATTER, DIAGRAMS, RUNS, METHODS = (
    "report.html",
    "accuracy_ece.png",
    "reliability.png",
    "runs.parquet",
    "methods.parquet",
)
MADE_BY = {b"made_by": b"bdkd compare"}
"""Stands in the metadata of the Parquet files: a folder whose ``runs.parquet`` says so may be written anew."""
KINDS = ("raw", "temperature_scaled", "vector_scaled")
LABEL_WIDTH = 20
"""Columns of a terminal that a method's label takes before it wraps."""


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """Write all files of a comparison, each whole or not at all, and return the page's path.

    Args:
        comparison: What to write.
        out: An existing folder.
    """
    _write_parquet(run_rows(comparison), out / RUNS)  # first: it says whose folder this is
    _write_parquet(method_rows(comparison), out / METHODS)
    save_png(accuracy_ece_figure(comparison), out / SCATTER)
    save_stacked_png(reliability_rows(comparison), out / DIAGRAMS)
    page(comparison).write(out / PAGE)
    return out / PAGE


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_comparison` wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(folder / RUNS).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return MADE_BY.items() <= metadata.items()


def methods_table(comparison: Comparison) -> Table:
    """Return the methods in 100 columns, students before teachers; mean ± standard deviation over runs.

    Top-1 and ECE are percentages, NLL is in nats; ``–`` where a figure does not exist.
    """
    table = titled_table(f"test, {_counted(comparison)}")
    table.padding = (0, 1, 0, 0)
    table.add_column("method", max_width=LABEL_WIDTH, overflow="fold")
    table.add_column("network", no_wrap=True)
    for column in ("runs", "top-1 %", "ECE %", "ECE %\nT-scaled", "NLL"):
        table.add_column(column, justify="right", no_wrap=True)
    said: set[str] = set()
    for network in comparison.networks:
        for method in comparison.having(network):
            table.add_row(
                method.key if method.key in said else named(method),
                network,
                str(len(method.runs)),
                spread(method.values(network, "top1"), "top1"),
                spread(method.values(network, "ece"), "ece"),
                spread(method.values(network, "ece", "temperature_scaled"), "ece"),
                spread(method.values(network, "nll"), "nll"),
            )
            said.add(method.key)
        table.add_section()
    return table


def page(comparison: Comparison) -> Page:
    """Return the report as a page."""
    first = comparison.methods[0].runs[0]
    same = all(map(comparison.same_images, comparison.methods))
    images = f"{len(first.index):,} test images" if same else "test images that differ between runs"
    made = Page(
        f"Comparison of {_counted(comparison)}",
        f"{first.recipe['data.dataset']}, {len(first.class_names)} classes, {images}. Means over runs ± standard "
        "deviation (n − 1) where a method has several.",
    )
    _measured(made, comparison)
    _scatter(made, comparison)
    _differences(made, comparison)
    _diagrams(made, comparison)
    for student in comparison.students:
        _classes(made, comparison, student)
    _runs(made, comparison)
    return made


def spread(values: np.ndarray, metric: str) -> str:
    """Return mean ± standard deviation over runs (ddof 1), the mean alone of a single run, ``–`` where it is nan."""
    mean = metric_text(values.mean(), metric)
    return mean if len(values) == 1 or mean == "–" else f"{mean} ± {metric_text(values.std(ddof=1), metric)}"


def run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each run and network: which they are, and all metrics on the test images, by kind."""
    return [
        {
            "method": method.key,
            "label": method.label,
            "run": run.name,
            "seed": run.seed,
            "epochs": run.epochs,
            "network": network,
            "temperature": run.results[network]["temperature"],
            **_metrics(run.results[network]),
        }
        for method in comparison.methods
        for run in method.runs
        for network in method.networks
    ]


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    kinds = {kind: results.get(kind) for kind in KINDS}  # no vector scaling where the classes were too many
    return {
        f"{kind}_{metric}": value for kind, of in kinds.items() if isinstance(of, dict) for metric, value in of.items()
    }


def method_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each method and network: means and standard deviations, and the differences from the first."""
    rows = []
    for method in comparison.methods:
        for network in method.networks:
            row: dict[str, Any] = {"method": method.key, "label": method.label, "network": network}
            row |= {"runs": len(method.runs), "seeds": [run.seed for run in method.runs]}
            for kind in KINDS[:2]:
                for metric in METRICS:
                    values = method.values(network, metric, kind)
                    row[f"{kind}_{metric}_mean"] = float(values.mean())
                    row[f"{kind}_{metric}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else None
            differences = comparison.differences.get((method.key, network), {})
            for metric in DIFFERENCES:
                found = differences.get(metric)
                for end in ("value", "low", "high"):
                    row[f"difference_{metric}_{end}"] = None if found is None else getattr(found, end)
            rows.append(row)
    return rows


def _measured(made: Page, comparison: Comparison) -> None:
    made.heading("On the test images")
    for kind, caption in (
        ("raw", "As trained. NLL is in nats, Brier in [0, 2]; ECE and AdaECE have 15 bins."),
        ("temperature_scaled", "Divided by the temperature T that was fitted on each run's validation images."),
    ):
        scaled = kind == "temperature_scaled"
        rows = [
            [
                *(named(method), network, str(len(method.runs))),
                *(spread(method.values(network, metric, kind), metric) for metric in METRICS),
                *([_spread_of_temperature(method, network)] if scaled else []),
            ]
            for network in comparison.networks
            for method in comparison.having(network)
        ]
        columns = ["method", "network", "runs", *map(metric_head, METRICS), *(["T"] if scaled else [])]
        made.table(columns, rows, caption)


def _scatter(made: Page, comparison: Comparison) -> None:
    made.heading("Accuracy against calibration")
    made.figure(
        accuracy_ece_figure(comparison),
        "Test top-1 accuracy against ECE, as trained. A small mark is a run, a large one a method's mean, bars are one "
        "standard deviation. Right and down is better.",
        "Scatter plot of accuracy against ECE; its numbers are in the table above.",
    )


def _differences(made: Page, comparison: Comparison) -> None:
    if len(comparison.methods) == 1:
        return
    first = comparison.methods[0]
    made.heading(f"Differences from {first.key}, {first.label}")
    made.text(
        f"The test images are drawn with replacement {RESAMPLES:,} times, the same draw for every run of both methods. "
        "From each draw every run's figure is computed, averaged over the method's runs (seeds) and subtracted; the "
        "interval holds the middle 95 % of these differences. The trained networks stay as they are, so the intervals "
        "speak of the choice of test images, not of what another seed would have given: for that, look at ± above."
    )
    names = {method.key: named(method) for method in comparison.methods}
    rows = [
        [names[key], student, *(_difference(found[metric], metric) for metric in DIFFERENCES)]
        for (key, student), found in comparison.differences.items()
    ]
    if rows:
        made.table(
            ("method", "network", *(f"Δ {metric_head(metric)}" for metric in DIFFERENCES)),
            rows,
            f"Method less {first.key} [95 % interval], as trained; top-1 and ECE in percentage points. "
            "* the interval leaves 0 out.",
        )
    for method in comparison.methods[1:]:
        if not comparison.same_images(method):
            made.text(f"No differences of {method.key}: its runs and those of {first.key} were tested on other images.")
        elif sorted(run.seed for run in method.runs) != sorted(run.seed for run in first.runs):
            made.text(
                f"{method.key} was trained with other seeds than {first.key}: what its difference shows may be that of "
                "the seeds."
            )


def _diagrams(made: Page, comparison: Comparison) -> None:
    made.heading("Reliability diagrams")
    figures = reliability_rows(comparison)
    for number, figure in enumerate(figures, 1):
        caption = (
            "Networks as trained, the test images of a method's runs pooled: the ECE above a diagram is that of the "
            "pool, which may lie below the mean of the runs' ECEs. Bars on the diagonal are calibrated."
        )
        made.figure(
            figure,
            caption if number == len(figures) else "",
            "Reliability diagrams: accuracy of the test images against confidence, in 15 bins.",
        )


def _classes(made: Page, comparison: Comparison, student: str) -> None:
    made.heading("By class" if len(comparison.students) == 1 else f"By class, {student}")
    methods = comparison.having(student)
    run = methods[0].runs[0]
    images = np.bincount(run.label, minlength=len(run.class_names))
    same = all(map(comparison.same_images, methods))
    measured = [values for method in methods for values in method.by_class(student)]
    rows = [
        [name, f"{images[number]:,}" if same else "–", *(percent(values[number]) for values in measured)]
        for number, name in enumerate(run.class_names)
    ]
    columns = [f"{method.key} {what} %" for method in methods for what in ("accuracy", "confidence")]
    made.table(
        ("class", "images", *columns),
        rows,
        f"Accuracy and mean confidence of the {student} on the test images of each class, means over runs. "
        "More confidence than accuracy is over-confident.",
    )


def _runs(made: Page, comparison: Comparison) -> None:
    made.heading("Runs")
    rows = [
        [named(method), run.name, str(run.seed), str(run.epochs)]
        for method in comparison.methods
        for run in method.runs
    ]
    same = "Runs whose recipes, and their finished teachers' recipes, differ in train.seed alone are one method."
    made.table(("method", "run", "seed", "epochs"), rows, same)
    for line in comparison.other_files:
        made.text(f"{line}.")
    for one, other in comparison.repeated:
        made.text(f"{one} and {other} have the same recipe and seed: what parts them is no choice of the seed.")


def _spread_of_temperature(method: Method, network: str) -> str:
    values = method.temperatures(network)
    mean = fixed(values.mean(), 2)
    return mean if len(values) == 1 else f"{mean} ± {fixed(values.std(ddof=1), 2)}"


def _difference(found: Difference, metric: str) -> str:
    value, low, high = (metric_text(part, metric, sign="+") for part in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]{' *' if found.is_clear else ''}".replace("-", "−")


def _counted(comparison: Comparison) -> str:
    methods, runs = len(comparison.methods), len(comparison.runs)
    return f"{methods} method{'s' * (methods > 1)}, {runs} run{'s' * (runs > 1)}"


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names}).replace_schema_metadata(MADE_BY)
    content = io.BytesIO()
    pq.write_table(table, content)
    atomic_write(path, content.getvalue())
