"""Losses and diagnostics of every objective against the NumPy reference, and against values worked by hand."""

import math
from typing import Any

import numpy as np
import numpy_reference as reference
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_reference import Networks
from objective_cases import batch, every_variant, losses_of, scalars, tolerance

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
    Losses,
    Objective,
    Skew,
    SwitOKD,
)

BATCHES = [(1, 2, 2.0), (16, 7, 2.0), (5, 40, 4.0), (8, 5, 0.1)]  # samples, classes, scale


def check(objective: Objective, z: Networks, targets: np.ndarray) -> Losses:
    losses, expected = losses_of(objective, z, targets), reference.figures(objective, z, targets)
    bound = tolerance(objective)
    assert losses.student_loss.item() == pytest.approx(expected.student_loss, rel=bound, abs=bound)
    assert losses.teacher_loss.item() == pytest.approx(expected.teacher_loss, rel=bound, abs=bound)
    assert losses.diagnostics.keys() == expected.diagnostics.keys()
    for name, value in losses.diagnostics.items():
        assert value.item() == pytest.approx(expected.diagnostics[name], rel=bound, abs=bound), name
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert not value.requires_grad
    return losses


@every_variant
@pytest.mark.parametrize(("samples", "classes", "scale"), BATCHES)
@pytest.mark.parametrize("soft", [False, True])
def test_losses_and_diagnostics_equal_the_reference(
    objective: Objective, samples: int, classes: int, scale: float, soft: bool
) -> None:
    check(objective, *batch(7, samples, classes, scale, soft=soft))


batches = st.builds(
    batch,
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 9),
    classes=st.integers(2, 12),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 4.0, 15.0]),
    soft=st.booleans(),
)
positive = st.floats(0.25, 8)
weight = st.floats(0, 4)
common: dict[str, Any] = {"temperature": positive, "ce_weight": weight}
both: dict[str, Any] = common | {"student_weight": weight, "teacher_weight": weight}
objectives = st.one_of(
    st.builds(
        BDKD,
        **both,
        nu_forward=weight,
        nu_reverse=weight,
        entropy_temperature=positive,
        gate=st.sampled_from(["hard", "soft"]),
        sharpness=positive,
        teacher_term=st.sampled_from(["student_to_teacher", "teacher_to_student", "balanced", "none"]),
    ),
    st.just(CE()),
    st.builds(KD, **common, weight=weight),
    st.builds(DML, weight=weight),
    st.builds(KDCL, ensemble=st.sampled_from(["min_logit", "naive"]), temperature=positive, weight=weight),
    st.just(SwitOKD()),
    st.builds(Competitive, temperature=positive, weight=weight),
    st.builds(Focal, gamma_low=positive, gamma_high=weight, threshold=st.floats(0, 1)),
    st.builds(MDCA, weight=weight),
    st.builds(Jeffreys, **both),
    st.builds(JSD, **both),
    st.builds(Skew, **both, skew=st.floats(0, 0.99)),
    st.builds(AKL, **both, head_mass=st.floats(0.05, 0.95)),
    st.builds(ABKD, **both, alpha=st.floats(0.05, 2), beta=st.one_of(st.just(0.0), st.floats(0.05, 2))),
)


@settings(max_examples=300, deadline=None)
@given(objectives, batches)
def test_any_parameters_and_logits_equal_the_reference(objective: Objective, made: tuple[Networks, np.ndarray]) -> None:
    check(objective, *made)


@settings(max_examples=100, deadline=None)
@given(batches, positive)
def test_linear_kdcl_finds_the_convex_minimum(made: tuple[Networks, np.ndarray], temperature: float) -> None:
    check(KDCL(ensemble="linear", temperature=temperature), *made)


def test_the_reference_agrees_with_scipy() -> None:
    z, y = batch(samples=50)
    q, p = reference.softmax(z.students[0], 1.7), reference.softmax(z.teacher, 1.7)
    middle = (p + q) / 2
    same = {
        "softmax": (p, scipy.special.softmax(z.teacher / 1.7, axis=1)),
        "kl": (reference.kl(p, q), scipy.special.rel_entr(p, q).sum(axis=1)),
        "entropy": (reference.shannon(p), scipy.stats.entropy(p, axis=1)),
        "jeffreys": (reference.jeffreys(p, q), scipy.stats.entropy(p, q, axis=1) + scipy.stats.entropy(q, p, axis=1)),
        "jsd": (
            reference.jsd(p, q),
            (scipy.special.rel_entr(p, middle) + scipy.special.rel_entr(q, middle)).sum(axis=1) / 2,
        ),
        "skew": (reference.skew(p, q, 0.2), scipy.special.rel_entr(p, 0.2 * p + 0.8 * q).sum(axis=1)),
        "ce": (
            reference.cross_entropy(z.teacher, y),
            -scipy.special.log_softmax(z.teacher, axis=1)[np.arange(50), y],
        ),
        # D^(1, 1) is half the squared distance: a case of the family with a formula of its own.
        "alpha_beta": (reference.alpha_beta(p, q, 1, 1), ((p - q) ** 2).sum(axis=1) / 2),
    }
    for name, (ours, peers) in same.items():
        np.testing.assert_allclose(ours, peers, rtol=1e-12, atol=1e-14, err_msg=name)


