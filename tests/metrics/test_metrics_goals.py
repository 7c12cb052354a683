"""Goals: what they may be called, the order they put trials in (against Deb's rules and dominance by brute force)."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdkd_dist.errors import UserError
from bdkd_dist.metrics import CalibrationState
from bdkd_dist.metrics.goals import BETTER, Constraint, Goal

NAN = math.nan


@pytest.mark.parametrize(
    ("text", "names", "modes"),
    [
        ("nll", ("student/nll",), ("min",)),
        ("accuracy", ("student/top1",), ("max",)),
        ("ece", ("student/ece",), ("min",)),
        ("pareto", ("student/top1", "student/ece"), ("max", "min")),
        ("teacher/brier", ("teacher/brier",), ("min",)),
        ("student_ema/auroc", ("student_ema/auroc",), ("max",)),
        ("student_2/classwise_ece", ("student_2/classwise_ece",), ("min",)),
        ("student_1_ema/top5", ("student_1_ema/top5",), ("max",)),
    ],
)
def test_goals_are_named_metrics_with_their_better_end(
    text: str, names: tuple[str, ...], modes: tuple[str, ...]
) -> None:
    goal = Goal.parse(text)
    assert (goal.names, goal.modes, goal.constraints) == (names, modes, ())
    assert goal.is_pareto == (text == "pareto")


def test_every_figure_of_the_metrics_has_an_entry() -> None:
    assert set(BETTER) == set(CalibrationState(3).compute())


def test_the_better_end_is_where_a_better_network_lies() -> None:
    """A network that is mostly right, and unsure where it is wrong, against one that is mostly wrong and sure of it."""

    def figures(rights: int, sure_right: float, sure_wrong: float, runner_up: bool) -> dict[str, float]:
        state, num_classes, num_samples = CalibrationState(10), 10, 200
        targets = torch.arange(num_samples) % num_classes
        predicted = torch.where(torch.arange(num_samples) < rights, targets, (targets + 1) % num_classes)
        confidence = torch.where(torch.arange(num_samples) < rights, sure_right, sure_wrong).double()
        rest = torch.full((num_samples, num_classes), 1.0, dtype=torch.float64)
        rest.scatter_(1, targets[:, None], 2.0 if runner_up else 0.01)
        rest.scatter_(1, predicted[:, None], 0.0)
        probabilities = rest / rest.sum(1, keepdim=True) * (1 - confidence[:, None])
        probabilities.scatter_(1, predicted[:, None], confidence[:, None])
        state.update(probabilities.log(), targets)
        return state.compute()

    good, bad = figures(180, 0.95, 0.4, runner_up=True), figures(60, 0.5, 0.99, runner_up=False)
    for metric, mode in BETTER.items():
        if mode is not None:
            assert (good[metric] > bad[metric]) == (mode == "max"), metric
            assert good[metric] != bad[metric], metric


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("student/ece<=0.02", Constraint("student/ece", "<=", 0.02)),
        ("student/top1 >= 0.7", Constraint("student/top1", ">=", 0.7)),
        ("ece<=0.02", Constraint("student/ece", "<=", 0.02)),
        (" accuracy  >=7e-1 ", Constraint("student/top1", ">=", 0.7)),
        ("student/gap>=-0.01", Constraint("student/gap", ">=", -0.01)),
        ("teacher/nll<=1", Constraint("teacher/nll", "<=", 1.0)),
    ],
)
def test_constraints_are_a_metric_a_relation_and_a_bound(text: str, expected: Constraint) -> None:
    assert Goal.parse("accuracy", [text]).constraints == (expected,)
    assert Goal.parse("accuracy", [str(expected)]).constraints == (expected,)


@pytest.mark.parametrize(
    ("goal", "subject_to", "networks", "words"),
    [
        ("nlll", [], None, ["unknown goal 'nlll'", "did you mean 'nll'", "accuracy", "pareto", "student/brier"]),
        ("brier", [], None, ["unknown goal 'brier'", "did you mean 'student/brier'"]),
        ("", [], None, ["unknown goal ''", "nll"]),
        ("student/nl", [], None, ["goal 'student/nl'", "'nl'", "did you mean 'nll'", "brier"]),
        ("studnt/nll", [], None, ["goal 'studnt/nll'", "did you mean 'student'"]),
        ("student/gap", [], None, ["student/gap", "neither more nor less", "ece"]),
        ("student/count", [], None, ["student/count", "neither more nor less"]),
        ("a/b/c", [], None, ["a/b/c", "network"]),
        ("nll", [], ["teacher", "student_1", "student_2"], ["goal 'nll'", "'student'", "did you mean 'student_"]),
        ("student_ema/nll", [], ["teacher", "student"], ["student_ema", "did you mean 'student'", "teacher"]),
        ("nll", ["student/ece<0.02"], None, ["write <=", "'student/ece<=0.02'"]),
        ("nll", ["top1>0.7"], None, ["write >=", "'top1>=0.7'"]),
        ("nll", ["ece=0.02"], None, ["write <= or >=", "'student/ece<=0.02'"]),
        ("nll", ["ece=<0.02"], None, ["write <=", "'student/ece<=0.02'"]),
        ("nll", ["ece"], None, ["'ece' is not metric<=bound", "'student/ece<=0.02'"]),
        ("nll", ["<=0.02"], None, ["is not metric<=bound"]),
        ("nll", ["ece<="], None, ["is not metric<=bound"]),
        ("nll", ["0.01<=ece<=0.02"], None, ["is not metric<=bound"]),
        ("nll", ["ece<=2%"], None, ["'2%' is no number", "'student/ece<=0.02'"]),
        ("nll", ["ece<=nan"], None, ["'nan' is no number"]),
        ("nll", ["student/ec<=0.02"], None, ["constraint 'student/ec<=0.02'", "'ec'", "did you mean 'ece'"]),
        ("nll", ["brier<=0.02"], None, ["constraint 'brier<=0.02'", "did you mean 'student/brier'"]),
        ("nll", ["pareto<=0.02"], None, ["constraint 'pareto<=0.02'", "unknown metric"]),
        ("nll", ["techer/ece<=0.02"], ["teacher", "student"], ["'techer'", "did you mean 'teacher'"]),
    ],
)
def test_a_wrong_goal_or_constraint_is_one_line(
    goal: str, subject_to: list[str], networks: list[str] | None, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        Goal.parse(goal, subject_to, networks)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_scores_without_constraints_are_the_metric_and_smaller_is_better() -> None:
    row = {"student/nll": 0.5, "student/top1": 0.7, "student/ece": 0.03}
    assert Goal.parse("nll").score(row) == 0.5
    assert Goal.parse("accuracy").score(row) == -0.7
    assert Goal.parse("pareto").score(row) == 0.5


@pytest.mark.parametrize("subject_to", [[], ["ece<=0.02"]])
@pytest.mark.parametrize("goal", ["nll", "accuracy", "ece", "pareto"])
def test_a_row_with_nan_or_without_figures_comes_last(goal: str, subject_to: list[str]) -> None:
    parsed = Goal.parse(goal, subject_to)
    names = ("student/nll", "student/top1", "student/ece")
    assert parsed.score(dict.fromkeys(names, NAN)) == math.inf
    assert parsed.score({}) == math.inf
    assert parsed.score(dict.fromkeys(names, 0.9)) < math.inf


def test_nan_meets_no_bound() -> None:
    goal = Goal.parse("accuracy", ["ece<=0.02"])
    row = {"student/top1": 0.9, "student/ece": NAN}
    assert not goal.meets(row)
    assert goal.score(row) == math.inf
    assert goal.front([row]) == []


def test_a_bound_is_met_at_the_bound_itself() -> None:
    goal = Goal.parse("accuracy", ["ece<=0.02", "student/nll>=0.5"])
    assert goal.meets({"student/ece": 0.02, "student/nll": 0.5})
    assert not goal.meets({"student/ece": math.nextafter(0.02, 1), "student/nll": 0.5})
    assert not goal.meets({"student/ece": 0.02, "student/nll": math.nextafter(0.5, 0)})


def test_violations_are_shares_of_their_bounds() -> None:
    assert Constraint("student/ece", "<=", 0.02).violation({"student/ece": 0.03}) == pytest.approx(0.5)
    assert Constraint("student/top1", ">=", 0.8).violation({"student/top1": 0.6}) == pytest.approx(0.25)
    assert Constraint("student/gap", "<=", 0.0).violation({"student/gap": 0.03}) == pytest.approx(0.03)
    assert Constraint("student/gap", ">=", -0.1).violation({"student/gap": -0.2}) == pytest.approx(1)


FIGURE = st.floats(0, 3).map(lambda x: round(x, 2))
ROW = st.fixed_dictionaries(
    {"student/top1": st.floats(0, 1).map(lambda x: round(x, 2)), "student/ece": FIGURE, "student/nll": FIGURE}
)


@pytest.mark.parametrize(("goal", "name", "sign"), [("accuracy", "top1", -1), ("nll", "nll", 1), ("pareto", "nll", 1)])
@settings(max_examples=200, deadline=None)
@given(one=ROW, other=ROW)
def test_scores_follow_debs_three_rules(
    goal: str, name: str, sign: int, one: dict[str, float], other: dict[str, float]
) -> None:
    parsed = Goal.parse(goal, ["ece<=0.5", "accuracy>=0.4"])

    def missed(row: dict[str, float]) -> float:
        return max(0.0, row["student/ece"] - 0.5) / 0.5 + max(0.0, 0.4 - row["student/top1"]) / 0.4

    def better(a: dict[str, float], b: dict[str, float]) -> bool:  # by the paper's words, case by case
        if missed(a) == 0 and missed(b) == 0:
            return sign * a[f"student/{name}"] < sign * b[f"student/{name}"]
        if missed(a) == 0 or missed(b) == 0:
            return missed(a) == 0
        return missed(a) < missed(b) - 1e-12

    assert (parsed.score(one) < parsed.score(other) - 1e-12) == better(one, other)
    assert parsed.meets(one) == (missed(one) == 0)


def test_a_row_that_meets_the_bounds_beats_one_that_does_not_however_bad_its_figures() -> None:
    goal = Goal.parse("nll", ["ece<=0.02"])
    hopeless = {"student/nll": 1e12, "student/ece": 0.0}
    close = {"student/nll": 0.0, "student/ece": 0.02 * (1 + 1e-9)}
    assert goal.score(hopeless) < goal.score(close)


@pytest.mark.parametrize(
    ("rows", "front"),
    [
        # accuracy, ECE: b beats none, c is worse than a in both, d equals a, e has the best accuracy, f lacks a figure.
        ([(0.7, 0.03), (0.6, 0.01), (0.65, 0.04), (0.7, 0.03), (0.8, 0.09), (0.9, NAN)], [0, 1, 3, 4]),
        # Equal in one figure: the better in the other stays.
        ([(0.7, 0.03), (0.7, 0.02), (0.6, 0.02)], [1]),
        # Each better than the one before in one figure and worse in the other.
        ([(0.5, 0.01), (0.6, 0.02), (0.7, 0.03)], [0, 1, 2]),
        ([(0.5, 0.01)], [0]),
        ([(NAN, 0.01)], []),
        ([], []),
    ],
)
def test_fronts_worked_by_hand(rows: list[tuple[float, float]], front: list[int]) -> None:
    metrics = [{"student/top1": top1, "student/ece": ece} for top1, ece in rows]
    assert Goal.parse("pareto").front(metrics) == front


def test_the_front_is_among_rows_that_meet_the_constraints() -> None:
    rows = [{"student/top1": a, "student/ece": e} for a, e in [(0.9, 0.10), (0.8, 0.04), (0.7, 0.05), (0.6, 0.01)]]
    assert Goal.parse("pareto", ["ece<=0.05"]).front(rows) == [1, 3]
    assert Goal.parse("pareto", ["ece<=0.001"]).front(rows) == []


def test_the_front_of_one_metric_is_its_best_rows() -> None:
    rows = [{"student/nll": x} for x in (0.5, 0.4, 0.6, 0.4)]
    assert Goal.parse("nll").front(rows) == [1, 3]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40))
def test_the_front_is_what_brute_force_finds(points: list[tuple[int, int]]) -> None:
    figures = np.array(points, dtype=np.float64).reshape(-1, 2) / 6
    costs = figures * [-1, 1]
    no_worse = (costs[:, None] <= costs[None]).all(2)
    better = (costs[:, None] < costs[None]).any(2)
    expected = np.flatnonzero(~(no_worse & better).any(0)).tolist()
    rows = [{"student/top1": top1, "student/ece": ece} for top1, ece in figures.tolist()]
    assert Goal.parse("pareto").front(rows) == expected


def test_the_nearest_row_misses_by_the_smallest_share() -> None:
    goal = Goal.parse("accuracy", ["ece<=0.02", "student/nll<=1"])
    rows = [
        {"student/ece": NAN, "student/nll": 0.5},
        {"student/ece": 0.03, "student/nll": 1.0},  # half of 0.02
        {"student/ece": 0.02, "student/nll": 1.4},  # 0.4 of 1, though further in nats
        {"student/ece": 0.022, "student/nll": 1.3},  # 0.1 + 0.3
    ]
    for order in itertools.permutations(range(3)):
        assert order[goal.nearest([rows[index] for index in order])] == 2
    assert goal.nearest([rows[1], rows[3]]) == 1


def test_a_row_is_said_in_percent_and_with_what_was_asked() -> None:
    row = {"student/top1": 0.71234, "student/ece": 0.0314, "student/nll": 1.2345}
    assert Goal.parse("ece", ["ece<=0.02"]).said(row) == "student/ece 3.14 % (asked: <= 2 %)"
    assert Goal.parse("accuracy", ["ece <= 0.025", "nll<=1"]).said(row) == (
        "student/top1 71.2 %, student/ece 3.14 % (asked: <= 2.5 %), student/nll 1.23 (asked: <= 1)"
    )
    assert Goal.parse("nll", ["student/gap>=-0.01", "student/gap<=0.01"]).said({"student/gap": 0.05}) == (
        "student/nll nan, student/gap 5 % (asked: >= -1 % and <= 1 %)"
    )
    assert Goal.parse("pareto").said(row) == "student/top1 71.2 %, student/ece 3.14 %"


def test_samplers_of_several_objectives_are_told_costs() -> None:
    row = {"student/top1": 0.7, "student/ece": 0.03, "student/nll": 1.1}
    assert Goal.parse("pareto").objectives(row) == (-0.7, 0.03)
    assert Goal.parse("accuracy").objectives(row) == (-0.7,)


@settings(max_examples=200, deadline=None)
@given(one=ROW, other=ROW)
def test_objectives_of_a_row_that_misses_its_bounds_are_dominated_by_those_of_any_row_that_meets_them(
    one: dict[str, float], other: dict[str, float]
) -> None:
    goal = Goal.parse("pareto", ["accuracy>=0.5"])
    one, other = ({**row, "student/ece": min(1.0, row["student/ece"])} for row in (one, other))
    told, met = [goal.objectives(row) for row in (one, other)], [row["student/top1"] >= 0.5 for row in (one, other)]
    if met == [True, False]:
        assert told[0][0] < told[1][0]
        assert told[0][1] < told[1][1]
    if met == [False, False]:
        assert (told[0] < told[1]) == (one["student/top1"] > other["student/top1"])
