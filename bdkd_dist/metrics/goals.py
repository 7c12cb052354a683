"""What a search looks for: the best of one metric, or the front of two, under bounds on others."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from bdkd_dist.errors import UserError, nearest, unknown

Mode = Literal["min", "max"]

BETTER: dict[str, Mode | None] = {
    "top1": "max",
    "top5": "max",
    "ece": "min",
    "adaece": "min",
    "classwise_ece": "min",
    "mce": "min",
    "gap": None,
    "nll": "min",
    "brier": "min",
    "brier_reliability": "min",
    "brier_resolution": "max",
    "brier_uncertainty": None,
    "entropy": None,
    "auroc": "max",
    "aurc": "min",
    "count": None,
}
"""Which end of each figure of :meth:`bdkd_dist.metrics.CalibrationState.compute` is the better one; None: neither."""

SHORT = {"nll": "student/nll", "accuracy": "student/top1", "ece": "student/ece"}
"""What a goal or a constraint may call its metric instead."""

PARETO = ("student/top1", "student/ece")

PERCENT = ("top1", "top5", "ece", "adaece", "classwise_ece", "mce", "gap")
"""Fractions that are shown as percentages."""

_NETWORKS = re.compile(r"teacher|student(_[1-9]\d*)?(_ema)?")


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric, e.g. ``student/ece<=0.02``."""

    name: str
    """``network/metric``."""
    relation: Literal["<=", ">="]
    bound: float

    @classmethod
    def parse(cls, text: str, networks: Sequence[str] | None = None) -> Self:
        """Read ``network/metric<=bound`` or ``>=``; :data:`SHORT` names and spaces are allowed.

        Raises:
            UserError: Another form, a metric or network that is not there, or a bound that is not a finite number.
        """
        name, relation, bound = (part.strip() for part in _split(text))
        name = SHORT.get(name, name)
        if relation not in ("<=", ">="):
            asked = next((f"{sign}=" for sign in "<>" if sign in relation), "<= or >=")
            raise UserError(f"constraint '{text}': write {asked}, e.g. '{name}{asked[:2]}{bound}'")
        try:
            number = float(bound)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"constraint '{text}': '{bound}' is no number, e.g. '{name}{relation}0.02'")
        _check_metric(f"of constraint '{text}'", name, networks)
        return cls(name, "<=" if relation == "<=" else ">=", number)

    def violation(self, metrics: Mapping[str, float]) -> float:
        """Return by how much the bound is missed, as a share of the bound (of 1 where it is 0); nan misses by inf."""
        value = metrics.get(self.name, math.nan)
        if math.isnan(value):
            return math.inf
        over = value - self.bound if self.relation == "<=" else self.bound - value
        return max(0.0, over) / (abs(self.bound) or 1.0)

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.bound:g}"