# Worked by hand from p_s = (1/2, 1/2), p_t = (3/4, 1/4), y = 0, temperature 1:
FORWARD = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)  # KL(p_t‖p_s)
REVERSE = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)  # KL(p_s‖p_t)
# m = (5/8, 3/8)
MIDDLE = (3 / 4 * math.log(6 / 5) + 1 / 4 * math.log(2 / 3) + 1 / 2 * math.log(4 / 5) + 1 / 2 * math.log(4 / 3)) / 2
STUDENT_CE, TEACHER_CE = math.log(2), math.log(4 / 3)
BY_HAND: list[tuple[Objective, float, float]] = [
    # H_s = ln 2 > H_t: the reverse term counts twice.
    (BDKD(), STUDENT_CE + FORWARD + 2 * REVERSE, TEACHER_CE + REVERSE),
    # The teacher's view: the student is the less certain, so the teacher's forward term KL(p_s‖p_t) is boosted.
    (
        BDKD(nu_forward=5, teacher_term="balanced"),
        STUDENT_CE + FORWARD + 2 * REVERSE,
        TEACHER_CE + 5 * REVERSE + FORWARD,
    ),
    (CE(), STUDENT_CE, TEACHER_CE),
    (KD(temperature=1), 0.1 * STUDENT_CE + 0.9 * FORWARD, 0),
    (DML(), STUDENT_CE + FORWARD, TEACHER_CE + REVERSE),
    # z_s − z_s,y = (0, 0), z_t − z_t,y = (0, −ln 3): the least is the teacher's; so are naive's and linear's choice.
    *[(KDCL(ensemble=kind, temperature=1), STUDENT_CE + FORWARD, TEACHER_CE) for kind in ("min_logit", "naive")],
    (KDCL(ensemble="linear", temperature=1), STUDENT_CE + FORWARD, TEACHER_CE),
    # G = 1/2, a = 1, b = 1/2, δ = 1 − e^(−1/3)/2 = 0.64 > G: both learn.
    (SwitOKD(), STUDENT_CE + FORWARD, TEACHER_CE + REVERSE),
    # The teacher has the lower cross-entropy.
    (Competitive(), STUDENT_CE + FORWARD, TEACHER_CE),
    (Focal(), STUDENT_CE / 2**3, TEACHER_CE / 4**3),
    (Focal(threshold=0.6), STUDENT_CE / 2**5, TEACHER_CE / 4**3),
    (Focal(gamma_low=1, gamma_high=0.5, threshold=0.5), STUDENT_CE / 2**0.5, TEACHER_CE / 2),
    # Off by 1/2 and by 1/4 in both classes.
    (MDCA(weight=3), STUDENT_CE + 3 / 2, TEACHER_CE + 3 / 4),
    (Jeffreys(), STUDENT_CE + FORWARD + REVERSE, TEACHER_CE + REVERSE),
    (JSD(), STUDENT_CE + MIDDLE, TEACHER_CE + REVERSE),
    # λp_t + (1−λ)p_s = (5/8, 3/8) at λ = 1/2
    (Skew(skew=0.5), STUDENT_CE + 3 / 4 * math.log(6 / 5) + 1 / 4 * math.log(2 / 3), TEACHER_CE + REVERSE),
    # The head is class 0, the tail class 1, each with a gap of 1/4: half and half.
    (AKL(), STUDENT_CE + FORWARD / 2 + REVERSE / 2, TEACHER_CE + REVERSE),
    (ABKD(alpha=1, beta=1), STUDENT_CE + 1 / 16, TEACHER_CE + REVERSE),
    (ABKD(alpha=1, beta=0), STUDENT_CE + FORWARD, TEACHER_CE + REVERSE),
    (ABKD(alpha=0, beta=1), STUDENT_CE + REVERSE, TEACHER_CE + REVERSE),
]


@pytest.mark.parametrize(("objective", "student_loss", "teacher_loss"), BY_HAND)
def test_two_classes_worked_by_hand(objective: Objective, student_loss: float, teacher_loss: float) -> None:
    student, teacher = torch.zeros(1, 2).double(), torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    losses = objective(student, teacher, torch.tensor([0]))
    bound = 3e-6 if "linear" in repr(objective) else 1e-14
    assert losses.student_loss.item() == pytest.approx(student_loss, abs=bound)
    assert losses.teacher_loss.item() == pytest.approx(teacher_loss, abs=bound)
    assert losses.diagnostics["student/entropy"].item() == pytest.approx(math.log(2), abs=1e-14)
    assert losses.diagnostics["teacher/entropy"].item() == pytest.approx(0.5623351446188083, abs=1e-14)


