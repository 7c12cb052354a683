"""Parameters that change over training: their values by hand, and the losses that they lead to."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from objective_cases import VARIANTS, batch, every_variant, leaves, scalars, several, torch_batch
from torch import Tensor

from bdkd_dist.errors import UserError
from bdkd_dist.objectives import ABKD, BDKD, DML, Losses, Objective, ParameterSchedule

VALUES = [
    # (start, end, shape, until), progress, value
    ((2, 6, "linear", 1), [(0, 2), (0.25, 3), (1, 6)]),
    ((1, 0.2, "linear", 0.5), [(0, 1), (0.25, 0.6), (0.5, 0.2), (0.75, 0.2), (1, 0.2)]),
    ((0, 1, "sigmoid", 1), [(0, 0.006737946999085467), (0.5, 0.2865047968601901), (1, 1)]),
    ((4, 2, "sigmoid", 0.4), [(0.2, 4 - 2 * 0.2865047968601901), (0.4, 2), (0.9, 2)]),
    ((0, 8, "cosine", 1), [(0, 0), (1 / 3, 2), (0.5, 4), (2 / 3, 6), (1, 8)]),
    ((-1, 1, "cosine", 0.25), [(0, -1), (0.125, 0), (0.25, 1), (1, 1)]),
]


@pytest.mark.parametrize(("fields", "points"), VALUES)
def test_a_schedule_has_the_values_worked_out_by_hand(
    fields: tuple[Any, ...], points: list[tuple[float, float]]
) -> None:
    schedule = ParameterSchedule(**dict(zip(("start", "end", "shape", "until"), fields, strict=True)))
    for progress, value in points:
        assert schedule.at(progress) == pytest.approx(value, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"until": 0}, "until=0 is not allowed (allowed: finite, > 0, <= 1)"),
        ({"until": 1.01}, "until=1.01 is not allowed (allowed: finite, > 0, <= 1)"),
        ({"start": math.nan}, "start=nan is not allowed (allowed: finite)"),
        ({"end": math.inf}, "end=inf is not allowed (allowed: finite)"),
        ({"shape": "sigmod"}, "unknown shape 'sigmod'; did you mean 'sigmoid'? (allowed: cosine, linear, sigmoid)"),
    ],
)
def test_a_wrong_schedule_is_one_line(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        ParameterSchedule(**{"start": 0.0, "end": 1.0, **wrong})
    assert str(caught.value) == line


def test_both_ends_keep_the_parameters_bounds() -> None:
    for end, line in {
        "start": "nu_forward.start=-1.0 is not allowed (allowed: finite, >= 0)",
        "end": "nu_forward.end=-1.0 is not allowed (allowed: finite, >= 0)",
    }.items():
        with pytest.raises(UserError) as caught:
            BDKD(nu_forward=ParameterSchedule(**{"start": 1.0, "end": 1.0, end: -1.0}))
        assert str(caught.value) == line
    falling = ParameterSchedule(start=1, end=0, until=0.5)
    rising = ParameterSchedule(start=0, end=1)
    ABKD(alpha=falling, beta=rising)
    for beta in (0.0, ParameterSchedule(start=0.5, end=0, until=0.75)):
        with pytest.raises(UserError, match="alpha=0 and beta=0 are not allowed together"):
            ABKD(alpha=falling, beta=beta)


def test_an_objective_is_asked_for_a_moment_before_it_computes() -> None:
    objective = DML(weight=ParameterSchedule(start=0, end=4))
    students, teacher, targets = torch_batch()
    with pytest.raises(UserError, match=r"call at\(progress\)"):
        objective(students, teacher, targets)
    assert objective.at(0.25) == DML(weight=1)
    assert objective.at(0.25).schedules == {}
    torch.testing.assert_close(
        scalars(objective.at(0.5)(students, teacher, targets)), scalars(DML(weight=2)(students, teacher, targets))
    )


def numbers_of(objective: Any) -> dict[str, float]:
    values = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def bound(objective: Objective) -> tuple[Objective, dict[str, Tensor]]:
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in numbers_of(objective).items()}
    return objective.bound(values), values


def outcome(objective: Objective, students: Any, teacher: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Any]:
    losses = objective.compute(students, teacher, targets)
    total = losses.student_loss + 2 * losses.teacher_loss
    return scalars(losses), torch.autograd.grad(total, (*students, teacher), materialize_grads=True)


@every_variant
@pytest.mark.parametrize("soft", [False, True])
def test_numbers_that_a_device_holds_give_the_same_as_pythons(objective: Objective, soft: bool) -> None:
    z, y = batch(seed=5, students=2 if several(objective) else 1, soft=soft)
    students, teacher = leaves(z)
    want = outcome(objective, students, teacher, torch.tensor(y))
    got = outcome(bound(objective)[0], students, teacher, torch.tensor(y))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("bdkd_soft_balanced", "kd", "dml", "kdcl_min_logit", "competitive_warm", "focal_gentle", "mdca_heavy"),
        *("jeffreys_warm", "abkd"),
    ],
)
def test_new_values_need_no_new_graph(name: str) -> None:
    objective, values = bound(VARIANTS[name])
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(students: list[Tensor], teacher: Tensor, targets: Tensor) -> Losses:
        return objective.compute(students, teacher, targets)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=count, dynamic=False)
    students, teacher, targets = torch_batch()
    for factor in (1.0, 0.5, 0.8, 0.9):
        moment = {field: factor * number for field, number in numbers_of(VARIANTS[name]).items()}
        for field, value in moment.items():
            values[field].fill_(value)
        want = dataclasses.replace(VARIANTS[name], **moment)  # type: ignore[type-var]
        torch.testing.assert_close(
            scalars(compiled(students, teacher, targets)), scalars(want.compute(students, teacher, targets))
        )
    assert len(graphs) == 1
    torch._dynamo.reset()
