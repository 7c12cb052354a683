"""The study's rows are recipes, compare like with like, and are trained in whole seeds."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdkd_dist import config
from bdkd_dist.objectives import OBJECTIVES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
study = importlib.import_module("objective_study")
trainings = importlib.import_module("recorded_trainings")

RAMP = {"start": 0.0, "end": 10.0, "shape": "sigmoid", "until": 1.0}
DEFAULTS = dataclasses.asdict(OBJECTIVES["bdkd"]())  # type: ignore[call-overload]
ALL = {name: row for rows in study.GROUPS.values() for name, row in rows.items()}


def recipe_of(row: Any) -> config.Recipe:
    return config.load("digits", [*row.overrides, *["models.teacher_checkpoint=x"] * row.taught])


def present(row: Any) -> bool:
    """Whether this version has what a row needs."""
    objective = next(o.partition("=")[2] for o in row.overrides if o.startswith("objective.name="))
    return objective in OBJECTIVES and not (
        "train.label_smoothing=0.1" in row.overrides and "label_smoothing" not in config.Train.model_fields
    )


@pytest.mark.parametrize("name", [name for name, row in ALL.items() if present(row)])
def test_a_row_is_a_recipe(name: str) -> None:
    recipe = recipe_of(ALL[name])
    assert name.startswith(recipe.objective.name)
    assert recipe.models.teacher_checkpoint == ("x" if name == "kd" else None)


def test_the_small_scale_has_the_settings_of_the_pilots() -> None:
    recipe = study.training(study.SCALES["small"].settings, "ce", 3).recipe
    assert (recipe.models.teacher, recipe.models.student) == ("resnet32", "resnet20")
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.seed) == (80, 64, 3)
    assert (recipe.optimizer.lr, recipe.schedule.kind, recipe.schedule.warmup_epochs) == (0.05, "cosine", 2)
    assert (recipe.data.dataset, recipe.data.num_classes, recipe.data.image_px) == ("files", 10, 16)
    assert (recipe.data.augment.pad_px, recipe.data.augment.mixup_alpha) == (2, 0)


@pytest.mark.parametrize("name", study.SCALES)
def test_a_scale_is_a_recipe_of_as_many_classes_as_its_images_have(name: str) -> None:
    scale = study.SCALES[name]
    recipe = study.training(scale.settings, "bdkd", 0).recipe
    assert recipe.data.num_classes == (scale.subset.classes if scale.subset else 100)
    assert recipe.schedule.kind == "cosine" or recipe.train.epochs == 240


@pytest.mark.parametrize("weight", [1.0, RAMP])
def test_all_gates_have_the_same_total_weight(weight: Any) -> None:
    def total(row: Any) -> list[float]:
        objective = dataclasses.asdict(recipe_of(row).objective)
        boost, own = objective["nu_forward"], objective["student_weight"]
        assert objective["nu_reverse"] == boost
        ends = [own["start"], own["end"]] if isinstance(own, dict) else [own]
        return [(1 + boost) * end for end in ends]

    rows = study.rows_of(DEFAULTS | {"student_weight": weight})
    of_default = total(study.Row("", ("objective.name=bdkd", f"objective.student_weight={study.number(weight)}")))
    for name in ("bdkd_no_gate", "bdkd_swapped"):
        assert total(rows["gate"][name]) == pytest.approx(of_default)
    assert rows["gate"]["bdkd_swapped"].overrides[1] == "objective.nu_forward=0.5"
    assert "1.5 times as large" in rows["gate"]["bdkd_no_gate"].title
    assert "2 times as large" in rows["gate"]["bdkd_swapped"].title


def test_rivals_take_the_ramp_of_bdkd() -> None:
    rows = study.rows_of(DEFAULTS | {"student_weight": RAMP})["ramped"]
    for name, keys in {
        "dml_ramped": ["weight"],
        "kdcl_ramped": ["weight"],
        "jeffreys_ramped": ["student_weight", "teacher_weight"],
    }.items():
        objective = dataclasses.asdict(recipe_of(rows[name]).objective)
        assert [objective[key] for key in keys] == [RAMP] * len(keys)
        assert objective.get("temperature") == (None if name == "dml_ramped" else 4)


def test_groups_and_names_are_taken_once_and_in_order() -> None:
    assert study.chosen(["bdkd", "augmented", "ce", "bdkd_mixup"]) == [
        *("bdkd", "ce_cutmix", "bdkd_mixup", "bdkd_cutmix", "ce")
    ]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--rows", "bdkt", "--report"], "unknown row 'bdkt'; did you mean 'bdkd'?"),
        (["--rows", "ce"], "--cifar100 FOLDER is needed, unless --report is given"),
        (["--rows", "ce", "--cifar100", "nowhere"], "--cifar100 nowhere: no train-*.parquet is there"),
        (["--rows", "ce", "--seeds", "77", "--report"], "small holds no record of these rows"),
    ],
)
def test_a_mistake_is_one_line(
    given: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["objective_study.py", "--out", str(tmp_path), *given])
    monkeypatch.setattr(trainings, "_end_with_children", lambda: None)
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 2
    assert line in capsys.readouterr().err


def write_record(folder: Path, name: str, seed: int, overrides: tuple[str, ...] = ()) -> None:
    """Write a record of 40 test images, half of which are classified correctly."""
    record = folder / f"{name}-{seed}"
    (record / "predictions").mkdir(parents=True)
    training = study.training(study.SCALES["small"].settings, name, seed)
    recipe = config.load(training.arguments[0], [*training.arguments[1:], *overrides])
    (record / "recipe.yaml").write_text(recipe.to_yaml())
    figures = {"top1": 0.5, "ece": 0.25, "adaece": 0.25, "nll": 1.0, "brier": 0.6, "gap": 0.25}
    network = {"raw": figures, "temperature_scaled": figures, "temperature": 1.0}
    results = {"validation": {}, "test": {"teacher": network, "student": network}, "epochs": 80}
    (record / "results.json").write_text(json.dumps(results))
    gpus = [{"name": "H200"}] if seed else []
    start = {
        "started": f"2026-12-0{seed + 1}T01:02:03+00:00",
        "python": "3.11.7",
        "packages": {"torch": "2.14.1", "ray": None, "ffcv": None},
        "code": {"git": {"commit": "abcdef0123456789", "dirty": False}},
        "hardware": {"cpu": "EPYC", "usable_cores": 2, "gpus": gpus},
    }
    (record / "environment.json").write_text(json.dumps([start]))
    columns: dict[str, Any] = {"index": np.arange(40), "label": np.zeros(40, int)}
    for one in ("teacher", "student"):
        columns[f"{one}_top5"] = [[n % 2] for n in range(40)]
        columns[f"{one}_confidence"] = np.full(40, 0.75, np.float32)
        columns[f"{one}_nll"] = np.full(40, 1.0, np.float32)
    table = pa.table(columns).replace_schema_metadata({"class_names": json.dumps(["apple", "bear"])})
    pq.write_table(table, record / "predictions/test.parquet")


def printed(records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> str:
    monkeypatch.setattr(study, "RECORDS", records)
    monkeypatch.setattr(trainings, "_end_with_children", lambda: None)
    monkeypatch.setattr(sys, "argv", ["objective_study.py", "--report", *given])
    study.main()
    return capsys.readouterr().out


def test_a_report_is_of_the_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("ce", 0), ("ce", 1), ("bdkd", 0)):
        write_record(tmp_path / "small", name, seed)
    text = printed(tmp_path, monkeypatch, capsys, "--rows", "ce", "dml", "bdkd")
    first, second, *_ = text.splitlines()
    assert first == (
        "date: 2026-12-01 to 2026-12-02   commit: abcdef0   hardware: EPYC, 2 cores; Python 3.11.7, torch 2.14.1 "
        "(2 of 3 starts) | EPYC, 2 cores and H200; Python 3.11.7, torch 2.14.1 (1 of 3 starts)"
    )
    assert second == (
        "command: .venv/bin/python benchmarks/objective_study.py --cifar100 FOLDER --scale small --rows ce dml bdkd"
    )
    assert "| `ce` (n = 2) | 50.00 ± 0.00 |" in text
    assert "| `bdkd` (n = 1) | 50.00 | 1.000 |" in text
    assert "left out: `dml`." in text


def test_a_record_of_another_recipe_is_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path / "small", "bdkd", 0, ("objective.temperature=3",))
    with pytest.raises(SystemExit):
        printed(tmp_path, monkeypatch, capsys)
    assert "small/bdkd-0: objective.temperature is 3.0 there and" in capsys.readouterr().err


def test_trainings_come_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(study, "RECORDS", tmp_path)
    monkeypatch.setattr(study.Subset, "write", lambda self, source, target: None)

    def train_all(wanted: list[Any], records: Path, out: Path, side_by_side: int, end: float | None) -> None:
        assert (records, side_by_side, end) == (tmp_path / "small", 2, None)
        assert wanted[1].teacher.name == "ce-0"
        asked.extend(training.name for training in wanted)
        raise trainings.OutOfTimeError

    monkeypatch.setattr(study, "train_all", train_all)
    monkeypatch.setattr(trainings, "_end_with_children", lambda: None)
    given = ["--cifar100", "images", "--rows", "dml", "kd", "--seeds", "0", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["objective_study.py", *given])
    with pytest.raises(SystemExit, match="the same command goes on"):
        study.main()
    assert asked == ["dml-0", "kd-0", "dml-4", "kd-4"]
