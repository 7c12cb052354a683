"""A run's results: accuracy and calibration of every network, raw and temperature-scaled, as JSON and as a table."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bdkd_dist.files import atomic_write, json_text, with_nan
from bdkd_dist.records.printing import titled_table
from bdkd_dist.records.wording import METRICS, fixed, metric_head, metric_text

SPLITS = ("validation", "test")
SCALINGS = {"T-scaled": "temperature_scaled", "V-scaled": "vector_scaled"}
"""Post-hoc baselines, fitted on validation: one temperature, a scale and a bias per class (Guo et al., 2017)."""


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, whole or not at all; nan and infinities, which JSON lacks, as null.

    Args:
        path: The file.
        results: What :func:`bdkd_dist.engine.evaluate.calibrated` returns, and whatever else stands beside it.
    """
    atomic_write(path, json_text(results, indent=2))


def read_results(path: Path) -> dict[str, Any]:
    """Return what :func:`write_results` wrote; a split's null comes back as nan."""
    results = json.loads(path.read_text())
    return {key: with_nan(value) if key in SPLITS else value for key, value in results.items()}


def results_table(results: dict[str, Any], split: str = "test") -> Table:
    """Return a split's results in 80 columns: for each network a raw row and one for each post-hoc scaling.

    Top-1, ECE and AdaECE are percentages, NLL is in nats, Brier in [0, 2]; ``–`` where a figure does not exist.
    """
    title = f"{split}, after {results['epochs']} epochs"
    table = titled_table(title, ("network", ""), (*map(metric_head, METRICS), "T"))
    for network in sorted(results[split], key=lambda name: (name != "teacher", name)):
        of_network = results[split][network]
        table.add_row(network, "raw", *_cells(of_network["raw"]), "1.00")
        for label, key in SCALINGS.items():
            if not isinstance(of_network.get(key), dict):  # written by an earlier version, or too many classes
                continue
            temperature = fixed(of_network["temperature"], 2) if key == "temperature_scaled" else ""
            table.add_row("", label, *_cells(of_network[key]), temperature)
        table.add_section()
    return table


def _cells(metrics: dict[str, float]) -> list[str]:
    return [metric_text(metrics[metric], metric) for metric in METRICS]
