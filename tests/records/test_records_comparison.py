"""A comparison's figures against NumPy written out here, and against values worked by hand."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from test_records_comparison_bootstrap import written_out

from bdkd_dist import config
from bdkd_dist.config import flatten
from bdkd_dist.engine.evaluate import Outputs, predictions
from bdkd_dist.errors import UserError
from bdkd_dist.metrics import CalibrationState
from bdkd_dist.records.comparison import Comparison, Run, pooled
from bdkd_dist.records.comparison_bootstrap import Said
from bdkd_dist.records.comparison_figures import accuracy_ece_figure, reliability_rows, save_stacked_png
from bdkd_dist.records.comparison_report import (
    is_comparison,
    method_rows,
    methods_table,
    page,
    spread,
    write_comparison,
)
from bdkd_dist.records.predictions import write_predictions
from bdkd_dist.records.results import write_results

CLASSES, COUNT = 10, 200
NAMES = [f"class {n}" for n in range(CLASSES)]


def logits(seed: int, skill: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a network that is right more often than not, and the labels."""
    rng = np.random.default_rng(99)
    label = rng.integers(CLASSES, size=COUNT)
    noise = np.random.default_rng(seed).normal(size=(COUNT, CLASSES))
    noise[np.arange(COUNT), label] += skill
    return torch.from_numpy(2 * noise), torch.from_numpy(label)


