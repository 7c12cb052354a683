"""Gradients of every objective: against formulas, a complex step through the reference, and torch's gradcheck."""

from typing import Any

import numpy as np
import numpy_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_reference import Networks
from objective_cases import (
    VARIANTS,
    batch,
    every_objective,
    every_variant,
    gradients_of,
    leaves,
    several,
    tolerance,
)
from torch import Tensor

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
    Competitive,
    Focal,
    Jeffreys,
    Objective,
    Skew,
    SwitOKD,
)


@every_variant
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("samples", "classes", "scale"), [(1, 2, 2.0), (16, 7, 2.0), (6, 4, 0.1)])
def test_gradients_equal_the_references(
    objective: Objective, soft: bool, samples: int, classes: int, scale: float
) -> None:
    z, y = batch(7, samples, classes, scale, soft=soft)
    for found, expected in zip(gradients_of(objective, z, y), reference.gradients(objective, z, y), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(objective))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([o for o in VARIANTS.values() if "linear" not in repr(o)]),
    st.builds(
        batch,
        seed=st.integers(0, 2**32 - 1),
        samples=st.integers(1, 5),
        classes=st.integers(2, 8),
        scale=st.sampled_from([1e-3, 0.3, 3.0, 10.0]),
        soft=st.booleans(),
    ),
)
def test_gradients_at_any_logits_equal_the_references(objective: Objective, made: tuple[Networks, Any]) -> None:
    for found, expected in zip(gradients_of(objective, *made), reference.gradients(objective, *made), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


# gradcheck sees what is held fixed by a continuous function of the logits as a part of the gradient: those are left to
# the complex step above, which knows what is fixed.
PIECEWISE = {
    name: objective
    for name, objective in VARIANTS.items()
    if not (objective.name == "akl" or any(word in repr(objective) for word in ("'soft'", "min_logit", "linear")))
}


@pytest.mark.parametrize("objective", PIECEWISE.values(), ids=PIECEWISE)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_gradcheck_in_float64(objective: Objective, soft: bool, scale: float) -> None:
    z, y = batch(1, samples=3, classes=4, scale=scale, soft=soft)
    (student,), teacher = leaves(z)
    targets = torch.tensor(y)
    assert torch.autograd.gradcheck(lambda z: objective(z, teacher.detach(), targets).student_loss, student)
    if objective.teacher_learns:
        assert torch.autograd.gradcheck(lambda z: objective(student.detach(), z, targets).teacher_loss, teacher)


@pytest.mark.parametrize("name", ["akl", "bdkd_soft", "kdcl_min_logit", "kdcl_linear"])
def test_what_is_held_fixed_carries_no_gradient(name: str) -> None:
    # That the complex step holds it fixed matters: the slope of the whole loss is another one.
    objective, step = VARIANTS[name], 1e-6
    z, y = batch(7)
    numeric = np.empty_like(z.teacher)
    for k in range(7):
        move = step * np.eye(7)[k]
        above, below = (
            reference.network_losses(objective, Networks([z.students[0] + sign * move], z.teacher), y)[0]
            for sign in (1, -1)
        )
        numeric[:, k] = (above - below) / (2 * step) / 16
    moving = np.abs(numeric - gradients_of(objective, z, y)[0]).max()
    assert moving > 1e-3


def test_the_gradients_of_the_two_directions_are_the_formulas() -> None:
    z, y = batch()
    q, p = reference.softmax(z.students[0]), reference.softmax(z.teacher)
    one_hot = np.eye(7)[y]
    forward = q - p  # ∂KL(p‖q)/∂z_s
    reverse = q * (np.log(q / p) - reference.kl(q, p)[:, None])  # ∂KL(q‖p)/∂z_s
    h_s, h_t = reference.shannon(q), reference.shannon(p)
    expected: list[tuple[Objective, np.ndarray, np.ndarray]] = [
        (CE(), q - one_hot, p - one_hot),
        (KD(temperature=1, ce_weight=1, weight=1), q - one_hot + forward, 0 * p),
        (DML(weight=2.5), q - one_hot + 2.5 * forward, p - one_hot - 2.5 * forward),
        (Jeffreys(), q - one_hot + forward + reverse, p - one_hot - forward),
        (ABKD(alpha=1, beta=0), q - one_hot + forward, p - one_hot - forward),
        (ABKD(alpha=0, beta=1), q - one_hot + reverse, p - one_hot - forward),
        (Skew(skew=0), q - one_hot + forward, p - one_hot - forward),
    ]
    for objective in (BDKD(nu_forward=3, nu_reverse=5), BDKD(gate="soft", nu_forward=3, nu_reverse=5)):
        w_f, w_r = (w[:, None] for w in reference.bdkd_weights(objective, h_s, h_t))
        expected.append((objective, q - one_hot + w_f * forward + w_r * reverse, p - one_hot - forward))
    # ∂JSD/∂z_s,k = ½·q_k·(log(q_k/m_k) − KL(q‖m))
    middle = (p + q) / 2
    half = q * (np.log(q / middle) - reference.kl(q, middle)[:, None]) / 2
    expected.append((JSD(), q - one_hot + half, p - one_hot - forward))
    head = reference.head_share(p, q, 0.5)[:, None]
    expected.append((AKL(), q - one_hot + head * forward + (1 - head) * reverse, p - one_hot - forward))
    # ∂L/∂z_k = ∂L/∂p_y·p_y·(δ_ky − p_k), L = −(1 − p_y)^γ·log p_y
    slopes = []
    for each in (q, p):
        of_target = each[np.arange(16), y]
        gamma = np.where(of_target < 0.2, 5, 3)
        by_p = gamma * (1 - of_target) ** (gamma - 1) * np.log(of_target) - (1 - of_target) ** gamma / of_target
        slopes.append((by_p * of_target)[:, None] * (one_hot - each))
    expected.append((Focal(), *slopes))
    # ∂(1/K·Σ_j s_j·p_j)/∂z_k = p_k·(s_k − Σ_j s_j·p_j)/K
    signs = [np.sign((each - one_hot).mean(axis=0)) for each in (q, p)]
    pulls = [each * (s - (each @ s)[:, None]) / 7 for each, s in zip((q, p), signs, strict=True)]
    expected.append((MDCA(weight=3), q - one_hot + 3 * pulls[0], p - one_hot + 3 * pulls[1]))
    assert reference.competition_winner(z.all, y) == 1
    expected.append((Competitive(weight=2), q - one_hot + 2 * forward, p - one_hot))
    for objective, by_student, by_teacher in expected:
        found_student, found_teacher = gradients_of(objective, z, y)
        np.testing.assert_allclose(16 * found_student, by_student, atol=1e-13, err_msg=repr(objective))
        np.testing.assert_allclose(16 * found_teacher, by_teacher, atol=1e-13, err_msg=repr(objective))


def test_a_temperature_scales_the_gradient_so_that_it_keeps_its_size() -> None:
    # τ²·∂KL(p‖q)/∂z_s = τ·(q_τ − p_τ), which goes to the difference of the centred logits over K.
    z, y = batch()
    (found, _), tau = gradients_of(KD(temperature=1e5, ce_weight=0, weight=1), z, y), 1e5
    centred = [each - each.mean(axis=1, keepdims=True) for each in z.all]
    np.testing.assert_allclose(16 * found, (centred[0] - centred[1]) / 7, atol=20 / tau)


@every_variant
def test_no_loss_sends_gradient_to_another_network(objective: Objective) -> None:
    for students in (1, 3) if several(objective) else (1,):
        check_isolation(objective, students)


def check_isolation(objective: Objective, students: int) -> None:
    z, y = batch(students=students)
    own, teacher = leaves(z)
    losses = objective(own, teacher, torch.tensor(y))
    grads = torch.autograd.grad(losses.student_loss, (*own, teacher), retain_graph=True, materialize_grads=True)
    assert all(g.norm() > 0 for g in grads[:-1])
    assert grads[-1].norm() == 0
    if not objective.teacher_learns:
        assert not losses.teacher_loss.requires_grad
        return
    grads = torch.autograd.grad(losses.teacher_loss, (*own, teacher), materialize_grads=True)
    assert all(g.norm() == 0 for g in grads[:-1])
    assert grads[-1].norm() > 0 or losses.diagnostics.get("teacher/paused") == 1


def test_a_waiting_teacher_gets_a_gradient_of_zero() -> None:
    student, teacher = torch.tensor([[0.2, 0.79, 0.01]]).log(), torch.tensor([[0.4, 0.01, 0.59]]).log()
    student.requires_grad_()
    teacher.requires_grad_()
    losses = SwitOKD()(student, teacher, torch.tensor([0]))
    assert losses.diagnostics["teacher/paused"] == 1
    (losses.student_loss + losses.teacher_loss).backward()
    assert teacher.grad is not None
    assert teacher.grad.norm() == 0  # zero, not none: under DDP every parameter takes part in every step
    assert student.grad is not None
    assert student.grad.norm() > 0


def norms(gradient: np.ndarray) -> float:
    return float(np.linalg.norm(gradient, axis=1).sum())


def shares(**pulls: float) -> dict[str, float]:
    return {term: pull / sum(pulls.values()) for term, pull in pulls.items()}


def by_hand(z: Networks, y: np.ndarray) -> list[tuple[Objective, dict[str, float], dict[str, float]]]:
    q, p = reference.softmax(z.students[0]), reference.softmax(z.teacher)
    one_hot = np.eye(q.shape[1])[y]
    forward, backward = q - p, q * (np.log(q / p) - reference.kl(q, p)[:, None])
    mirrored = p * (np.log(p / q) - reference.kl(p, q)[:, None])
    ce_s, ce_t = norms(q - one_hot), norms(p - one_hot)
    h_s, h_t = reference.shannon(q), reference.shannon(p)
    gated = BDKD(nu_forward=3, nu_reverse=5, ce_weight=0.7, student_weight=1.5, teacher_term="balanced")
    w_f, w_r = (w[:, None] for w in reference.bdkd_weights(gated, h_s, h_t))
    m_f, m_r = (w[:, None] for w in reference.bdkd_weights(gated, h_t, h_s))
    return [
        (CE(), {"ce": 1.0}, {"ce": 1.0}),
        (KD(temperature=1), shares(ce=0.1 * ce_s, forward=0.9 * norms(forward)), {}),
        (DML(weight=2), shares(ce=ce_s, mutual=2 * norms(forward)), shares(ce=ce_t, mutual=2 * norms(forward))),
        (
            Jeffreys(student_weight=3),
            shares(ce=ce_s, divergence=3 * norms(forward + backward)),
            shares(ce=ce_t, forward=norms(forward)),
        ),
        (Focal(), {"focal": 1.0}, {"focal": 1.0}),
        (Competitive(weight=2), shares(ce=ce_s, winner=2 * norms(forward)), {"ce": 1.0, "winner": 0.0}),
        (
            gated,
            shares(ce=0.7 * ce_s, forward=1.5 * norms(w_f * forward), reverse=1.5 * norms(w_r * backward)),
            shares(ce=0.7 * ce_t, forward=norms(m_f * forward), reverse=norms(m_r * mirrored)),
        ),
        (BDKD(teacher_term="none", student_weight=0), {"ce": 1.0, "forward": 0.0, "reverse": 0.0}, {"ce": 1.0}),
        (BDKD(ce_weight=0, student_weight=0), {"ce": 0.0, "forward": 0.0, "reverse": 0.0}, {"ce": 0.0, "forward": 1.0}),
    ]


@pytest.mark.parametrize("index", range(9))
def test_gradient_shares_equal_those_worked_by_hand(index: int) -> None:
    z, y = batch()
    objective, student, teacher = by_hand(z, y)[index]
    (own,), other = leaves(z)
    found = objective.gradient_shares(own, other, torch.tensor(y))
    expected = {f"student/gradient_share_{term}": share for term, share in student.items()}
    expected |= {f"teacher/gradient_share_{term}": share for term, share in teacher.items()}
    assert found.keys() == expected.keys()
    for name, share in found.items():
        assert share.item() == pytest.approx(expected[name], rel=1e-12), name


@every_objective
def test_gradient_shares_add_up_to_one_and_leave_the_networks_alone(objective: Objective) -> None:
    z, y = batch(scale=0.1, students=2 if several(objective) else 1)  # near each other: switokd's teacher learns
    own, teacher = leaves(z)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective.gradient_shares(own, teacher, torch.tensor(y))
    totals: dict[str, Tensor] = {}
    for name, share in found.items():
        network = name.partition("/")[0]
        totals[network] = totals.get(network, torch.zeros(())) + share
        assert share.shape == ()
        assert not share.requires_grad
        assert 0 <= share <= 1
    expected = {"student_1", "student_2"} if several(objective) else {"student"}
    assert totals.keys() == expected | ({"teacher"} if objective.teacher_learns else set())
    for total in totals.values():
        assert total.item() == pytest.approx(1, rel=1e-12)
    assert all(each.grad is None for each in (*own, teacher))


def test_shares_of_a_waiting_teacher_are_zero() -> None:
    student, teacher = torch.tensor([[0.2, 0.79, 0.01]]).log(), torch.tensor([[0.4, 0.01, 0.59]]).log()
    found = SwitOKD().gradient_shares(student, teacher, torch.tensor([0]))
    assert found["teacher/gradient_share_ce"] == found["teacher/gradient_share_forward"] == 0
    assert found["student/gradient_share_ce"] > 0


def test_kdcl_linear_gives_students_at_the_ensemble_no_pull() -> None:
    z, y = batch()
    same = Networks([z.teacher], z.teacher)
    found = KDCL(ensemble="linear").gradient_shares(*(torch.tensor(each) for each in same.all), torch.tensor(y))
    assert found["student/gradient_share_ensemble"].item() == pytest.approx(0, abs=1e-12)
