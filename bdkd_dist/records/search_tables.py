"""What a search leaves as tables: its trials as Parquet, their ranking, the chosen one as a recipe."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdkd_dist import config
from bdkd_dist.config import Recipe
from bdkd_dist.files import atomic_write
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.trials import Trial
from bdkd_dist.records.wording import label, metric_text, value_text

if TYPE_CHECKING:
    import pyarrow as pa


def ranked(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Return the trials best first.

    Those that trained to their end come before stopped and running ones, which have seen less; failed ones and those
    without a report come last. Within each kind the smaller :meth:`Goal.score` of the newest report comes first, and
    of equals the smaller number.
    """

    def key(trial: Trial) -> tuple[int, float, int]:
        if trial.status == "failed" or not trial.reports:
            return 2, 0.0, trial.number
        score = goal.score(trial.metrics)
        return int(trial.status != "finished"), math.inf if math.isnan(score) else score, trial.number

    return sorted(trials, key=key)


def chosen(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Return what the search was for, best first: finished trials that meet the constraints.

    The one with the smallest score; for a Pareto goal all that no other one dominates. None where no finished trial
    meets the constraints.
    """
    able = [trial for trial in ranked(trials, goal) if trial.status == "finished" and _stands(trial, goal)]
    if not goal.is_pareto:
        return able[:1]
    return [able[index] for index in sorted(goal.front([trial.metrics for trial in able]))]


def network(goal: Goal) -> str:
    """Return the network that the goal looks at first."""
    return goal.names[0].partition("/")[0]


def varied(trials: Sequence[Trial]) -> list[str]:
    """Return the dotted keys that the search chose values for, in the order of their first use."""
    return list(dict.fromkeys(key for trial in trials for key in trial.values))


def heads(goal: Goal) -> dict[str, str]:
    """Return the metrics that are shown of a trial, with what stands above them.

    Top-1, ECE and NLL of the goal's network, and whatever else the goal looks at.
    """
    own = network(goal)
    names = (f"{own}/top1", f"{own}/ece", f"{own}/nll", *goal.names, *(bound.name for bound in goal.constraints))
    return {name: label(name) for name in dict.fromkeys(names)}


def figures(metrics: Mapping[str, float], goal: Goal) -> str:
    """Return what is shown of a trial in one line, e.g. ``student top-1 71.20 % ECE 1.20 % NLL 1.0120``."""
    own = network(goal)
    parts = (f"{label(name, unit='')} {metric_text(metrics.get(name), name, unit=' %')}" for name in heads(goal))
    return f"{own} {' '.join(parts).replace(f'{own} ', '')}"


def of_test(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the test split's figures of a run's results by name.

    Args:
        results: What :func:`bdkd_dist.records.results.read_results` returns.

    Returns:
        ``student/top1`` and so on; ``student/temperature`` and, where the logits were divided by it,
        ``student/temperature_scaled/ece``.
    """
    flat: dict[str, float] = {}
    for name, measured in results["test"].items():
        flat |= {f"{name}/{metric}": value for metric, value in measured["raw"].items() if metric != "count"}
        flat[f"{name}/temperature"] = measured["temperature"]
        for metric, value in measured["temperature_scaled"].items():
            if metric != "count":
                flat[f"{name}/temperature_scaled/{metric}"] = value
    return flat


def write_trials(path: Path, trials: Sequence[Trial], tests: Mapping[int, Mapping[str, float]]) -> None:
    """Write the trials as Parquet, whole or not at all: a row each, by number.

    Columns: ``number``, ``name``, ``status``, ``reason``, ``wall_s``, ``device_s``, ``epochs`` (of the newest report);
    one for each varied key under its dotted name, int, float, bool, string or list (JSON where a key's values are of
    several kinds); the newest report's metrics as ``student/ece``; ``test/student/ece`` where there are results; and
    ``reports``, a list of ``{epoch, wall_s, metrics: {name: value}, values: JSON}``. What a trial lacks is null.

    Args:
        path: The file.
        trials: In any order.
        tests: Metrics of the test split by the trial's number.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = sorted(trials, key=lambda trial: trial.number)
    columns = {
        "number": pa.array([trial.number for trial in rows], pa.int64()),
        "name": pa.array([trial.name for trial in rows], pa.string()),
        "status": pa.array([trial.status for trial in rows], pa.string()),
        "reason": pa.array([trial.reason for trial in rows], pa.string()),
        "wall_s": pa.array([trial.wall_s for trial in rows], pa.float64()),
        "device_s": pa.array([trial.device_s for trial in rows], pa.float64()),
        "epochs": pa.array([epochs(trial) for trial in rows], pa.int64()),
    }
    columns |= {key: _values([trial.values.get(key) for trial in rows]) for key in varied(rows)}
    columns |= _metrics([trial.metrics for trial in rows])
    columns |= _metrics([tests.get(trial.number, {}) for trial in rows], "test/")
    columns["reports"] = _reports(rows)
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content, compression="zstd")
    atomic_write(path, content.getvalue())


def epochs(trial: Trial) -> int:
    """Return how many epochs the trial's newest report was after."""
    return trial.reports[-1].epoch if trial.reports else 0


def best_yaml(recipe: Recipe, trial: Trial, goal: Goal) -> str:
    """Return a trial as a recipe that ``bdkd train`` takes, with a head of comments that says where it comes from.

    Args:
        recipe: What the search varied; its ``run.name`` is the search's.
        trial: One that has reported.
        goal: What it was chosen by.
    """
    search = recipe.run.name
    best = config.replace(recipe, {**trial.values, "run.name": f"{search}-best"})
    head = [
        f"The best of the search {search} by {goal_text(goal)}: trial {trial.number}, {trial.name}",
        f"Validation after {epochs(trial)} epochs: {figures(trial.metrics, goal)}",
    ]
    if spans := value_spans(trial):
        head += [
            "Its values changed while it trained:",
            *(f"  epochs {first} to {last}: {_listed(values)}" for first, last, values in spans),
            "A recipe holds the last values only: training by it from the start is not what the trial did.",
        ]
    return "".join(f"# {line}\n" for line in head) + best.to_yaml()


def goal_text(goal: Goal) -> str:
    """Return what the goal looks at, e.g. ``student/top1 (more is better) with student/ece<=0.02``."""
    better = {"min": "less is better", "max": "more is better"}
    named = (f"{name} ({better[mode]})" for name, mode in zip(goal.names, goal.modes, strict=True))
    bounds = ", ".join(map(str, goal.constraints))
    return " and ".join(named) + (f" with {bounds}" if bounds else "")


def value_spans(trial: Trial) -> list[tuple[int, int, dict[str, Any]]]:
    """Return (first epoch, last epoch, values) of each stretch of training, from 1; none where values never changed."""
    spans: list[tuple[int, int, dict[str, Any]]] = []
    done = 0
    for report in trial.reports:
        if spans and spans[-1][2] == report.values:
            spans[-1] = (spans[-1][0], report.epoch, report.values)
        else:
            spans.append((done + 1, report.epoch, report.values))
        done = report.epoch
    return spans if len(spans) > 1 else []


def _stands(trial: Trial, goal: Goal) -> bool:
    """Whether a trial has the goal's figures and meets its constraints."""
    wanted = [trial.metrics.get(name, math.nan) for name in goal.names]
    return all(map(math.isfinite, wanted)) and goal.meets(trial.metrics)


def _listed(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value_text(value)}" for key, value in values.items()) or "as it began"


def _values(cells: Sequence[Any]) -> "pa.Array":
    import pyarrow as pa

    try:
        return pa.array(cells)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # of several kinds
        return pa.array([None if cell is None else json.dumps(cell) for cell in cells], pa.string())


def _metrics(rows: Sequence[Mapping[str, float]], prefix: str = "") -> dict[str, "pa.Array"]:
    import pyarrow as pa

    names = sorted({name for row in rows for name in row})
    return {f"{prefix}{name}": pa.array([row.get(name) for row in rows], pa.float64()) for name in names}


def _reports(trials: Sequence[Trial]) -> "pa.Array":
    import pyarrow as pa

    report = pa.struct(
        {
            "epoch": pa.int64(),
            "wall_s": pa.float64(),
            "metrics": pa.map_(pa.string(), pa.float64()),
            "values": pa.string(),
        }
    )
    rows = [
        [
            {
                "epoch": report.epoch,
                "wall_s": report.wall_s,
                "metrics": list(report.metrics.items()),
                "values": json.dumps(report.values),
            }
            for report in trial.reports
        ]
        for trial in trials
    ]
    return pa.array(rows, pa.list_(report))