@dataclass(frozen=True)
class Goal:
    """What makes one trial better than another. Metrics come by ``network/metric``; a missing one counts as nan."""

    names: tuple[str, ...]
    """The metrics it looks at."""
    modes: tuple[Mode, ...]
    """The better end of each."""
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def parse(cls, goal: str, subject_to: Sequence[str] = (), networks: Sequence[str] | None = None) -> Self:
        """Read a goal.

        Args:
            goal: ``nll``, ``accuracy``, ``ece``, ``pareto`` (the student's accuracy and ECE) or ``network/metric``.
            subject_to: Constraints, e.g. ``student/ece<=0.02``.
            networks: The networks that are evaluated, where they are known.

        Raises:
            UserError: A goal or a constraint names no metric or network, or is of another form.
        """
        names = PARETO if goal == "pareto" else (SHORT.get(goal, goal),)
        if "/" not in names[0]:
            spellings = [*SHORT, "pareto", *(f"student/{metric}" for metric in BETTER)]
            raise UserError(
                f"unknown goal '{goal}'{nearest(goal, spellings)} (allowed: {', '.join(SHORT)}, pareto, or "
                "network/metric, e.g. student/brier)"
            )
        modes = tuple(_better(goal, name, networks) for name in names)
        return cls(names, modes, tuple(Constraint.parse(text, networks) for text in subject_to))

    @property
    def is_pareto(self) -> bool:
        """Whether it looks at more than one metric."""
        return len(self.names) > 1

    def score(self, metrics: Mapping[str, float]) -> float:
        """Return one number for a row of metrics; smaller is better, nan becomes inf.

        The metric itself, negated where more is better; of a Pareto goal ``student/nll``, a proper score of both its
        metrics. With constraints the order is Deb's (2000, "An efficient constraint handling method for genetic
        algorithms", section 3): what meets them comes before what does not, and among the latter the smaller sum of
        violations, each as a share of its bound. For that the metric x becomes x/(1+|x|), which is below 1, and a sum
        of violations v becomes 1+v.
        """
        name, mode = (SHORT["nll"], "min") if self.is_pareto else (self.names[0], self.modes[0])
        value = metrics.get(name, math.nan) * (-1 if mode == "max" else 1)
        if math.isnan(value):
            return math.inf
        if not self.constraints:
            return value
        violation = self._violation(metrics)
        if violation > 0:
            return 1 + violation
        return value / (1 + abs(value)) if math.isfinite(value) else math.copysign(1, value)

    def objectives(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Return what a sampler of several objectives is told, each to be made small.

        Of a Pareto goal both metrics, or for a row that misses constraints twice one number that is worse than those
        of any row that meets them; of other goals the score.
        """
        if not self.is_pareto or not self.meets(metrics):
            return (self.score(metrics),) * len(self.names)
        return self._costs(metrics)

    def meets(self, metrics: Mapping[str, float]) -> bool:
        """Return whether a row of metrics meets all constraints."""
        return self._violation(metrics) == 0

    def front(self, rows: Sequence[Mapping[str, float]]) -> list[int]:
        """Return the indices of the rows that no other row dominates, among those that meet the constraints.

        A row dominates another where it is at least as good in all metrics of the goal and better in one. Rows with a
        nan among these are left out; equal rows stay together.
        """
        costs = {index: self._costs(row) for index, row in enumerate(rows) if self.meets(row)}
        costs = {index: cost for index, cost in costs.items() if not any(map(math.isnan, cost))}
        kept: list[int] = []
        for index in sorted(costs, key=costs.__getitem__):  # whatever dominates a row comes before it
            if not any(_dominates(costs[other], costs[index]) for other in kept):
                kept.append(index)
        return sorted(kept)

    def nearest(self, rows: Sequence[Mapping[str, float]]) -> int:
        """Return the index of the row (there is at least one) that misses the constraints by the least, the first."""
        return min(range(len(rows)), key=lambda index: self._violation(rows[index]))

    def said(self, metrics: Mapping[str, float]) -> str:
        """Return what a person reads about a row, e.g. ``student/top1 71.2 %, student/ece 3.1 % (asked: <= 2 %)``."""
        names = dict.fromkeys((*self.names, *(constraint.name for constraint in self.constraints)))
        return ", ".join(f"{name} {_figure(name, metrics.get(name, math.nan))}{self._asked(name)}" for name in names)

    def _asked(self, name: str) -> str:
        bounds = [f"{c.relation} {_figure(name, c.bound, digits=6)}" for c in self.constraints if c.name == name]
        return f" (asked: {' and '.join(bounds)})" if bounds else ""

    def _violation(self, metrics: Mapping[str, float]) -> float:
        return sum(constraint.violation(metrics) for constraint in self.constraints)

    def _costs(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Return the goal's metrics, each so that smaller is better."""
        pairs = zip(self.names, self.modes, strict=True)
        return tuple(metrics.get(name, math.nan) * (-1 if mode == "max" else 1) for name, mode in pairs)


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _split(text: str) -> tuple[str, str, str]:
    """Return the name, the relation and the bound of a constraint."""
    parts = re.fullmatch(r"([^<>=]*)([<>=]+)([^<>=]*)", text)
    if parts is None or not parts[1].strip() or not parts[3].strip():
        raise UserError(f"constraint '{text}' is not metric<=bound or metric>=bound, e.g. 'student/ece<=0.02'")
    return parts[1], parts[2], parts[3]


def _better(goal: str, name: str, networks: Sequence[str] | None) -> Mode:
    """Return the better end of the metric that a goal names."""
    _check_metric(f"of goal '{goal}'", name, networks)
    mode = BETTER[name.partition("/")[2]]
    if mode is None:
        directed = ", ".join(metric for metric, better in BETTER.items() if better)
        raise UserError(f"goal '{goal}': neither more nor less of it is better in itself (allowed: {directed})")
    return mode


def _check_metric(whose: str, name: str, networks: Sequence[str] | None) -> None:
    """Raise UserError unless ``name`` is ``network/metric`` of a network that may be there."""
    network, slash, metric = name.partition("/")
    if not slash:
        spellings = [*SHORT, *(f"student/{known}" for known in BETTER)]
        raise UserError(
            f"unknown metric {whose}: '{name}'{nearest(name, spellings)} (allowed: {', '.join(SHORT)}, or "
            "network/metric, e.g. student/brier)"
        )
    if networks is None and not _NETWORKS.fullmatch(network):
        raise unknown(f"network {whose}:", network, ("teacher", "student", "student_ema", "student_1", "student_2"))
    if networks is not None and network not in networks:
        raise unknown(f"network {whose}:", network, networks)
    if metric not in BETTER:
        raise unknown(f"metric {whose}:", metric, BETTER)


def _figure(name: str, value: float, digits: int = 3) -> str:
    """Return a metric as a person reads it: percent where it is a share."""
    share = name.partition("/")[2] in PERCENT
    return f"{100 * value:.{digits}g} %" if share else f"{value:.{digits}g}"