def test_the_teacher_of_switokd_waits_when_it_is_far_ahead() -> None:
    # p_s = (1/5, 4/5), p_t = (4/5, 1/5), y = 0: G = 6/5, a = 8/5, b = 2/5, δ = 8/5 − e^(−1/5)·2/5 = 1.2725 > G.
    far = torch.tensor([[math.log(4), 0.0]], dtype=torch.float64)
    losses = SwitOKD()(far.flip(1), far, torch.tensor([0]))
    assert losses.diagnostics["teacher/paused"] == 0
    assert losses.teacher_loss > 0
    # p_s = (1/5, 2/5, 2/5), p_t = (4/5, 0.19, 0.01): a and b are the same, G = 0.6 + 0.21 + 0.39 = 6/5 again; but
    # with p_s = (1/5, 0.79, 0.01), p_t = (2/5, 0.01, 0.59): G = 0.2 + 0.78 + 0.58 = 1.56, a = 1.6, b = 1.2,
    # δ = 1.6 − e^(−3/7)·1.2 = 0.818 < G.
    student, teacher = torch.tensor([[0.2, 0.79, 0.01]]).log(), torch.tensor([[0.4, 0.01, 0.59]]).log()
    losses = SwitOKD()(student, teacher, torch.tensor([0]))
    assert losses.diagnostics["teacher/paused"] == 1
    assert losses.teacher_loss == 0
    assert losses.student_loss > 1
    # The same with the networks swapped: G > δ, but the teacher is the one behind (b > a), so it learns.
    assert SwitOKD()(teacher, student, torch.tensor([0])).diagnostics["teacher/paused"] == 0


def test_the_student_of_a_competition_teaches_where_it_does_better() -> None:
    # Cross-entropies ln 2 and (ln 4/3 + ln 4)/2 = ln(4/√3) > ln 2.
    student, teacher = torch.zeros(2, 2).double(), torch.tensor([[math.log(3), 0.0]] * 2, dtype=torch.float64)
    losses = Competitive()(student, teacher, torch.tensor([0, 1]))
    assert losses.student_loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert losses.teacher_loss.item() == pytest.approx(math.log(4 / 3**0.5) + REVERSE, rel=1e-14)
    assert losses.diagnostics["student/teaches"] == 1
    assert losses.diagnostics["teacher/teaches"] == 0


def test_errors_of_opposite_sign_cancel_in_mdca() -> None:
    # The teacher says (3/4, 1/4) of both samples, whose targets are 0, 1: its mean is off by 1/4 in both classes,
    # though it is off by 1/4 and 3/4 sample by sample. The student says (1/2, 1/2), which is right on the mean.
    student, teacher = torch.zeros(2, 2).double(), torch.tensor([[math.log(3), 0.0]] * 2, dtype=torch.float64)
    losses = MDCA(weight=8)(student, teacher, torch.tensor([0, 1]))
    assert losses.student_loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert losses.teacher_loss.item() == pytest.approx(math.log(4 / 3**0.5) + 8 / 4, rel=1e-14)
    assert losses.diagnostics["student/mdca"].item() == 0
    assert losses.diagnostics["teacher/mdca"].item() == pytest.approx(1 / 4, rel=1e-15)


def test_both_sides_of_every_choice_occur_in_the_batches() -> None:
    z, y = batch(7)
    found = losses_of(BDKD(), z, y).diagnostics
    assert 0 < found["student/boosted_forward"] < 1
    assert found["student/boosted_forward"] + found["student/boosted_reverse"] == 1
    best = np.argmin([reference.cross_entropy(each, y) for each in z.all], axis=0)
    assert 0 < best.mean() < 1
    mixed = [
        np.linalg.lstsq(np.stack([s, t]).T, reference.linear_ensemble(np.stack([s, t]), np.eye(7)[k]))[0][0]
        for s, t, k in zip(z.students[0], z.teacher, y, strict=True)
    ]
    assert any(0.05 < share < 0.95 for share in mixed)  # not only corners of the simplex
    paused = {
        reference.switokd_teacher_waits(made.students[0], made.teacher, made_targets)
        for made, made_targets in (batch(7, *shape) for shape in BATCHES)
    }
    assert paused == {False, True}
    made = [batch(7, *shape) for shape in BATCHES]
    assert {reference.competition_winner(z.all, y) for z, y in made} == {0, 1}
    unsure = [reference.softmax(z.teacher)[range(len(y)), y] < Focal().threshold for z, y in made]
    assert 0 < np.concatenate(unsure).mean() < 1


def test_losses_are_a_named_triple_of_scalars() -> None:
    losses = losses_of(BDKD(), *batch())
    assert isinstance(losses, Losses)
    assert losses._fields == ("student_loss", "teacher_loss", "diagnostics")
    assert all(value.shape == () for value in scalars(losses).values())
