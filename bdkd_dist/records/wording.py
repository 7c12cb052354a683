"""What metrics, networks, keys and values are called, and how their figures read, in every table and picture."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from bdkd_dist.config import last_name
from bdkd_dist.metrics.goals import PERCENT

METRICS = ("top1", "ece", "adaece", "nll", "brier")
"""What tables have of a network."""
LABELS = {"top1": "top-1", "ece": "ECE", "adaece": "AdaECE", "nll": "NLL", "brier": "Brier"}


def is_percent(name: str) -> bool:
    """Whether a metric, ``ece`` or ``student/ece``, is a fraction that is shown as a percentage."""
    return name.rpartition("/")[2] in PERCENT


def metric_head(metric: str, unit: str = " %") -> str:
    """Return what a metric is called, with a percentage's unit, e.g. ``top-1 %`` or ``NLL``."""
    return LABELS.get(metric, metric) + unit * is_percent(metric)


def label(name: str, unit: str = " %") -> str:
    """Return what a network's metric is called, e.g. ``student top-1 %`` for ``student/top1``."""
    network, _, metric = name.partition("/")
    return f"{network} {metric_head(metric, unit)}"


def metric_text(value: float | None, name: str, sign: str = "", unit: str = "") -> str:
    """Return a metric as a person reads it: percentages with two decimals, others with four.

    Args:
        value: The metric; None and what is not finite is ``–``.
        name: Its own, or its network's with it: ``ece`` or ``student/ece``.
        sign: ``+`` for one before positive numbers too.
        unit: Follows percentages.
    """
    return percent(value, sign, unit) if is_percent(name) else fixed(value, 4, sign)


def percent(value: float | None, sign: str = "", unit: str = "") -> str:
    """Return a fraction as a percentage with two decimals, ``–`` where there is none."""
    return fixed(None if value is None else 100 * value, 2, sign, unit)


def fixed(value: float | None, decimals: int, sign: str = "", unit: str = "") -> str:
    """Return a number with so many decimals, ``–`` where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:{sign}.{decimals}f}{unit}"


def value_text(value: Any) -> str:
    """Return a key's value as a person reads it: four digits of a float, lists in brackets."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(value_text, value))}]"
    return str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return what each dotted key is called where it stands alone: its :func:`last_name`, if no other has it."""
    last = [last_name(key) for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def students_first(networks: Iterable[str]) -> list[str]:
    """Return the networks by name, the teacher last."""
    return sorted(networks, key=lambda name: (name == "teacher", name))
