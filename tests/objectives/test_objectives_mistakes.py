"""A user's mistakes are one line each; and the step itself looks at no value."""

import dataclasses
import math
import subprocess
import sys
from typing import Annotated, Any

import pytest
import torch
from objective_cases import EVERY, every_objective, every_variant, scalars, several, torch_batch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bdkd_dist.errors import UserError
from bdkd_dist.objectives import (
    ABKD,
    AKL,
    BDKD,
    CE,
    DML,
    JSD,
    KD,
    KDCL,
    MDCA,
    OBJECTIVES,
    PSKD,
    Competitive,
    Focal,
    Jeffreys,
    Objective,
    Skew,
    SwitOKD,
)


def line_of(call: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **more)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


Z = torch.zeros
INDICES = Z(4, dtype=torch.int64)
MISFITS = [
    (Z(0, 3), Z(0, 3), INDICES[:0]),
    (Z(4, 3), Z(4, 5), INDICES),
    (Z(4, 3), Z(2, 3), INDICES),
    (Z(4, 3), Z(4, 3), Z(5, dtype=torch.int64)),
    (Z(4, 3), Z(4, 3), Z(4, 1, dtype=torch.int64)),
    (Z(4, 3), Z(4, 3), Z(4, 3, dtype=torch.int64)),
    (Z(4, 3), Z(4, 3), Z(4)),
    (Z(4, 3), Z(4, 3), Z(4, 4)),
    (Z(4, 3), Z(4, 3), Z(4, dtype=torch.int32)),
    (Z(4, 3), Z(4, 3), Z(4, dtype=torch.bool)),
    (Z(4, 3, dtype=torch.int64), Z(4, 3), INDICES),
    (Z(4, 3), Z(4, 3, dtype=torch.int64), INDICES),
    (Z(4, 3, 2), Z(4, 3, 2), INDICES),
    (Z(4, 3, 2, 2), Z(4, 3, 2, 2), INDICES),
    (Z(4, 3, 2, 2), Z(4, 3, 2, 2), Z(4, 2, 3, dtype=torch.int64)),
    (Z(4, 3, 2, 2), Z(4, 3, 2, 2), Z(4, 3)),
    (Z(4, 3, 2, 2), Z(4, 3), INDICES),
    (Z(4), Z(4), INDICES),
]


@pytest.mark.parametrize(("student", "teacher", "targets"), MISFITS)
def test_shapes_and_types_that_do_not_fit_are_one_line(student: Tensor, teacher: Tensor, targets: Tensor) -> None:
    for objective in EVERY.values():
        for call in (objective, objective.compute, objective.gradient_shares):
            line = line_of(call, student, teacher, targets)
            for word in (*(str(tuple(t.shape)) for t in (student, teacher, targets)), "(B, K)"):
                assert word in line
    assert str(targets.dtype).removeprefix("torch.") in line


def test_no_student_and_students_of_two_shapes_are_one_line() -> None:
    for objective in EVERY.values():
        assert "none" in line_of(objective, [], Z(4, 3), INDICES)
        line = line_of(objective, [Z(4, 3), Z(4, 5)], Z(4, 3), INDICES)
        assert "(4, 5)" in line or objective.name == "switokd"


@every_objective
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_one_line(objective: Objective, value: float) -> None:
    (student,), teacher, targets = torch_batch()
    bad = student.detach().clone()
    bad[3, 1] = bad[5, 0] = value
    assert "student logits: 2 of 72 are not finite" in line_of(objective, bad, teacher, targets)
    assert "teacher logits: 2 of 72 are not finite" in line_of(objective, student, bad, targets)
    if several(objective):
        assert "student_2 logits" in line_of(objective, [student, bad], teacher, targets)


@every_objective
@pytest.mark.parametrize("wrong", [-1, -100, 6])
def test_a_target_that_is_no_class_is_one_line(objective: Objective, wrong: int) -> None:
    students, teacher, targets = torch_batch()
    targets[0] = wrong  # −100 is what torch's cross-entropy would leave out without a word
    line = line_of(objective, students, teacher, targets)
    assert line == "targets: 1 of 12 are no class index (allowed: 0 to 5)"


def test_a_target_that_is_no_class_is_never_ignored() -> None:
    students, teacher, targets = torch_batch()
    targets[0] = -100
    with pytest.raises((RuntimeError, IndexError)):
        CE().compute(students, teacher, targets)


