"""Several students: against the reference, and what the pairwise objectives say of each."""

import numpy as np
import numpy_reference as reference
import pytest
import torch
from numpy_reference import Networks
from objective_cases import VARIANTS, batch, gradients_of, losses_of, scalars, several, tolerance, torch_batch

from bdkd_dist.errors import UserError
from bdkd_dist.objectives import BDKD, DML, KDCL, Objective, SwitOKD, student_names
from bdkd_dist.objectives.kdcl import _mixing

SEVERAL = {name: objective for name, objective in VARIANTS.items() if several(objective)}
every_of_several = pytest.mark.parametrize("objective", SEVERAL.values(), ids=SEVERAL)
PAIRWISE = {
    name: objective for name, objective in SEVERAL.items() if objective.name not in ("dml", "kdcl", "competitive")
}


@every_of_several
@pytest.mark.parametrize("students", [2, 3])
@pytest.mark.parametrize("soft", [False, True])
def test_several_students_equal_the_reference(objective: Objective, students: int, soft: bool) -> None:
    z, y = batch(5, students=students, soft=soft)
    losses, expected = losses_of(objective, z, y), reference.figures(objective, z, y)
    bound = tolerance(objective, students)
    assert losses.student_loss.item() == pytest.approx(expected.student_loss, rel=bound, abs=bound)
    assert losses.teacher_loss.item() == pytest.approx(expected.teacher_loss, rel=bound, abs=bound)
    assert losses.diagnostics.keys() == expected.diagnostics.keys()
    for name, value in losses.diagnostics.items():
        assert value.item() == pytest.approx(expected.diagnostics[name], rel=bound, abs=bound), name
        assert not value.requires_grad


@every_of_several
@pytest.mark.parametrize("students", [2, 3])
def test_gradients_of_several_students_equal_the_references(objective: Objective, students: int) -> None:
    z, y = batch(5, students=students)
    for found, expected in zip(gradients_of(objective, z, y), reference.gradients(objective, z, y), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(objective, students))


