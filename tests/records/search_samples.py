"""Trials of a search that never ran."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bdkd_dist.records.trials import Report, Status, Trial


def report(epoch: int, top1: float, ece: float, nll: float, wall_s: float = 10.0, **values: Any) -> Report:
    metrics = {"student/top1": top1, "student/ece": ece, "student/nll": nll, "teacher/top1": top1 + 0.02}
    return Report(epoch, metrics, values, wall_s)


def trial(
    number: int,
    top1: float = 0.7,
    ece: float = 0.03,
    nll: float = 1.0,
    status: Status = "finished",
    epoch: int = 4,
    **values: Any,
) -> Trial:
    """A trial of one report; values by the last part of an objective's key."""
    dotted = {f"objective.{key}": value for key, value in values.items()}
    reason = "the loss is not finite" if status == "failed" else ""
    return Trial(number, f"{number:04d}-sample", dotted, status, reason, [report(epoch, top1, ece, nll)], 20.0)


def lost(number: int) -> Trial:
    """A trial that failed before it reported."""
    return Trial(number, f"{number:04d}-sample", {"objective.nu_forward": 1.0}, "failed", "out of memory")


def searched(count: int = 24, epochs: int = 15, seed: int = 0, constant_epochs: bool = False) -> list[Trial]:
    """A search by ASHA of which each fifth trial went badly: top-1 falls with lr away from 0.05, ECE with nu."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        values = {
            "objective.nu_forward": float(np.exp(rng.uniform(*np.log((0.5, 8))))),
            "objective.entropy_temperature": float(rng.uniform(0.5, 4)),
            "objective.gate": str(rng.choice(["hard", "soft"])),
            "optimizer.lr": float(np.exp(rng.uniform(*np.log((1e-3, 1.0))))),
            "train.batch_size": int(rng.choice([32, 64, 128])),
            "schedule.milestones": [[9, 12], [6, 9, 12]][int(rng.integers(2))],
        }
        off = abs(math.log10(values["optimizer.lr"] / 0.05))
        top = 0.62 - 0.18 * off**2 + rng.normal(0, 0.01)
        gap = 0.02 + 0.02 * abs(math.log(values["objective.nu_forward"] / 2)) + abs(rng.normal(0, 0.006))
        status: Status = "finished"
        if constant_epochs:
            last = epochs
        elif number % 11 == 7:
            status, last = "failed", int(rng.integers(0, 4))
        else:
            last = epochs if off < 0.6 and rng.random() < 0.85 else int(rng.choice([2, 5, 8]))
            status = "finished" if last == epochs else "stopped"
        reports = _curve(last, epochs, top, gap, rng)
        name = f"{number:04d}-nu_forward-{values['objective.nu_forward']:.4g}-gate-{values['objective.gate']}"
        reason = "the loss is not finite in step 812 (train.precision=fp16)" if status == "failed" else ""
        trials.append(Trial(number, name, values, status, reason, reports, 22.0 * last))
    return trials


def _curve(last: int, epochs: int, top: float, gap: float, rng: np.random.Generator) -> list[Report]:
    reports = []
    for epoch in range(1, last + 1):
        share = 1 - math.exp(-4 * epoch / epochs)
        top1 = max(0.01, top * share + rng.normal(0, 0.006))
        ece = gap * (0.5 + share / 2) + abs(rng.normal(0, 0.003))
        reports.append(report(epoch, top1, ece, 4.2 - 4.2 * top1 + 3 * ece, wall_s=22.0 + rng.normal(0, 1)))
    return reports


def numbers(trials: Sequence[Trial]) -> list[int]:
    return [one.number for one in trials]
