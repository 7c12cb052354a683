import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from search_samples import lost, numbers, report, trial

from bdkd_dist import config
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.search_tables import (
    best_yaml,
    chosen,
    figures,
    heads,
    of_test,
    ranked,
    value_spans,
    write_trials,
)
from bdkd_dist.records.trials import Report, Trial

NAN = math.nan
NLL, PARETO = Goal.parse("nll"), Goal.parse("pareto")


def test_finished_trials_rank_before_those_that_have_seen_less_and_failed_ones_last() -> None:
    trials = [
        lost(0),
        trial(1, nll=0.1, status="failed"),
        trial(2, nll=0.2, status="stopped"),
        trial(3, nll=0.3, status="running"),
        trial(4, nll=0.9),
        Trial(5, "0005", {}),
        trial(6, nll=0.8),
        trial(7, nll=0.8),
        trial(8, nll=NAN),
    ]
    assert numbers(ranked(trials, NLL)) == [6, 7, 4, 8, 2, 3, 0, 1, 5]


@pytest.mark.parametrize(
    ("goal", "subject_to", "best"),
    [
        ("nll", (), [1]),
        ("accuracy", (), [2]),
        ("ece", (), [0]),
        ("accuracy", ("student/ece<=0.02",), [1]),
        ("accuracy", ("student/ece<=0.001",), []),
        ("pareto", (), [1, 0, 2]),  # by their NLL
        ("pareto", ("student/top1>=0.65",), [1, 2]),
    ],
)
def test_the_chosen_are_the_best_finished_that_meet_the_constraints(
    goal: str, subject_to: tuple[str, ...], best: list[int]
) -> None:
    trials = [
        trial(0, top1=0.60, ece=0.01, nll=1.2),
        trial(1, top1=0.70, ece=0.02, nll=1.0),
        trial(2, top1=0.72, ece=0.06, nll=1.3),
        trial(3, top1=0.69, ece=0.03, nll=1.1),  # 1 beats it in both
        trial(4, top1=0.99, ece=0.00, nll=0.1, status="stopped"),
        trial(5, top1=0.99, ece=0.00, nll=0.1, status="failed"),
    ]
    assert numbers(chosen(trials, Goal.parse(goal, subject_to))) == best


def test_a_trial_without_the_goals_figure_is_never_chosen() -> None:
    assert chosen([trial(0, nll=NAN), trial(1, nll=math.inf)], NLL) == []
    assert numbers(chosen([trial(0, ece=NAN), trial(1)], PARETO)) == [1]


def test_parquet_holds_every_trial_with_values_in_types_of_their_own(tmp_path: Path) -> None:
    first = Trial(
        1,
        "0001-a",
        {
            "objective.nu_forward": 2.5,
            "train.batch_size": 64,
            "objective.gate": "hard",
            "optimizer.nesterov": True,
            "schedule.milestones": [9, 12],
            "train.ema_decay": None,
        },
        "stopped",
        reports=[report(1, 0.5, NAN, 2.0, 3.0), report(3, 0.6, 0.04, 1.5, 4.0, **{"train.batch_size": 64})],
        device_s=14.0,
    )
    other = Trial(0, "0000-b", {"objective.nu_forward": 2, "train.ema_decay": 0.9}, "failed", "out of memory")
    write_trials(tmp_path / "trials.parquet", [first, other], {1: {"student/top1": 0.55}})
    assert [path.name for path in tmp_path.iterdir()] == ["trials.parquet"]
    table = pq.read_table(tmp_path / "trials.parquet")
    kinds = {name: table.schema.field(name).type for name in table.column_names}
    assert kinds["objective.nu_forward"] == pa.float64()
    assert kinds["train.batch_size"] == pa.int64()
    assert kinds["objective.gate"] == pa.string()
    assert kinds["optimizer.nesterov"] == pa.bool_()
    assert kinds["schedule.milestones"] == pa.list_(pa.int64())
    assert kinds["train.ema_decay"] == pa.float64()
    assert kinds["test/student/top1"] == pa.float64()
    failed, stopped = table.to_pylist(maps_as_pydicts="strict")
    assert (failed["number"], failed["name"], failed["status"]) == (0, "0000-b", "failed")
    assert (failed["reason"], failed["epochs"], failed["wall_s"], failed["device_s"]) == ("out of memory", 0, 0, 0)
    assert (failed["objective.nu_forward"], failed["train.batch_size"], failed["student/nll"]) == (2.0, None, None)
    assert (failed["reports"], failed["test/student/top1"]) == ([], None)
    assert (stopped["epochs"], stopped["wall_s"], stopped["device_s"]) == (3, 7.0, 14.0)
    assert (stopped["student/ece"], stopped["schedule.milestones"]) == (0.04, [9, 12])
    assert stopped["test/student/top1"] == 0.55
    one, two = stopped["reports"]
    assert (one["epoch"], one["wall_s"], json.loads(one["values"])) == (1, 3.0, {})
    assert math.isnan(one["metrics"]["student/ece"])
    assert two["metrics"] == pytest.approx(
        {"student/top1": 0.6, "student/ece": 0.04, "student/nll": 1.5, "teacher/top1": 0.62}
    )
    assert json.loads(two["values"]) == {"train.batch_size": 64}


