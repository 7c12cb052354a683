import math
from typing import Any

import pytest

from bdkd_dist.records.wording import (
    METRICS,
    label,
    metric_head,
    metric_text,
    short_names,
    students_first,
    value_text,
)


def test_a_key_is_called_by_its_last_part_unless_two_end_so() -> None:
    assert short_names(["objective.name", "optimizer.lr"]) == {"objective.name": "objective", "optimizer.lr": "lr"}
    assert short_names(["objective.student_weight.end", "objective.ce_weight.end"]) == {
        "objective.student_weight.end": "student_weight.end",
        "objective.ce_weight.end": "ce_weight.end",
    }
    assert list(short_names(["data.order", "train.order", "train.seed"]).values()) == [
        "data.order",
        "train.order",
        "seed",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (1e-5, "1e-05"), (64, "64"), (True, "true"), (None, "null"), ([9, 0.5], "[9,0.5]")],
)
def test_values_are_said_shortly(value: Any, text: str) -> None:
    assert value_text(value) == text


def test_figures_are_said_in_percent_where_they_are_shares() -> None:
    assert metric_text(0.01234, "student/ece", unit=" %") == "1.23 %"
    assert metric_text(0.01234, "ece", sign="+") == "+1.23"
    assert metric_text(1.23456, "student/nll", unit=" %") == "1.2346"
    assert metric_text(math.nan, "student/top1", unit=" %") == metric_text(None, "teacher/nll") == "–"


def test_metrics_are_called_by_names_with_their_unit() -> None:
    assert list(map(metric_head, METRICS)) == ["top-1 %", "ECE %", "AdaECE %", "NLL", "Brier"]
    assert (label("student/top1"), label("teacher/ece", unit=" (%)")) == ("student top-1 %", "teacher ECE (%)")
    assert (label("student/mce", unit=""), label("student/entropy")) == ("student mce", "student entropy")


def test_the_teacher_comes_last() -> None:
    assert students_first({"teacher", "student_2", "student_1"}) == ["student_1", "student_2", "teacher"]
