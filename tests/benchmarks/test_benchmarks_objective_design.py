"""The design tells main effects from each other and from interactions of two, and its figures are least squares."""

import dataclasses
import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdkd_dist import config

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
study = importlib.import_module("objective_design")
trainings = importlib.import_module("recorded_trainings")

LETTERS = "ABCDEFG"
COEFFICIENTS = {"A": -0.04, "B": 0.1, "C": 0.0, "D": 0.02, "E": -0.005, "F": 0.03, "G": 0.001}


def test_the_design_is_orthogonal_and_of_resolution_four() -> None:
    columns = study.design()
    x = np.column_stack([columns[letter] for letter in LETTERS])
    assert np.array_equal(x.T @ x, 16 * np.eye(7))
    assert np.array_equal(x.sum(0), np.zeros(7))
    assert len(set(map(tuple, x))) == 16
    # Any three columns together are independent of the mean, which is resolution IV: no word of three letters or less.
    for three in itertools.combinations(LETTERS, 3):
        assert np.prod([columns[letter] for letter in three], axis=0).sum() == 0
    words = [four for four in itertools.combinations(LETTERS, 4) if abs(study.product("".join(four)).sum()) == 16]
    assert {"".join(word) for word in words} == {"ABCE", "BCDF", "ACDG", "ADEF", "BDEG", "ABFG", "CEFG"}


def test_what_is_mixed_up_is_named() -> None:
    assert [study.aliases(letter) for letter in LETTERS] == [[]] * 7
    assert {frozenset(pairs) for pairs in study.interactions()} == {
        frozenset(pairs)
        for pairs in (
            *(("AB", "CE", "FG"), ("AC", "BE", "DG"), ("AD", "EF", "CG"), ("AE", "BC", "DF")),
            *(("AF", "DE", "BG"), ("BD", "CF", "EG"), ("AG", "CD", "BF")),
        )
    }


def test_an_effect_that_is_mixed_up_with_an_interaction_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "GENERATORS", {"E": "AB", "F": "BCD", "G": "ACD"})
    assert study.aliases("E") == ["AB", "FG"]
    assert study.aliases("A") == ["BE"]


def test_effects_are_those_of_least_squares() -> None:
    columns = study.design()
    noise = np.random.default_rng(0).normal(0, 0.01, 16)
    y = 0.9 + sum(b * columns[letter] for letter, b in COEFFICIENTS.items()) + noise
    x = np.column_stack([np.ones(16), *(columns[letter] for letter in LETTERS)])
    fit, residual, *_ = np.linalg.lstsq(x, y, rcond=None)
    covariance = residual[0] / (16 - 8) * np.linalg.inv(x.T @ x)
    found = study.effects_of(y)
    for n, letter in enumerate(LETTERS, start=1):
        assert found.effects[letter] == pytest.approx(2 * fit[n])
        assert found.effects[letter] == pytest.approx(2 * COEFFICIENTS[letter], abs=0.02)
        assert found.standard_error == pytest.approx(2 * np.sqrt(covariance[n, n]))
        assert found.t(letter) == pytest.approx(fit[n] / np.sqrt(covariance[n, n]))
        high, low = (y[columns[letter] == level].mean() for level in (1, -1))
        assert found.effects[letter] == pytest.approx(high - low)
    assert found.standard_error < 0.02


def test_an_interaction_is_no_main_effect() -> None:
    columns = study.design()
    found = study.effects_of(0.5 + 0.25 * columns["A"] * columns["B"])
    assert found.effects == pytest.approx(dict.fromkeys(LETTERS, 0.0), abs=1e-15)
    assert found.interactions == pytest.approx(
        {pairs: 0.5 if "AB" in pairs else 0.0 for pairs in study.interactions()}, abs=1e-15
    )
    assert found.standard_error == pytest.approx(np.sqrt(4 * (16 * 0.25**2 / 8) / 16))  # it is in the residual


def objective_of(run: Any) -> dict[str, Any]:
    return dataclasses.asdict(run.recipe.objective)


def ends(value: Any) -> tuple[float, float, str]:
    """Return start, end and shape of a parameter."""
    return (value["start"], value["end"], value["shape"]) if isinstance(value, dict) else (value, value, "")