def measured(z: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    state = CalibrationState(CLASSES)
    state.update(z, label)
    return state.compute()


def left(folder: Path, *overrides: str, skill: float = 2.0) -> Run:
    """A run as training leaves it, of made-up logits, read back."""
    recipe = config.load("digits", [f"run.name={folder.name}", *overrides])
    networks = {role: logits(1000 * recipe.train.seed + n, skill) for n, role in enumerate(recipe.models.by_role)}
    test = {
        name: {
            "raw": measured(z, label),
            "temperature_scaled": measured(z / 1.5, label),
            "temperature": 1.5,
            "vector_scaled": None,
        }
        for name, (z, label) in networks.items()
    }
    (folder / "predictions").mkdir(parents=True)
    write_results(folder / "results.json", {"epochs": 3, "test": test, "validation": test})
    label = networks["student" if "student" in networks else "student_1"][1]
    said = predictions(Outputs(torch.arange(COUNT), label, {name: z for name, (z, _) in networks.items()}))
    assert said is not None
    write_predictions(folder / "predictions/test.parquet", *said, NAMES)
    return Run.read(f"runs/{folder.name}", recipe, folder / "results.json", folder / "predictions/test.parquet")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two methods of two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    made = [("bdkd", 1, 2.0), ("dml", 1, 1.6), ("bdkd", 2, 2.0), ("dml", 2, 1.6)]
    return [
        left(folder / f"{name}-{seed}", f"objective.name={name}", f"train.seed={seed}", skill=skill)
        for name, seed, skill in made
    ]


# --- which runs are one method


def test_runs_that_differ_in_seed_and_place_alone_are_one_method(four: list[Run], tmp_path: Path) -> None:
    other = left(tmp_path / "elsewhere", "train.seed=3", "data.threads=2", "run.storage=/x", "launch.max_failures=9")
    methods = Comparison.of([*four, other]).methods
    assert [(m.key, m.label, [run.seed for run in m.runs]) for m in methods] == [
        ("A", "objective bdkd", [1, 2, 3]),
        ("B", "objective dml", [1, 2]),
    ]


def taught(run: Run, name: str, by: str, *teacher: str) -> Run:
    """The run as if it had learnt from the run ``by``, whose recipe has these settings."""
    known = flatten(config.load("digits", ["objective.name=ce", *teacher]).to_dict()) if teacher else None
    return replace(run, name=name, recipe=run.recipe | {"models.teacher_checkpoint": by}, teacher=known)


def test_runs_taught_by_teachers_that_differ_in_seed_alone_are_one_method(four: list[Run]) -> None:
    runs = [
        taught(four[0], "kd-1", "ce-1", "train.seed=1"),
        taught(four[2], "kd-2", "ce-2", "train.seed=2", "run.name=ce-2", "data.threads=2"),
        taught(four[2], "long-2", "ce-long", "train.seed=2", "train.epochs=99"),
        taught(four[2], "lost-2", "gone"),
        four[1],
    ]
    compared = Comparison.of(runs)
    assert [(m.label, [run.name for run in m.runs]) for m in compared.methods] == [
        ("bdkd, teacher_checkpoint ce-1", ["kd-1", "kd-2"]),
        ("bdkd, teacher_checkpoint ce-long", ["long-2"]),
        ("bdkd, teacher_checkpoint gone", ["lost-2"]),
        ("dml", [four[1].name]),
    ]
    again = taught(four[0], "kd-1 by ce-2", "ce-2", "train.seed=2")
    assert Comparison.of([*runs, again]).repeated == [], "teachers of two seeds"
    copied = taught(four[0], "kd-1 by a copy", "copy", "train.seed=1")
    assert Comparison.of([*runs, copied]).repeated == [("kd-1", "kd-1 by a copy")]


def test_a_single_method_is_called_by_its_run(four: list[Run]) -> None:
    (method,) = Comparison.of([four[0], four[2]]).methods
    assert (method.key, method.label) == ("A", "bdkd-1")


def test_more_methods_than_letters_have_two(tmp_path: Path, four: list[Run]) -> None:
    runs = [replace(four[0], recipe=four[0].recipe | {"optimizer.lr": 1.0 + n}) for n in range(28)]
    assert [m.key for m in Comparison.of(runs).methods][24:] == ["Y", "Z", "AA", "AB"]


def test_runs_of_other_data_are_refused(four: list[Run]) -> None:
    one = four[0]
    other = replace(one, name="runs/x", recipe=one.recipe | {"data.dataset": "cifar10"})
    with pytest.raises(UserError, match=r"runs/x and runs/bdkd-1 are of different data: data.dataset is cifar10 there"):
        Comparison.of([one, other])
    more = replace(one, recipe=one.recipe | {"data.num_classes": 12})
    with pytest.raises(UserError, match=r"data\.num_classes is 12 there, 10 here"):
        Comparison.of([one, more])
    renamed = replace(one, class_names=["cat", *NAMES[1:]])
    with pytest.raises(UserError, match="class 0 is 'cat' there, 'class 0' here"):
        Comparison.of([one, renamed])


def test_runs_of_one_seed_are_said_to_be(four: list[Run]) -> None:
    again = replace(four[0], name="runs/again")
    assert Comparison.of([four[0], four[2], again]).repeated == [("runs/bdkd-1", "runs/again")]
    assert Comparison.of(four).repeated == []


# --- figures


@pytest.mark.parametrize(
    ("values", "metric", "text"),
    [
        ([0.9, 0.8], "top1", "85.00 ± 7.07"),  # |0.9 - 0.8|/√2
        ([0.9], "ece", "90.00"),
        ([1.0, 2.0, 6.0], "nll", "3.0000 ± 2.6458"),  # √((4 + 1 + 9)/2)
        ([0.5, np.nan], "top1", "–"),
    ],
)
def test_spread_is_mean_and_sample_deviation(values: list[float], metric: str, text: str) -> None:
    assert spread(np.array(values), metric) == text


def test_a_pool_by_hand() -> None:
    # Bins of 1/15: 0.2 = 3/15 belongs to the third, (2/15, 3/15]; 0.95 and 1.0 to the last.
    diagnosis = pooled(np.array([0.2, 0.95, 1.0, 0.5]), np.array([0.0, 1.0, 0.0, 1.0]))
    bins = diagnosis.reliability
    assert [n for n, count in enumerate(bins.count) if count] == [2, 7, 14]
    assert bins.count[14] == 2
    assert (bins.accuracy[14], bins.confidence[14]) == (0.5, 0.975)
    # |0.2 - 0|·1/4 + |0.5 - 1|·1/4 + |0.975 - 0.5|·2/4
    assert diagnosis.metrics["ece"] == pytest.approx(0.4125, abs=1e-15)
    assert diagnosis.metrics["top1"] == 0.5


def test_bins_from_the_files_are_those_of_the_logits(four: list[Run]) -> None:
    for run in four:
        z, label = logits(1000 * run.seed + 1, 2.0 if "bdkd" in run.name else 1.6)
        state = CalibrationState(CLASSES)
        state.update(z, label)
        said = run.said["student"]
        diagnosis = pooled(said.confidence, said.correct)
        assert diagnosis.metrics["ece"] == pytest.approx(run.results["student"]["raw"]["ece"], abs=1e-12)
        assert diagnosis.metrics["top1"] == run.results["student"]["raw"]["top1"]
        assert diagnosis.reliability.count == state.reliability().count
        for field in ("accuracy", "confidence"):
            ours, theirs = (getattr(r, field) for r in (diagnosis.reliability, state.reliability()))
            assert ours == pytest.approx(theirs, abs=1e-12, nan_ok=True)


def test_seeds_are_pooled_sample_by_sample(four: list[Run]) -> None:
    method = Comparison.of(four).methods[1]
    both = [logits(1000 * seed + 1, 1.6) for seed in (1, 2)]
    state = CalibrationState(CLASSES)
    state.update(torch.cat([z for z, _ in both]), torch.cat([label for _, label in both]))
    assert method.reliability("student").metrics["ece"] == pytest.approx(state.compute()["ece"], abs=1e-12)
    assert sum(method.reliability("student").reliability.count) == 2 * COUNT


def test_classes_by_hand(four: list[Run]) -> None:
    label = np.array([0, 0, 2, 2, 2])
    one = Said(np.array([0.9, 0.7, 0.5, 0.6, 0.7]), np.array([1.0, 0, 1, 1, 1]), np.zeros(5))
    two = Said(np.array([0.7, 0.7, 0.8, 0.8, 0.8]), np.array([1.0, 1, 0, 0, 1]), np.zeros(5))
    (method,) = Comparison.of([four[0], four[2]]).methods
    runs = [replace(run, label=label, said={"student": s}) for run, s in zip(method.runs, (one, two), strict=True)]
    accuracy, confidence = replace(method, runs=tuple(runs)).by_class("student")
    assert accuracy[[0, 2]] == pytest.approx([(1 / 2 + 1) / 2, (1 + 1 / 3) / 2])
    assert confidence[[0, 2]] == pytest.approx([(0.8 + 0.7) / 2, (0.6 + 0.8) / 2])
    assert np.isnan(accuracy[1])


# --- the bootstrap


def test_only_methods_tested_on_the_same_images_have_differences(four: list[Run]) -> None:
    moved = replace(four[1], index=four[1].index + 1, recipe=four[1].recipe | {"optimizer.lr": 0.7})
    comparison = Comparison.of([*four, moved])
    assert [m.key for m in comparison.methods if comparison.same_images(m)] == ["A", "B"]
    assert set(comparison.differences) == {("B", "student")}
    assert "No differences of C: its runs and those of A were tested on other images." in page(comparison).html()


# --- what is written


def test_files_hold_each_run_and_each_method(four: list[Run], tmp_path: Path) -> None:
    comparison = Comparison.of(four)
    assert not is_comparison(tmp_path)
    assert write_comparison(comparison, tmp_path) == tmp_path / "report.html"
    assert is_comparison(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy_ece.png",
        "methods.parquet",
        "reliability.png",
        "report.html",
        "runs.parquet",
    ]
    runs = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    assert len(runs) == 8
    of_file = json.loads(json.dumps({run.name: run.results for run in four}))
    for row in runs:
        results = of_file[row["run"]][row["network"]]
        for kind in ("raw", "temperature_scaled"):
            assert {key.removeprefix(f"{kind}_"): row[key] for key in row if key.startswith(f"{kind}_")} == results[
                kind
            ]
    methods = pq.read_table(tmp_path / "methods.parquet").to_pylist()
    assert [(row["method"], row["network"], row["seeds"]) for row in methods] == [
        ("A", "student", [1, 2]),
        ("A", "teacher", [1, 2]),
        ("B", "student", [1, 2]),
        ("B", "teacher", [1, 2]),
    ]
    nll = [run.results["student"]["raw"]["nll"] for run in four if "dml" in run.name]
    assert methods[2]["raw_nll_mean"] == pytest.approx(sum(nll) / 2, abs=1e-15)
    assert methods[2]["raw_nll_sd"] == pytest.approx(abs(nll[0] - nll[1]) / np.sqrt(2), abs=1e-15)
    expected = written_out(*([r.said["student"] for r in m.runs] for m in comparison.methods), resamples=2000)
    for metric, values in expected.items():
        found = [methods[2][f"difference_{metric}_{end}"] for end in ("value", "low", "high")]
        assert found == pytest.approx(values, abs=1e-12)
    assert methods[0]["difference_nll_low"] is None
    assert methods[3]["difference_nll_low"] is None


def test_a_single_run_has_no_deviation(four: list[Run]) -> None:
    rows = method_rows(Comparison.of(four[:2]))
    assert {row["raw_ece_sd"] for row in rows} == {None}
    assert "±" not in "".join(map(str, rows))


def test_the_same_runs_give_the_same_bytes(four: list[Run], tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_comparison(Comparison.of(four), tmp_path / name)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_the_table_fits_a_terminal(four: list[Run]) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    long = [replace(run, recipe=run.recipe | {"optimizer.lr": 0.123456, "data.augment.pad_px": 3}) for run in four]
    console.print(methods_table(Comparison.of([*four, *long])))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for word in ("A  bdkd", "B  dml", "C  bdkd", "student", "teacher"):
        assert word in text
    top1 = np.array([run.results["student"]["raw"]["top1"] for run in four if "bdkd" in run.name])
    assert f"{100 * top1.mean():.2f} ± {100 * top1.std(ddof=1):.2f}" in text


def test_marks_stand_where_the_runs_and_their_means_are(four: list[Run]) -> None:
    axes = accuracy_ece_figure(Comparison.of(four)).axes
    assert [a.get_title(loc="left") for a in axes] == ["student", "teacher"]
    values = {
        name: np.array(
            [[100 * run.results["student"]["raw"][m] for m in ("top1", "ece")] for run in four if name in run.name]
        )
        for name in ("bdkd", "dml")
    }
    marks = [np.asarray(c.get_offsets()) for c in axes[0].collections if len(np.asarray(c.get_offsets()))]
    for expected in values.values():
        assert any(m.shape == expected.shape and np.allclose(m, expected) for m in marks)
        assert any(m.shape == (1, 2) and np.allclose(m, expected.mean(0)) for m in marks)
    assert [text.get_text() for text in axes[0].texts] == ["A", "B"]


def titles(rows: Sequence[Figure]) -> list[list[str]]:
    return [[axes.texts[0].get_text() for axes in row.axes if axes.texts] for row in rows]


def test_diagrams_stand_in_even_rows_of_at_most_three(four: list[Run], tmp_path: Path) -> None:
    runs = [replace(four[0], recipe=four[0].recipe | {"optimizer.lr": 1.0 + n}) for n in range(7)]
    rows = reliability_rows(Comparison.of(runs[:5]))
    assert titles(rows) == [["A  lr 1", "B  lr 2", "C  lr 3"], ["D  lr 4", "E  lr 5"]]
    assert [list(map(len, titles(reliability_rows(Comparison.of(runs[:n]))))) for n in (3, 4, 7)] == [
        [3],
        [2, 2],
        [3, 2, 2],
    ]
    save_stacked_png(rows, tmp_path / "r.png")
    image = Image.open(tmp_path / "r.png")
    assert image.size == (3 * 528, 2 * 752)
    corner = np.asarray(image)[752:, 2 * 528 :]
    assert corner.min() == 255


def test_of_a_single_method_the_teacher_is_drawn_too(four: list[Run]) -> None:
    assert titles(reliability_rows(Comparison.of(four[:1]))) == [["A  student, bdkd-1", "A  teacher, bdkd-1"]]


def test_several_students_have_a_panel_a_diagram_and_a_table_each(tmp_path: Path) -> None:
    several = "models.students=[resnet8,resnet14]"
    comparison = Comparison.of(
        [left(tmp_path / "a", several), left(tmp_path / "b", several, "objective.name=dml", skill=1.5)]
    )
    assert comparison.students == ["student_1", "student_2"]
    assert len(accuracy_ece_figure(comparison).axes) == 3
    assert titles(reliability_rows(comparison)) == [
        ["A  student_1, objective b…", "B  student_1, objective d…"],
        ["A  student_2, objective b…", "B  student_2, objective d…"],
    ]
    assert set(comparison.differences) == {("B", "student_1"), ("B", "student_2")}
    html = page(comparison).html()
    assert "By class, student_1" in html
    assert "By class, student_2" in html


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", b"{"),
        ("results.json", b"{}"),
        ("results.json", b'{"epochs": 1, "test": {"student": {"temperature": 1, "raw": {"top1": 1}}}}'),
        ("predictions/test.parquet", b"PAR1 and no more"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    left(tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(content)
    recipe = config.load("digits")
    paths = (tmp_path / "run" / name for name in ("results.json", "predictions/test.parquet"))
    with pytest.raises(UserError, match=f"mine/{file} cannot be read .*bdkd evaluate") as caught:
        Run.read("mine", recipe, *paths)
    assert "\n" not in str(caught.value)


def test_predictions_that_lack_a_network_are_refused(tmp_path: Path) -> None:
    left(tmp_path / "run")
    path = tmp_path / "run/predictions/test.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([c for c in table.column_names if c.startswith("student")]), path)
    with pytest.raises(UserError, match=r"test\.parquet cannot be read .*student"):
        Run.read("mine", config.load("digits"), tmp_path / "run/results.json", path)
