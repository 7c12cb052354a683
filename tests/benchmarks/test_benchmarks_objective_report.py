"""A study's report: the floor of the ECE is exact, marks and goals follow from the figures, missing rows are told."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from bdkd_dist.errors import UserError
from bdkd_dist.records.comparison import Run
from bdkd_dist.records.comparison_bootstrap import Difference, Said

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
reports = importlib.import_module("objective_report")
tables = importlib.import_module("tables")

N = 400


def exact_floor(confidence: float, count: int) -> float:
    """E|K/n − c| for K of the binomial distribution: the expected ECE of a bin of equal confidences."""
    right = np.arange(count + 1)
    return float(np.sum(binom.pmf(right, count, confidence) * np.abs(right / count - confidence)))


@pytest.mark.parametrize(
    "parts", [{0.7: 200}, {0.95: 300, 0.42: 100}, {0.99: 60, 0.55: 60, 0.31: 80}], ids=["one bin", "two", "three"]
)
def test_the_noise_floor_is_the_expected_ece_of_calibrated_predictions(parts: dict[float, int]) -> None:
    confidence = np.repeat(list(parts), list(parts.values()))
    np.random.default_rng(1).shuffle(confidence)
    want = sum(count / len(confidence) * exact_floor(c, count) for c, count in parts.items())
    assert reports.noise_floor(confidence, draws=20000)[0] == pytest.approx(want, rel=0.02)


def test_the_floors_quantile_is_that_of_the_draws() -> None:
    confidence = np.full(200, 0.7)
    right = np.arange(201)
    deviation = np.abs(right / 200 - 0.7)
    order = np.argsort(deviation)
    reached = np.cumsum(binom.pmf(right, 200, 0.7)[order])
    want = deviation[order][np.searchsorted(reached, 0.95)]
    assert reports.noise_floor(confidence, draws=20000)[1] == pytest.approx(want, abs=0.5 / 200 + 1e-9)


def test_a_floor_falls_with_the_root_of_the_number_of_images() -> None:
    few, many = (reports.noise_floor(np.linspace(0.3, 1, count))[0] for count in (500, 8000))
    assert few / many == pytest.approx(4, rel=0.1)


def run(name: str, *, seed: int = 0, teacher: float = 0.7, mixup: float = 0.0, scaled: Any = None, **raw: float) -> Run:
    """Return a run whose test images have these figures: confidence 0.8 throughout, ``top1`` of them right."""
    figures = {"top1": 0.7, "ece": 0.1, "adaece": 0.1, "nll": 1.0, "brier": 0.4, "gap": 0.1} | raw
    correct = np.zeros(N)
    correct[: round(figures["top1"] * N)] = 1
    np.random.default_rng(seed).shuffle(correct)
    said = Said(np.full(N, 0.8), correct, np.full(N, figures["nll"]))
    student = {"raw": figures, "temperature_scaled": figures | (scaled or {}), "temperature": 1.5}
    of_teacher = {"raw": figures | {"top1": teacher}, "temperature_scaled": figures, "temperature": 1.5}
    recipe = {"train.seed": seed, "data.augment.mixup_alpha": mixup, "data.augment.cutmix_alpha": 0.0}
    results = {"student": student, "teacher": of_teacher}
    both = {"student": said, "teacher": said}
    return Run(f"{name}-{seed}", recipe, results, 80, np.arange(N), np.zeros(N, int), both, ["apple"])


def row(name: str, *runs: Run) -> Any:
    return reports.Measured(name, f"what {name} is", runs)


def five(name: str, **figures: Any) -> Any:
    return row(name, *(run(name, seed=seed, **figures) for seed in range(5)))


BASE = {"top1": 0.7, "ece": 0.18, "nll": 1.3, "brier": 0.48, "scaled": {"ece": 0.028, "nll": 0.92}, "teacher": 0.7}
GOOD = {"top1": 0.73, "ece": 0.02, "nll": 0.8, "brier": 0.38, "teacher": 0.71}


def verdicts(*rows: Any) -> list[str]:
    return [line.split(":")[0].removeprefix("- ") for line in reports.goals(rows).splitlines()[2:]]


@pytest.mark.parametrize(
    ("own", "missed"),
    [
        ({}, []),
        ({"ece": 0.0279}, []),  # ce, recalibrated, has 0.028
        ({"ece": 0.0281}, [0]),
        ({"top1": 0.7175}, [1]),
        ({"nll": 0.845}, []),  # 0.65 · 1.3
        ({"nll": 0.846}, [2]),
        ({"nll": 0.93}, [2, 3, 4]),  # dml's is 0.9
        ({"brier": 0.43}, [5]),  # dml's is 0.42
        ({"teacher": 0.69}, [6]),
        ({"ece": 0.11}, [0, 7]),  # dml's is 0.1
    ],
)
def test_goals_are_computed(own: dict[str, float], missed: list[int]) -> None:
    mixed = five("ce_mixup", nll=0.5, brier=0.1, mixup=0.2)  # does not count among the lowest
    rows = [five("ce", **BASE), mixed, five("dml", nll=0.9, brier=0.42), five("bdkd", **GOOD | own)]
    assert [n for n, said in enumerate(verdicts(*rows)) if said == "missed"] == missed
    assert len(verdicts(*rows)) == 8


def test_an_ece_at_its_own_floor_meets_the_goal_where_recalibration_is_lower() -> None:
    floor = exact_floor(0.8, N)
    base = five("ce", **BASE | {"scaled": {"ece": 0.5 * floor, "nll": 0.92}})
    assert verdicts(base, five("bdkd", **GOOD | {"ece": 0.9 * floor}))[0] == "met"
    assert verdicts(base, five("bdkd", **GOOD | {"ece": 1.2 * floor}))[0] == "missed"


@pytest.mark.parametrize("there", ["ce", "bdkd"])
def test_goals_are_not_judged_without_both_rows(there: str) -> None:
    assert "not judged" in reports.goals([five(there)])


@pytest.mark.parametrize(
    ("top1", "nll", "seen"),
    [
        ((0.02, 0.01, 0.03), (-0.2, -0.3, -0.1), True),
        ((0.02, -0.01, 0.03), (-0.2, -0.3, -0.1), False),
        ((0.02, 0.01, 0.03), (0.2, 0.1, 0.3), False),
    ],
)
def test_the_positive_control_asks_for_both(
    top1: tuple[float, float, float], nll: tuple[float, float, float], seen: bool
) -> None:
    text = reports.control({"dml": {"top1": Difference(*top1), "nll": Difference(*nll)}})
    assert ("The study sees it." in text) == seen
    assert f"top-1 +2.00 [{100 * top1[1]:+.2f}, +3.00]" in text


def test_a_report_holds_the_figures_and_says_what_is_missing(tmp_path: Path) -> None:
    calibrated = row("bdkd", *(run("bdkd", seed=seed, **GOOD | {"top1": 0.73 + 0.01 * seed}) for seed in range(3)))
    rows = [five("ce", **BASE), five("dml", nll=0.9, brier=0.42, top1=0.72), calibrated]
    text = reports.report(rows, "Small images", missing=["focal"], published="Others: 72.50.")
    path = tmp_path / "study.txt"
    path.write_text(f"date: today\ncommand: c\n\n{text}\n")
    assert tables.tables(path) == text  # a page takes all of it, the positive control first
    assert text.startswith("**Positive control**")

    ce, dml, bdkd = (next(line for line in text.splitlines() if line.startswith(f"| `{name}`")) for name in NAMES)
    floor = 100 * exact_floor(0.8, N)
    cells = [cell.strip() for cell in bdkd.split("|")[1:-1]]
    assert cells[:5] == ["`bdkd` (n = 3)", "74.00 ± 1.00", "0.800 ± 0.000", "0.380 ± 0.000", "≈ 2.00 ± 0.00"]
    assert float(cells[5].split()[0]) == pytest.approx(floor, rel=0.05)
    assert cells[6:] == ["+10.00 ± 0.00", "2.00 ± 0.00", "0.800 ± 0.000", "71.00 ± 0.00", "2.00 ± 0.00"]
    assert ce.startswith("| `ce` | 70.00 ± 0.00 | 1.300 ± 0.000 | 0.480 ± 0.000 | 18.00 ± 0.00 |")
    assert "| 2.80 ± 0.00 | 0.920 ± 0.000 | 70.00 ± 0.00 |" in ce
    assert "≈" not in dml
    assert "- `dml`: what dml is" in text
    assert "Without records, and left out: `focal`." in text
    assert "Others: 72.50." in text
    assert "| `dml` | +2.00 [" in text.split("differences from `ce`")[1]
    assert "| -0.400 [-0.400, -0.400] * |" in text.split("differences from `ce`")[1]
    assert "| +0.500 [+0.500, +0.500] * |" in text.split("differences from `bdkd`")[1]


NAMES = ("ce", "dml", "bdkd")


def test_differences_are_those_of_the_means() -> None:
    rows = [five("ce", **BASE), row("bdkd", *(run("bdkd", seed=s, top1=0.71 + 0.01 * s, nll=0.8 + s) for s in (0, 1)))]
    found = reports.differences(rows, "ce")["bdkd"]
    assert found["top1"].value == pytest.approx(0.015)
    assert found["nll"].value == pytest.approx(0.0)
    assert found["top1"].low < 0.015 < found["top1"].high
    assert reports.differences(rows, "dml") == {}


@pytest.mark.parametrize("other", ["label", "index", "test_fingerprint"])
def test_runs_of_other_test_images_are_refused(other: str) -> None:
    one, two = run("ce"), run("dml")
    object.__setattr__(two, other, "f" if other == "test_fingerprint" else np.arange(N) + 1)
    with pytest.raises(UserError, match="dml-0 was tested on other images than ce-0"):
        reports.report([row("ce", one), row("dml", two)], "Small images")


def test_a_single_run_has_no_spread() -> None:
    assert reports.spread([0.5], lambda value, sign: f"{value:{sign}.1f}", "+") == "+0.5"
    assert math.isclose(float(reports.spread([1.0, 3.0], lambda value, sign: f"{value}").split(" ± ")[1]), 2**0.5)
