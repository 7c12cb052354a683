"""Runs of other images: what is refused, and what is told apart."""

import json
from pathlib import Path

import pytest
from test_records_comparison import left

from bdkd_dist import config
from bdkd_dist.config import flatten
from bdkd_dist.errors import UserError
from bdkd_dist.records.comparison import Comparison, Run, described
from bdkd_dist.records.results import read_results, write_results

ONE, OTHER, TEST, OTHER_TEST = "1" * 64, "2" * 64, "a" * 64, "b" * 64


def trained_on(folder: Path, fingerprint: str | None, *overrides: str, test: str = TEST) -> Run:
    """A run that trained on such images; None for one of an earlier version."""
    before = left(folder, *overrides)
    results = read_results(folder / "results.json")
    if fingerprint is not None:
        results["data"] = {"fingerprint": fingerprint, "test_fingerprint": test}
    write_results(folder / "results.json", results)
    recipe = config.load("digits", [f"run.name={folder.name}", *overrides])
    run = Run.read(before.name, recipe, folder / "results.json", folder / "predictions/test.parquet")
    assert (run.test_fingerprint is None) == (fingerprint is None)
    return run


def methods(*runs: Run) -> list[tuple[str, list[int]]]:
    return [(method.label, [run.seed for run in method.runs]) for method in Comparison.of(runs).methods]


def test_runs_that_trained_on_other_images_are_not_seeds_of_one_method(tmp_path: Path) -> None:
    runs = [
        trained_on(tmp_path / "a", ONE, "train.seed=1", "data.root=/v1"),
        trained_on(tmp_path / "b", ONE, "train.seed=2", "data.root=/a/copy/of/v1"),
        trained_on(tmp_path / "c", OTHER, "train.seed=3", "data.root=/v2"),
    ]
    assert methods(*runs) == [("fingerprint 111111111111", [1, 2]), ("fingerprint 222222222222", [3])]
    dml = trained_on(tmp_path / "d", OTHER, "train.seed=1", "objective.name=dml")
    assert methods(*runs[:2], dml) == [
        ("bdkd, fingerprint 111111111111", [1, 2]),
        ("dml, fingerprint 222222222222", [1]),
    ]
    assert set(Comparison.of([*runs[:2], dml]).differences) == {("B", "student")}, "the test images are the same"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_run_of_an_earlier_version_is_told_by_its_recipe(tmp_path: Path, order: tuple[int, ...]) -> None:
    made = [
        trained_on(tmp_path / "a", ONE, "train.seed=1"),
        trained_on(tmp_path / "b", None, "train.seed=2"),
        trained_on(tmp_path / "c", ONE, "train.seed=3"),
    ]
    ((_, seeds),) = methods(*(made[n] for n in order))
    assert seeds == [made[n].seed for n in order]
    dml = trained_on(tmp_path / "d", None, "train.seed=2", "objective.name=dml")
    assert [label for label, _ in methods(*(made[n] for n in order), dml)] == ["objective bdkd", "objective dml"]


def test_runs_that_were_tested_on_other_files_are_said(tmp_path: Path) -> None:
    old, one, other = (
        trained_on(tmp_path / "old", None, "objective.name=dml"),
        trained_on(tmp_path / "one", ONE),
        trained_on(tmp_path / "other", OTHER, "train.seed=2", test=OTHER_TEST),
    )
    assert Comparison.of([old, one, other]).other_files == [
        "runs/other was tested on other files than runs/one: on other images, or on the same ones stored in another way"
    ]
    assert Comparison.of([old, other]).other_files == []


def test_the_same_images_stored_otherwise_are_compared_and_called_by_that(tmp_path: Path) -> None:
    one = trained_on(tmp_path / "one", ONE)
    finer = trained_on(tmp_path / "finer", OTHER, "data.max_side_px=1024", test=OTHER_TEST)
    assert [label for label, _ in methods(one, finer)] == ["max_side_px 512", "max_side_px 1024"]


@pytest.mark.parametrize(("fingerprint", "count"), [(ONE, 1), (OTHER, 2), (None, 1)])
def test_a_teacher_that_trained_on_other_images_is_another(tmp_path: Path, fingerprint: str | None, count: int) -> None:
    runs = []
    for seed, data in ((1, ONE), (2, fingerprint)):
        by = [f"models.teacher_checkpoint=ce-{seed}", "objective.name=kd", f"train.seed={seed}"]
        taught = trained_on(tmp_path / f"kd-{seed}", ONE, *by)
        recipe = config.load("digits", ["objective.name=ce", f"train.seed={seed}"])
        known = described(recipe, {} if data is None else {"data": {"fingerprint": data}})
        assert known.items() >= flatten(recipe.to_dict()).items()
        place = tmp_path / f"kd-{seed}"
        recipe = config.load("digits", [f"run.name={place.name}", *by])
        runs.append(Run.read(taught.name, recipe, place / "results.json", place / "predictions/test.parquet", known))
    assert len(Comparison.of(runs).methods) == count


def test_results_whose_data_are_no_section_are_named(tmp_path: Path) -> None:
    trained_on(tmp_path / "run", ONE)
    results = json.loads((tmp_path / "run/results.json").read_text())
    (tmp_path / "run/results.json").write_text(json.dumps(results | {"data": "digits"}))
    paths = (tmp_path / "run" / name for name in ("results.json", "predictions/test.parquet"))
    with pytest.raises(UserError, match=r"mine/results.json cannot be read .*bdkd evaluate"):
        Run.read("mine", config.load("digits"), *paths)