@every_objective
def test_soft_targets_that_are_no_probabilities_are_one_line(objective: Objective) -> None:
    students, teacher, targets = torch_batch()
    good = torch.nn.functional.one_hot(targets, 6).float()
    off, negative, unknown = good.clone(), good.clone(), good.clone()
    off[1] *= 1.01
    negative[2, :2] += torch.tensor([0.1, -0.1]) * (1 if negative[2, 1] == 0 else -1)
    unknown[3, 0] = math.nan
    for bad in (off, negative, unknown, 0 * good, 100 * good):
        assert "soft targets are no probabilities" in line_of(objective, students, teacher, bad)
    maps = [z.detach().T.reshape(1, 6, 3, 4) for z in (*students, teacher)]
    assert "soft targets" in line_of(objective, *maps, off.T.reshape(1, 6, 3, 4))
    objective(*maps, good.T.reshape(1, 6, 3, 4))  # which would sum wrongly along any other dimension


NUMBERS: dict[type[Objective], dict[str, str]] = {
    BDKD: {
        **dict.fromkeys(("nu_forward", "nu_reverse", "ce_weight", "student_weight", "teacher_weight"), ">= 0"),
        **dict.fromkeys(("temperature", "entropy_temperature", "sharpness"), "> 0"),
    },
    CE: {},
    KD: {"temperature": "> 0", "ce_weight": ">= 0", "weight": ">= 0"},
    DML: {"weight": ">= 0"},
    KDCL: {"temperature": "> 0", "weight": ">= 0"},
    SwitOKD: {},
    Competitive: {"temperature": "> 0", "weight": ">= 0"},
    PSKD: {"past_share": ">= 0, <= 1"},
    Focal: {"gamma_low": ">= 0", "gamma_high": ">= 0", "threshold": ">= 0, <= 1"},
    MDCA: {"weight": ">= 0"},
    **{
        kind: {"temperature": "> 0", **dict.fromkeys(("ce_weight", "student_weight", "teacher_weight"), ">= 0")} | more
        for kind, more in {
            Jeffreys: {},
            JSD: {},
            Skew: {"skew": ">= 0, < 1"},
            AKL: {"head_mass": "> 0, < 1"},
            ABKD: {"alpha": ">= 0", "beta": ">= 0"},
        }.items()
    },
}


def test_every_number_of_every_objective_is_checked_below() -> None:
    assert set(NUMBERS) == set(OBJECTIVES.values())
    for kind, numbers in NUMBERS.items():
        words = {"name", "gate", "teacher_term", "ensemble"}
        assert {field.name for field in dataclasses.fields(kind)} - words == set(numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "field", "allowed"),
    [(kind, field, allowed) for kind, numbers in NUMBERS.items() for field, allowed in numbers.items()],
)
def test_a_number_out_of_range_is_one_line(kind: type[Objective], field: str, allowed: str) -> None:
    wrong: list[Any] = [True, -1.0, -1e-9, math.nan, math.inf, -math.inf, "much", None]
    wrong += [0, 0.0] if allowed.startswith("> 0") else []
    wrong += [1, 1.0, 1.5] if "< 1" in allowed else []
    wrong += [1.0001, 2] if "<= 1" in allowed else []
    for value in wrong:
        assert line_of(kind, **{field: value}) == f"{field}={value} is not allowed (allowed: finite, {allowed})"
    lowest = 1e-6 if allowed.startswith("> 0") else 0.0
    assert getattr(kind(**{field: lowest}), field) == lowest


@pytest.mark.parametrize(
    ("kind", "field", "word", "nearest"),
    [
        (BDKD, "gate", "softt", "soft"),
        (BDKD, "gate", "Hard", "hard"),
        (BDKD, "teacher_term", "student_to_teachr", "student_to_teacher"),
        (BDKD, "teacher_term", "balance", "balanced"),
        (KDCL, "ensemble", "minlogit", "min_logit"),
        (KDCL, "ensemble", "lineal", "linear"),
    ],
)
def test_an_unknown_word_is_one_line_with_the_nearest_spelling(
    kind: type[Objective], field: str, word: str, nearest: str
) -> None:
    line = line_of(kind, **{field: word})
    assert line.startswith(f"unknown {field} '{word}'; did you mean '{nearest}'? (allowed: ")