@pytest.mark.parametrize("objective", PAIRWISE.values(), ids=PAIRWISE)
def test_each_student_of_a_pairwise_objective_stands_beside_the_teacher_alone(objective: Objective) -> None:
    z, y = batch(5, students=3)
    together = losses_of(objective, z, y)
    alone = [losses_of(objective, Networks([student], z.teacher), y) for student in z.students]
    torch.testing.assert_close(together.student_loss, torch.stack([each.student_loss for each in alone]).sum())
    torch.testing.assert_close(together.teacher_loss, torch.stack([each.teacher_loss for each in alone]).mean())
    for number, each in enumerate(alone, 1):
        for name, value in each.diagnostics.items():
            if name.startswith("student/"):
                renamed = name.replace("student/", f"student_{number}/")
                torch.testing.assert_close(together.diagnostics[renamed], value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_a_list_of_one_student_equals_the_student(objective: Objective) -> None:
    (student,), teacher, targets = torch_batch()
    expected = scalars(objective(student, teacher, targets))
    for sequence in ([student], (student,)):
        torch.testing.assert_close(scalars(objective(sequence, teacher, targets)), expected, rtol=0, atol=0)
    shares = objective.gradient_shares(student, teacher, targets)
    torch.testing.assert_close(objective.gradient_shares([student], teacher, targets), shares, rtol=0, atol=0)


@pytest.mark.parametrize("objective", SEVERAL.values(), ids=SEVERAL)
def test_the_order_of_students_does_not_matter(objective: Objective) -> None:
    z, y = batch(5, students=3)
    ours = losses_of(objective, z, y)
    turned = losses_of(objective, Networks([z.students[n] for n in (2, 0, 1)], z.teacher), y)
    bound = max(tolerance(objective, 3), 1e-12)
    torch.testing.assert_close(ours.student_loss, turned.student_loss, rtol=bound, atol=0)
    torch.testing.assert_close(ours.teacher_loss, turned.teacher_loss, rtol=bound, atol=0)
    for old, new in ((1, 2), (2, 3), (3, 1)):
        torch.testing.assert_close(
            ours.diagnostics[f"student_{old}/loss"], turned.diagnostics[f"student_{new}/loss"], rtol=bound, atol=0
        )


def test_dml_divides_by_the_number_of_the_others() -> None:
    # Equal peers: (M − 1) equal divergences over M − 1 are one.
    z, y = batch()
    one = losses_of(DML(), z, y)
    three = losses_of(DML(), Networks([z.students[0]], z.teacher), y)
    torch.testing.assert_close(one.student_loss, three.student_loss)
    doubled = losses_of(DML(), Networks([z.students[0], z.students[0]], z.teacher), y)
    q, p = reference.softmax(z.students[0]), reference.softmax(z.teacher)
    each = (reference.cross_entropy(z.students[0], y) + reference.kl(p, q) / 2).mean()  # nothing from its twin
    assert doubled.student_loss.item() == pytest.approx(2 * each, rel=1e-13)
    torch.testing.assert_close(doubled.teacher_loss, one.teacher_loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ["min_logit", "naive", "linear"])
def test_a_twin_adds_nothing_to_the_ensemble(kind: str) -> None:
    z, y = batch(5)
    pair = losses_of(KDCL(ensemble=kind), z, y)  # type: ignore[arg-type]
    twins = losses_of(KDCL(ensemble=kind), Networks([z.students[0]] * 2, z.teacher), y)  # type: ignore[arg-type]
    bound = 1e-5 if kind == "linear" else 1e-13
    torch.testing.assert_close(twins.student_loss, 2 * pair.student_loss, rtol=bound, atol=0)
    torch.testing.assert_close(twins.teacher_loss, pair.teacher_loss, rtol=bound, atol=0)


@pytest.mark.parametrize(("students", "scale"), [(1, 20.0), (2, 1.0), (2, 20.0), (3, 1.0)])
def test_linear_mixing_comes_to_the_convex_minimum(students: int, scale: float) -> None:
    z, y = batch(9, 40, students=students, scale=scale)
    found = losses_of(KDCL(ensemble="linear"), z, y).diagnostics["ensemble/ce"].item()
    expected = reference.cross_entropy(reference.ensemble("linear", z.all, y), y).mean()
    # At the larger scale the reference's own solver is the looser one.
    assert expected - (1e-9 if scale == 1 else 2e-3) <= found <= expected + 2e-6 * scale
    naive = losses_of(KDCL(ensemble="naive"), z, y).diagnostics["ensemble/ce"].item()
    assert naive - expected > 30 * (found - expected)


@pytest.mark.parametrize("networks", [2, 3, 4])
def test_mixing_weights_are_shares(networks: int) -> None:
    margins = 20 * torch.randn(networks, 50, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = _mixing(margins)
    assert weights.shape == (networks, 50)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(0), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-14)


def test_students_are_named_by_number() -> None:
    assert student_names(1) == ["student"]
    assert student_names(3) == ["student_1", "student_2", "student_3"]
    z, y = batch(students=2)
    found = losses_of(BDKD(), z, y).diagnostics
    assert {name.partition("/")[0] for name in found} == {"student_1", "student_2", "teacher"}
    students, teacher, targets = torch_batch(students=2)
    shares = BDKD().gradient_shares(students, teacher, targets)
    assert {f"student_{n}/gradient_share_{term}" for n in (1, 2) for term in ("ce", "forward", "reverse")} < set(shares)


def test_switokd_refuses_two_students_in_one_line() -> None:
    students, teacher, targets = torch_batch(students=2)
    for call in (SwitOKD(), SwitOKD().compute, SwitOKD().gradient_shares):
        with pytest.raises(UserError, match=r"^objective switokd: 2 students \(allowed: 1\)$"):
            call(students, teacher, targets)
