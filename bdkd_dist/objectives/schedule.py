"""Parameters that change over training, as pure functions of the share of training that is done."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from bdkd_dist.errors import UserError, unknown

Shape = Literal["linear", "sigmoid", "cosine"]


@dataclass(frozen=True, kw_only=True)
class ParameterSchedule:
    """A number that moves from ``start`` to ``end`` over the first ``until`` of training and then stays there.

    With x the share of that part which is done, from 0 to 1, the value is ``start + (end − start)·w(x)``:

    * ``linear``: w = x;
    * ``sigmoid``: w = exp(−5·(1 − x)²), the ramp-up of Laine and Aila 2017 (arXiv 1610.02242) that online distillation
      took over (ONE, OKDDip). It begins at exp(−5) = 0.0067, not at 0;
    * ``cosine``: w = (1 − cos(πx))/2.

    Attributes:
        start: The value at first.
        end: The value at last.
        shape: How it gets there.
        until: Share of all optimiser steps after which it stays at ``end``, in (0, 1].

    Raises:
        UserError: An end is not finite, ``until`` is out of range, or there is no such shape.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # read where recipes are checked

    start: float
    end: float
    shape: Shape = "linear"
    until: float = 1.0

    def __post_init__(self) -> None:
        for field in ("start", "end"):
            check_number(field, getattr(self, field), least=-math.inf)
        if self.shape not in get_args(Shape):
            raise unknown("shape", str(self.shape), get_args(Shape))
        check_number("until", self.until, positive=True, most=1)

    def at(self, progress: float) -> float:
        """Return the value once a share ``progress``, in [0, 1], of all steps is done."""
        x = min(progress / self.until, 1.0)
        match self.shape:
            case "linear":
                weight = x
            case "sigmoid":
                weight = math.exp(-5 * (1 - x) ** 2)
            case "cosine":
                weight = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * weight


Number = float | ParameterSchedule
"""A parameter of an objective as a recipe has it."""

Value = float | Tensor
"""A parameter at some step: a number, or a scalar on the device where steps are compiled or recorded."""


def value(parameter: Number) -> Value:
    """Return what a formula computes with.

    Raises:
        UserError: The parameter is a schedule that no progress has been given.
    """
    if isinstance(parameter, ParameterSchedule):
        raise UserError("a parameter is a schedule: call at(progress) on the objective before it computes a loss")
    return parameter


def equals(parameter: Value, number: float) -> bool:
    """Whether a parameter is known to be a number; of a tensor that is not known without waiting for the device."""
    return not isinstance(parameter, Tensor) and parameter == number


def check_number(
    field: str,
    value: Number,
    *,
    least: float = 0.0,
    positive: bool = False,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Raise UserError unless a parameter is a finite number in the range asked for; of a schedule, both its ends.

    Args:
        field: Its name, for the line.
        value: The parameter.
        least: It must not be less.
        positive: It must be above 0.
        below: It must be less.
        most: It must not be more.
    """
    if isinstance(value, ParameterSchedule):
        for end in ("start", "end"):
            check_number(f"{field}.{end}", getattr(value, end), least=least, positive=positive, below=below, most=most)
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (positive and value <= 0) or value >= below or value > most:
        bounds = ["> 0"] if positive else [f">= {least:g}"] if math.isfinite(least) else []
        bounds += [f"< {below:g}"] if math.isfinite(below) else []
        bounds += [f"<= {most:g}"] if math.isfinite(most) else []
        raise UserError(f"{field}={value} is not allowed (allowed: {', '.join(['finite', *bounds])})")
