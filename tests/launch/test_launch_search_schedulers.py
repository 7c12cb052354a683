"""Schedulers of a search that goes on know what was reported before it was cut off."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from bdkd_dist.launch.tune.algorithms import Plan, asked_for, scheduler_of
from bdkd_dist.launch.tune.space import Space
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.trials import Report, Status, Trial

EPOCHS = 9


def plan(scheduler: str, search: str = "random", epochs: int = EPOCHS) -> Plan:
    from ray import tune

    space = Space("space", {"objective.nu_forward": tune.loguniform(0.5, 8)}, {}, "")
    return Plan(space, Goal.parse("nll"), "nll", search, scheduler, num_trials=10, seed=0, epochs=epochs)


def past(number: int, nll: list[float], status: Status = "finished") -> Trial:
    reports = [Report(epoch, {"student/nll": value}) for epoch, value in enumerate(nll, 1)]
    return Trial(number, f"{number:04d}", {"objective.nu_forward": 1.0 + number}, status, reports=reports)


def decision(scheduler: TrialScheduler, epoch: int, nll: float) -> str:
    trial: Any = _New("new")
    scheduler.on_trial_add(trial, trial)
    return scheduler.on_trial_result(trial, trial, {"epoch": epoch, "goal": nll, "training_iteration": epoch})


class _New:
    status = "RUNNING"

    def __init__(self, trial_id: str):
        self.trial_id = trial_id

    def get_live_trials(self) -> list[Any]:
        return [SimpleNamespace(status="PENDING")]


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_a_new_trial_is_judged_by_those_of_before(scheduler: str) -> None:
    trials = [past(number, [2.0 - 0.1 * number - 0.1 * epoch for epoch in range(EPOCHS)]) for number in range(6)]
    trials += [past(6, [9.0] * 3, "stopped"), past(7, [], "failed")]
    known = scheduler_of(plan(scheduler), trials)
    # At the last rung before the end, which all brackets have; each scheduler alone would let it go on.
    assert decision(scheduler_of(plan(scheduler), []), 3, 8.0) == TrialScheduler.CONTINUE
    worst, best = decision(known, 3, 8.0), decision(scheduler_of(plan(scheduler), trials), 3, 0.1)
    assert best == TrialScheduler.CONTINUE
    if scheduler != "hyperband":  # there the trial's bracket may have no rung yet
        assert worst == TrialScheduler.STOP


@pytest.mark.parametrize(("epochs", "rungs"), [(9, [1, 3]), (18, [2, 6]), (20, [3, 9]), (30, [4, 12])])
def test_asha_compares_at_about_a_ninth_and_a_third_and_never_just_before_the_end(
    epochs: int, rungs: list[int]
) -> None:
    def falls_behind_at(bad: int) -> str:
        scheduler = scheduler_of(plan("asha", epochs=epochs), [past(number, [1.0] * epochs) for number in range(3)])
        trial: Any = _New("new")
        scheduler.on_trial_add(trial, trial)
        for epoch in range(1, bad):
            assert scheduler.on_trial_result(trial, trial, {"epoch": epoch, "goal": 0.1}) == TrialScheduler.CONTINUE
        return scheduler.on_trial_result(trial, trial, {"epoch": bad, "goal": 9.0})

    assert [bad for bad in range(1, epochs) if falls_behind_at(bad) == TrialScheduler.STOP] == rungs


@pytest.mark.parametrize(
    ("epochs", "first_rungs"),
    [(2, {1}), (8, {1, 3}), (9, {1, 3, None}), (18, {2, 6, None}), (20, {3, 9, None})],
)
def test_hyperband_compares_some_trials_later_and_some_never(epochs: int, first_rungs: set[int | None]) -> None:
    known = [past(number, [1.0] * epochs) for number in range(30)]
    scheduler = scheduler_of(plan("hyperband", epochs=epochs), known)

    def stopped_at(number: int) -> int | None:
        trial: Any = _New(f"new {number}")
        scheduler.on_trial_add(trial, trial)
        results = ({"epoch": epoch, "goal": 9.0 + number} for epoch in range(1, epochs))
        decisions = (scheduler.on_trial_result(trial, trial, result) for result in results)
        return next((epoch for epoch, said in enumerate(decisions, 1) if said == TrialScheduler.STOP), None)

    assert {stopped_at(number) for number in range(40)} == first_rungs


def test_a_failed_trial_does_not_move_the_median() -> None:
    scheduler = scheduler_of(plan("median"), [past(number, [2.0] * EPOCHS) for number in range(3)])
    failed: Any = _New("failed")
    scheduler.on_trial_add(failed, failed)
    scheduler.on_trial_result(failed, failed, {"epoch": 1, "goal": 2.0})
    scheduler.on_trial_complete(failed, failed, {"failed": "diverged", "done": True})
    assert decision(scheduler, 3, 2.5) == TrialScheduler.STOP


def test_tpe_goes_on_with_the_trials_that_ran_and_then_with_new_numbers() -> None:
    trials = [past(0, [2.0] * EPOCHS), past(1, [1.9], "running"), past(2, [], "failed"), past(3, [2.5] * 2, "stopped")]
    searcher, _, left = asked_for(plan("asha", "tpe"), trials)
    assert left == 10 - 3
    first, second = searcher.suggest("a")["trial"], searcher.suggest("b")["trial"]
    assert first == {
        "number": 1,
        "name": "0001",
        "values": {"objective.nu_forward": 2.0},
        "unused": {},
        "taken": None,
        "resumed": True,
    }
    assert second["number"] == 4
    assert "resumed" not in second


def test_what_was_suggested_in_vain_is_told_again_as_it_was() -> None:
    from ray import tune

    domains = {"objective.name": tune.choice(["bdkd", "dml"]), "objective.nu_forward": tune.uniform(0.5, 8)}
    mixed = Plan(Space("space", domains, {}, ""), Goal.parse("nll"), "nll", "tpe", "none", 10, seed=0, epochs=EPOCHS)
    searcher, _, _ = asked_for(mixed, [])
    suggested = [searcher.suggest(str(number))["trial"] for number in range(8)]
    without = next(trial for trial in suggested if trial["values"] == {"objective.name": "dml"})
    assert 0.5 <= without["unused"]["objective.nu_forward"] <= 8
    ended = Trial(0, "0000", without["values"], "finished", unused=without["unused"])
    ended.reports.append(Report(EPOCHS, {"student/nll": 1.0}))
    again, _, _ = asked_for(mixed, [ended])
    (told,) = again._inner._ot_study.trials
    assert told.params == {"objective.name": "dml"} | without["unused"]
    assert told.value == 1.0


def test_a_listed_search_goes_on_with_changed_values_and_what_was_taken_over() -> None:
    running = past(2, [1.0, 0.9], "running")
    running.take_over(past(5, [3.0, 2.0, 1.0]), epoch=2)
    _, space, _ = asked_for(plan("pbt"), [past(0, [1.0] * EPOCHS), running])
    left = space["trial"]["grid_search"]
    assert [trial["number"] for trial in left] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert left[1]["values"] == {"objective.nu_forward": 3.0}
    assert left[1]["taken"] == {"number": 5, "epoch": 2}
    assert [report.metrics["student/nll"] for report in running.reports] == [3.0, 2.0]