@pytest.mark.parametrize("cells", [[1, "a"], [True, 2.5], [[9], 3], ["x", [1]]])
def test_values_of_several_kinds_are_json(cells: list[Any], tmp_path: Path) -> None:
    write_trials(tmp_path / "t.parquet", [Trial(n, str(n), {"a.b": cell}) for n, cell in enumerate(cells)], {})
    assert [json.loads(cell) for cell in pq.read_table(tmp_path / "t.parquet")["a.b"].to_pylist()] == cells


def test_pandas_reads_a_search_of_no_reports(tmp_path: Path) -> None:
    import pandas as pd

    write_trials(tmp_path / "t.parquet", [lost(0), lost(1)], {})
    assert pd.read_parquet(tmp_path / "t.parquet")["reason"].tolist() == ["out of memory"] * 2


def test_the_best_recipe_is_read_back_with_the_trials_values(tmp_path: Path) -> None:
    recipe = config.load("digits", ["run.name=weighting", "launch.workers=2"])
    best = trial(3, nu_forward=1 / 3, gate="soft")
    best.values["schedule.milestones"] = [9, 12]
    text = best_yaml(recipe, best, NLL)
    (tmp_path / "best.yaml").write_text(text)
    read = config.load(str(tmp_path / "best.yaml"))
    assert (read.run.name, read.objective.nu_forward, read.objective.gate) == ("weighting-best", 1 / 3, "soft")
    differing = {key for key, _, _ in config.differences(recipe, read)}
    assert differing == {"objective.nu_forward", "objective.gate", "schedule.milestones"}
    assert text.splitlines()[:2] == [
        "# The best of the search weighting by student/nll (less is better): trial 3, 0003-sample",
        "# Validation after 4 epochs: student top-1 70.00 % ECE 3.00 % NLL 1.0000",
    ]
    assert text.splitlines()[2][:1] != "#"


def test_another_objective_in_the_best_recipe_leaves_the_formers_parameters_behind() -> None:
    best = Trial(0, "0000-jsd", {"objective.name": "jsd", "train.seed": 2}, "finished", "", [report(1, 0.5, 0.1, 2.0)])
    tree = yaml.safe_load(best_yaml(config.load("digits", ["objective.nu_forward=3"]), best, NLL))
    assert tree["objective"]["name"] == "jsd"
    assert "nu_forward" not in tree["objective"]
    assert config.from_dict(tree).train.seed == 2


def test_a_schedule_stands_above_the_best_recipe() -> None:
    key = "objective.nu_forward"
    best = trial(2, nu_forward=4.0)
    best.reports = [report(epoch, 0.5, 0.1, 2.0, **{key: nu}) for epoch, nu in ((2, 1.5), (4, 1.5), (6, 3.0), (8, 4.0))]
    assert value_spans(best) == [(1, 4, {key: 1.5}), (5, 6, {key: 3.0}), (7, 8, {key: 4.0})]
    lines = best_yaml(config.load("digits"), best, NLL).splitlines()
    assert lines[2:7] == [
        "# Its values changed while it trained:",
        "#   epochs 1 to 4: objective.nu_forward=1.5",
        "#   epochs 5 to 6: objective.nu_forward=3",
        "#   epochs 7 to 8: objective.nu_forward=4",
        "# A recipe holds the last values only: training by it from the start is not what the trial did.",
    ]
    assert yaml.safe_load("\n".join(lines))["objective"]["nu_forward"] == 4.0


def test_values_that_stayed_are_no_schedule() -> None:
    steady = trial(0)
    steady.reports = [Report(epoch, {}, {"objective.nu_forward": 2.0}) for epoch in (1, 2, 3)]
    assert value_spans(steady) == []


def test_all_that_a_goal_looks_at_is_shown() -> None:
    goal = Goal.parse("student/brier", ["teacher/top1>=0.7"])
    assert list(heads(goal)) == ["student/top1", "student/ece", "student/nll", "student/brier", "teacher/top1"]
    assert heads(goal)["teacher/top1"] == "teacher top-1 %"
    assert (
        figures(trial(0).metrics, goal) == "student top-1 70.00 % ECE 3.00 % NLL 1.0000 Brier – teacher top-1 72.00 %"
    )


def test_results_become_flat_figures_of_the_test_split() -> None:
    raw, scaled = {"top1": 0.7, "ece": 0.05, "count": 100}, {"top1": 0.7, "ece": 0.01, "count": 100}
    measured = {"raw": raw, "temperature_scaled": scaled, "temperature": 1.5, "vector_scaled": None, "intervals": {}}
    assert of_test({"validation": {}, "test": {"student": measured}, "epochs": 4}) == {
        "student/top1": 0.7,
        "student/ece": 0.05,
        "student/temperature": 1.5,
        "student/temperature_scaled/top1": 0.7,
        "student/temperature_scaled/ece": 0.01,
    }