def test_an_alpha_beta_divergence_of_nothing_is_one_line() -> None:
    assert "alpha=0 and beta=0 are not allowed together" in line_of(ABKD, alpha=0, beta=0)


@every_variant
def test_a_step_reads_no_value(objective: Objective) -> None:
    # A fake tensor has a shape and no values: .item(), bool() and a data-dependent shape would raise.
    students, teacher, targets = torch_batch(students=2 if several(objective) else 1)
    soft = torch.full((12, 6), 1 / 6)
    expected = scalars(objective.compute(students, teacher, targets))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(z) for z in (*students, teacher)]
        for fake_targets in (mode.from_tensor(targets), mode.from_tensor(soft)):
            losses = objective.compute(fakes[:-1], fakes[-1], fake_targets)
            (losses.student_loss + losses.teacher_loss).backward()
            objective.gradient_shares(fakes[:-1], fakes[-1], fake_targets)
            assert scalars(losses).keys() == expected.keys()
            with pytest.raises(DataDependentOutputException):
                losses.student_loss.item()


def test_a_call_does_look_at_the_values_and_compute_does_not() -> None:
    (student,), teacher, targets = torch_batch()
    bad = student.detach() * math.nan
    line_of(CE(), bad, teacher, targets)
    assert CE().compute(bad, teacher, targets).student_loss.isnan()


@every_objective
def test_the_inputs_stay_as_they_were(objective: Objective) -> None:
    (student,), teacher, targets = torch_batch()
    before = [each.detach().clone() for each in (student, teacher, targets)]
    objective(student, teacher, targets)
    objective.gradient_shares(student, teacher, targets)
    for each, old in zip((student, teacher, targets), before, strict=True):
        torch.testing.assert_close(each.detach(), old, rtol=0, atol=0)


def test_the_registry_names_each_class_by_its_own_name() -> None:
    assert {name: objective().name for name, objective in OBJECTIVES.items()} == {name: name for name in OBJECTIVES}


@every_objective
def test_an_objective_cannot_be_changed_once_made(objective: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.name = "other"


def section() -> TypeAdapter[Any]:
    union: Any = BDKD
    for kind in OBJECTIVES.values():
        union = union | kind
    return TypeAdapter(Annotated[union, Field(discriminator="name")])


@every_variant
def test_an_objective_reads_back_from_its_own_dict(objective: Any) -> None:
    plain = dataclasses.asdict(objective)
    assert plain.keys() == {field.name for field in dataclasses.fields(objective)}
    assert plain["name"] == objective.name
    assert section().validate_python(plain) == objective


@pytest.mark.parametrize(
    ("plain", "word"),
    [
        ({"name": "bdkd", "nu_foward": 3}, "nu_foward"),
        ({"name": "dml", "nu_forward": 3}, "nu_forward"),
        ({"name": "ce", "weight": 1}, "weight"),
        ({"name": "kl"}, "kl"),
        ({"name": "bdkd", "temperature": 0}, "temperature=0.0 is not allowed"),
        ({"name": "bdkd", "gate": "medium"}, "'hard' or 'soft'"),
        ({"name": "dml", "weight": -1}, "weight=-1.0 is not allowed"),
        ({"name": "kdcl", "ensemble": "max"}, "'min_logit', 'naive' or 'linear'"),
        ({"name": "skew", "skew": 1}, "skew=1.0 is not allowed"),
        ({"name": "jsd", "skew": 0.5}, "skew"),
    ],
)
def test_a_wrong_section_is_refused(plain: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        section().validate_python(plain)


def test_the_import_needs_nothing_beyond_torch_and_the_standard_library() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import bdkd_dist.objectives;print(*(set(sys.modules) - before))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    gained = set(printed.split())
    assert {f"bdkd_dist.objectives.{name}" for name in ("bdkd", "kdcl", "switokd", "balances")} <= gained
    roots = {name.partition(".")[0] for name in gained}
    assert roots <= set(sys.stdlib_module_names) | {"bdkd_dist"}
    ours = {name for name in gained if name.startswith("bdkd_dist.") and ".objectives" not in name}
    assert ours == {"bdkd_dist.distributed", "bdkd_dist.errors"}