def test_runs_are_recipes_of_the_designs_levels() -> None:
    columns = study.design()
    runs = study.trainings(study.SETTINGS)
    assert [run.name for run in runs] == [f"run{number:02d}" for number in range(1, 17)]
    for n, run in enumerate(runs):
        high = {letter: columns[letter][n] > 0 for letter in LETTERS}
        objective = objective_of(run)
        end, boost = 10.0 if high["B"] else 3.0, 2.0 if high["E"] else 1.0
        of_student = end * 3 / (1 + boost)  # both factors together 3 times the end
        of_teacher = end * (1 if high["C"] else 0.33)
        for key, weight in (("student_weight", of_student), ("teacher_weight", of_teacher)):
            want = (0, weight, "sigmoid") if high["A"] else (weight, weight, "")
            assert ends(objective[key]) == pytest.approx(want)
        assert ends(objective["ce_weight"]) == ((1, 0.5, "sigmoid") if high["F"] else (1, 1, ""))
        assert (objective["nu_forward"], objective["nu_reverse"]) == (boost, boost)
        assert objective["temperature"] == (4 if high["D"] else 1)
        assert run.recipe.train.seed == (101 if high["G"] else 100)
        assert run.recipe.train.epochs == study.EPOCHS == 40


def write_record(record: Path, run: Any, nll: float) -> None:
    record.mkdir(parents=True)
    recipe = config.load(run.arguments[0], run.arguments[1:])
    (record / "recipe.yaml").write_text(recipe.to_yaml())
    raw = {"nll": nll, "top1": 0.7, "ece": 0.05}
    of_networks = {"student": {"raw": raw}, "teacher": {"raw": raw | {"top1": 0.72}}}
    (record / "results.json").write_text(json.dumps({"validation": of_networks}))  # test images are not there
    start = {
        "started": "2026-12-01T01:02:03+00:00",
        "python": "3.11.7",
        "packages": {"torch": "2.14.1", "ray": None, "ffcv": None},
        "code": {"git": None},
        "hardware": {"cpu": "EPYC", "usable_cores": 2, "gpus": []},
    }
    (record / "environment.json").write_text(json.dumps([start]))


def printed(records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(study, "RECORDS", records)
    monkeypatch.setattr(trainings, "_end_with_children", lambda: None)
    monkeypatch.setattr(sys, "argv", ["objective_design.py", "--report"])
    study.main()
    return capsys.readouterr().out


def test_no_test_images_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def train_all(wanted: list[Any], records: Path, out: Path, *_: object, validation_only: bool) -> None:
        assert validation_only
        assert (records, out) == (tmp_path / "records", tmp_path / "runs")
        asked.extend(training.name for training in wanted)
        raise trainings.OutOfTimeError

    monkeypatch.setattr(study, "train_all", train_all)
    monkeypatch.setattr(study, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(trainings.Subset, "write", lambda self, source, target: None)
    monkeypatch.setattr(trainings, "_end_with_children", lambda: None)
    monkeypatch.setattr(sys, "argv", ["objective_design.py", "--cifar100", "images", "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="the same command goes on"):
        study.main()
    assert asked == [f"run{number:02d}" for number in range(1, 17)]


def test_a_report_is_of_validation_images_and_waits_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = study.design()
    runs = study.trainings(study.SETTINGS)
    values = 0.9 - 0.04 * columns["A"] + 0.1 * columns["B"] + 0.002 * columns["A"] * columns["B"] * columns["D"]
    for run, nll in zip(runs[:-1], values, strict=False):
        write_record(tmp_path / run.name, run, nll)
    text = printed(tmp_path, monkeypatch, capsys)
    assert "No effects yet, as runs are missing: run16." in text
    assert f"| run01 | − | − | − | − | − | − | − | {values[0]:.3f} | 70.00 | 5.00 | 72.00 |" in text

    write_record(tmp_path / "run16", runs[-1], values[-1])
    text = printed(tmp_path, monkeypatch, capsys)
    assert "No effects yet" not in text
    # The residual is ABD alone: variance 16 · 0.002² / 8, so an effect's standard error is 0.002 · √½.
    t = 0.2 / (0.002 * np.sqrt(0.5))
    assert f"| B, end of the divergences' weights | +0.200 (t = {t:+.1f}) |" in text
    assert f"| A, ramp of the divergences' weights | -0.080 (t = {-0.4 * t:+.1f}) |" in text
    assert "| standard error | 0.001 |" in text
    assert "| AB + CE + FG | +0.000 |" in text or "| AB + CE + FG | -0.000 |" in text
    assert "E = ABC, F = BCD, G = ACD" in text
    assert "+0.00 (t = +nan)" in text  # top-1 is the same in all runs
