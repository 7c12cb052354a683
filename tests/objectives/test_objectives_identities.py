"""What must hold whatever the numbers: symmetries, limits, bounds; and values that must stay what they were."""

import dataclasses
import math

import numpy as np
import numpy_reference as reference
import pytest
import torch
from numpy_reference import Networks
from objective_cases import VARIANTS, batch, every_variant, gradients_of, leaves, losses_of, scalars, tolerance
from scipy.special import expit

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
    Losses,
    Objective,
    Skew,
    SwitOKD,
)
from bdkd_dist.objectives.divergences import alpha_beta

# Worked out with 40 digits of mpmath (bdkd's of decimal) from the formulas, apart from torch, NumPy and the package:
# student [1, 0.5, −1], [3, 0, 0], [0.2, 0.1, 0]; teacher [2, −0.5, 0], [0, 1, 0.5], [0, 0, 4]; targets 0, 1, 2.
BDKD_MIXED = BDKD(
    nu_forward=3,
    nu_reverse=1.5,
    temperature=4,
    entropy_temperature=2,
    ce_weight=0.5,
    student_weight=0.9,
    teacher_weight=0.1,
)
FROZEN: list[tuple[Objective, float, float]] = [
    (BDKD(), 4.8415592068080522, 1.4117268895565854),
    (BDKD_MIXED, 4.6743801860374466, 0.29258670163402424),
    (BDKD(gate="soft", teacher_term="balanced", nu_forward=3), 5.3171464502302586, 4.1873394279848872),
    (BDKD(temperature=2, teacher_term="teacher_to_student"), 5.6397175113399500, 1.5905666377473266),
    (BDKD(teacher_term="none", student_weight=0.25), 2.4233454827750620, 0.30432668910318160),
    (CE(), 1.61727424143073189, 0.304326689103181604),
    (KD(), 1.41025940103113769, 0.0),
    (DML(weight=0.5), 2.07701610843714967, 0.858026789329883525),
    (SwitOKD(), 2.53675797544356746, 0.0),  # G = 1.11 > δ = 1.02 and b = 0.47 < a = 1.39: the teacher waits
    (Competitive(temperature=2, weight=0.5), 2.26039421575280437, 0.304326689103181604),
    (Focal(), 0.969653814082792051, 0.0276307576535828034),
    (MDCA(weight=2), 1.99536552702689274, 0.485849279635557161),
    (Jeffreys(temperature=2), 4.27983943967910858, 1.68065193870741335),
    (JSD(student_weight=3), 2.2546227402310653, 1.41172688955658545),
    (Skew(), 2.30235476843700743, 1.41172688955658545),
    (AKL(temperature=1.5), 2.85117121368339213, 1.60818459769622747),
    (AKL(head_mass=0.9), 2.63299735379376008, 1.41172688955658545),
    (ABKD(), 2.39863804982049753, 1.41172688955658545),
    (ABKD(alpha=0, beta=0.4), 4.36950021394160507, 1.41172688955658545),
]

# With student [1, 0.5, −1], [2, 0, 1.5], [0.2, 0.1, 0]; teacher [2, −0.5, 0], [2, 1.5, −1], [0, 0, 4]; targets 0, 0, 1:
# linear's share of the student is 0, 0.497293594058502, 1.
FROZEN_KDCL: list[tuple[Objective, float, float]] = [
    (KDCL(), 1.01974475970451465, 2.31630235292911759),
    (KDCL(ensemble="naive"), 1.15004785064972452, 2.2566230615311828),
    (KDCL(ensemble="linear"), 0.940398324210393356, 2.3302001877188229),
]


@pytest.mark.parametrize(("objective", "student_loss", "teacher_loss"), FROZEN)
def test_values_stay_what_they_were(objective: Objective, student_loss: float, teacher_loss: float) -> None:
    student = torch.tensor([[1.0, 0.5, -1.0], [3.0, 0.0, 0.0], [0.2, 0.1, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, -0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 4.0]], dtype=torch.float64)
    losses = objective(student, teacher, torch.tensor([0, 1, 2]))
    assert losses.student_loss.item() == pytest.approx(student_loss, rel=1e-14)
    assert losses.teacher_loss.item() == pytest.approx(teacher_loss, rel=1e-14)


@pytest.mark.parametrize(("objective", "student_loss", "teacher_loss"), FROZEN_KDCL)
def test_values_of_kdcl_stay_what_they_were(objective: Objective, student_loss: float, teacher_loss: float) -> None:
    student = torch.tensor([[1.0, 0.5, -1.0], [2.0, 0.0, 1.5], [0.2, 0.1, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, -0.5, 0.0], [2.0, 1.5, -1.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    losses = objective(student, teacher, torch.tensor([0, 0, 1]))
    bound = 1e-6 if "linear" in repr(objective) else 1e-14
    assert losses.student_loss.item() == pytest.approx(student_loss, rel=bound)
    assert losses.teacher_loss.item() == pytest.approx(teacher_loss, rel=bound)


def close(found: Losses, expected: Losses, bound: float = 1e-12) -> None:
    torch.testing.assert_close(scalars(found), scalars(expected), rtol=bound, atol=bound)


@every_variant
@pytest.mark.parametrize("soft", [False, True])
def test_a_constant_added_to_all_logits_changes_nothing(objective: Objective, soft: bool) -> None:
    z, y = batch(7, soft=soft)
    rows = np.linspace(-40, 50, 16)[:, None]  # another constant for each sample and network
    shifted = Networks([z.students[0] + rows], z.teacher - 30 - rows)
    close(losses_of(objective, z, y), losses_of(objective, shifted, y), max(tolerance(objective), 1e-10))


@every_variant
@pytest.mark.parametrize("soft", [False, True])
def test_the_order_of_classes_and_samples_does_not_matter(objective: Objective, soft: bool) -> None:
    z, y = batch(7, soft=soft)
    rng = np.random.default_rng(1)
    rows, classes = rng.permutation(16), rng.permutation(7)
    mixed = Networks([z.students[0][rows][:, classes]], z.teacher[rows][:, classes])
    targets = y[rows][:, classes] if soft else np.argsort(classes)[y[rows]]
    close(losses_of(objective, z, y), losses_of(objective, mixed, targets), max(tolerance(objective), 1e-10))


NETWORKS_ALONE = {"focal", "mdca"}
"""Objectives by which no network learns from another, and which are not cross-entropy."""

LEARN_FROM_OTHERS = {name: objective for name, objective in VARIANTS.items() if objective.name not in NETWORKS_ALONE}


@pytest.mark.parametrize("objective", LEARN_FROM_OTHERS.values(), ids=LEARN_FROM_OTHERS)
def test_networks_that_agree_have_no_divergence(objective: Objective) -> None:
    z, y = batch()
    same = Networks([z.teacher], z.teacher + 3)
    losses, ce = losses_of(objective, same, y), reference.cross_entropy(z.teacher, y).mean()
    weight = getattr(objective, "ce_weight", 1.0)
    # min_logit and its kin: the ensemble of equal networks is each of them.
    assert losses.student_loss.item() == pytest.approx(weight * ce, rel=1e-13)
    assert losses.teacher_loss.item() == pytest.approx(weight * ce if objective.name != "kd" else 0, rel=1e-13)
    assert losses.diagnostics["student/forward_kl"].item() == pytest.approx(0, abs=1e-14)


def test_weights_of_one_give_the_jeffreys_divergence() -> None:
    z, y = batch()
    q, p = reference.softmax(z.students[0]), reference.softmax(z.teacher)
    expected = ((p - q) * np.log(p / q)).sum(axis=1).mean()
    for gate in ("hard", "soft"):
        for objective in (BDKD(nu_forward=1, nu_reverse=1, ce_weight=0, gate=gate), Jeffreys(ce_weight=0)):
            assert losses_of(objective, z, y).student_loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_swapping_the_networks_swaps_the_gate(gate: str) -> None:
    z, y = batch()
    objective = BDKD(nu_forward=3, nu_reverse=1.5, gate=gate, teacher_term="balanced")
    ours, swapped = losses_of(objective, z, y), losses_of(objective, Networks([z.teacher], z.students[0]), y)
    assert ours.student_loss.item() == pytest.approx(swapped.teacher_loss.item(), rel=1e-14)
    assert ours.teacher_loss.item() == pytest.approx(swapped.student_loss.item(), rel=1e-14)
    assert ours.diagnostics["student/boosted_forward"] == swapped.diagnostics["student/boosted_reverse"] != 0.5


def test_a_tie_boosts_neither_term() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    permuted = logits.roll(1, dims=1)
    tied = BDKD(nu_forward=9, nu_reverse=9)(logits, permuted, torch.tensor([0]))
    plain = BDKD(nu_forward=1, nu_reverse=1)(logits, permuted, torch.tensor([0]))
    assert tied.diagnostics["student/boosted_forward"] == tied.diagnostics["student/boosted_reverse"] == 0
    assert tied.student_loss == plain.student_loss
    assert plain.diagnostics["student/forward_kl"] > 0.1


def test_a_soft_gate_closes_in_on_the_hard_gate_as_it_sharpens() -> None:
    z, y = batch()
    hard = BDKD(nu_forward=3, nu_reverse=4, teacher_term="balanced")
    goal, bounds = losses_of(hard, z, y).student_loss.item(), []
    q, p = reference.softmax(z.students[0]), reference.softmax(z.teacher)
    gap = np.abs(reference.shannon(q) - reference.shannon(p))
    for sharpness in (1.0, 10.0, 100.0, 1e3, 1e6):
        soft = losses_of(dataclasses.replace(hard, gate="soft", sharpness=sharpness), z, y)
        # Either weight is off by (ν − 1)·σ(−k·|H_s − H_t|).
        bounds.append(((2 * reference.kl(p, q) + 3 * reference.kl(q, p)) * expit(-sharpness * gap)).mean())
        assert abs(soft.student_loss.item() - goal) <= bounds[-1] + 1e-14
        assert abs(soft.student_loss.item() - goal) > 0.1 * bounds[-1] or sharpness > 10
    assert bounds[0] > 0.1
    assert bounds[-1] < 1e-14
    close(soft, losses_of(hard, z, y), 1e-14)


def test_a_blunt_soft_gate_weighs_both_terms_halfway() -> None:
    z, y = batch()
    blunt = losses_of(BDKD(nu_forward=3, nu_reverse=5, gate="soft", sharpness=1e-12), z, y)
    q, p = reference.softmax(z.students[0]), reference.softmax(z.teacher)
    expected = (reference.cross_entropy(z.students[0], y) + 2 * reference.kl(p, q) + 3 * reference.kl(q, p)).mean()
    assert blunt.student_loss.item() == pytest.approx(expected, rel=1e-10)


def student_divergence(objective: Objective, z: Networks) -> float:
    """The student's divergence alone."""
    objective = dataclasses.replace(objective, ce_weight=0)
    return losses_of(objective, z, np.zeros(len(z.teacher), dtype=np.int64)).student_loss.item()


def test_jsd_is_symmetric_and_at_most_log_2() -> None:
    z, _ = batch(scale=20)
    swapped = Networks([z.teacher], z.students[0])
    assert student_divergence(JSD(), z) == pytest.approx(student_divergence(JSD(), swapped), rel=1e-14)
    assert 0.5 * math.log(2) < student_divergence(JSD(), z) < math.log(2)
    apart = torch.tensor([[200.0, 0.0]], dtype=torch.float64)
    losses = JSD(ce_weight=0)(apart, apart.flip(1), torch.tensor([0]))
    assert losses.student_loss.item() == pytest.approx(math.log(2), rel=1e-15)


def test_skew_lies_between_forward_kl_and_none() -> None:
    z, _ = batch()
    q, p = reference.softmax(z.students[0]), reference.softmax(z.teacher)
    values = [student_divergence(Skew(skew=share), z) for share in (0, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9)]
    assert values[0] == pytest.approx(reference.kl(p, q).mean(), rel=1e-13)
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-8)
    # DistiLLM's bound: KL(p‖λp + (1−λ)q) ≤ −log λ, however far apart the networks are.
    far, _ = batch(scale=100)
    assert 2 < student_divergence(Skew(skew=0.1), far) <= -math.log(0.1)


def test_the_shares_of_akl_go_by_the_teachers_head() -> None:
    # p_t = (0.4, 0.35, 0.15, 0.1), cumulative 0.4, 0.75, 0.9, 1; its gaps to p_s are 0.3, 0.15, 0.15, 0.3.
    p, q = np.array([[0.4, 0.35, 0.15, 0.1]]), np.array([[0.1, 0.2, 0.3, 0.4]])
    forward, reverse = reference.kl(p, q)[0], reference.kl(q, p)[0]
    shares = {0.3: 1 / 3, 0.5: 1 / 3, 0.74: 1 / 3, 0.76: 1 / 2, 0.95: 2 / 3}  # the first class is always of the head
    for head_mass, share in shares.items():
        found = student_divergence(AKL(head_mass=head_mass), Networks([np.log(q)], np.log(p)))
        assert found == pytest.approx(share * forward + (1 - share) * reverse, rel=1e-13), head_mass
        np.testing.assert_allclose(reference.head_share(p, q, head_mass), share, rtol=1e-13)


def test_a_class_that_fills_the_head_of_akl_to_the_brim_belongs_to_it() -> None:
    # p_t = 1/4 each, to the bit, and p_s 0.15 away from each, so that the order of equals does not matter.
    q = np.array([[0.4, 0.4, 0.1, 0.1]])
    forward, reverse = (f(np.full((1, 4), 0.25), q)[0] for f in (reference.kl, lambda p, q: reference.kl(q, p)))
    for head_mass, share in ((0.25, 1 / 4), (0.5, 1 / 2), (0.75, 3 / 4)):
        found = student_divergence(AKL(head_mass=head_mass), Networks([np.log(q)], np.zeros((1, 4))))
        assert found == pytest.approx(share * forward + (1 - share) * reverse, rel=1e-13), head_mass


def test_abkd_has_the_divergences_as_its_corners_and_is_continuous_there() -> None:
    z, _ = batch()
    q, p = reference.softmax(z.students[0]), reference.softmax(z.teacher)
    forward, reverse = reference.kl(p, q).mean(), reference.kl(q, p).mean()
    assert student_divergence(ABKD(alpha=1, beta=0), z) == pytest.approx(forward, rel=1e-13)
    assert student_divergence(ABKD(alpha=0, beta=1), z) == pytest.approx(reverse, rel=1e-13)
    for small in (1e-3, 1e-5):
        assert student_divergence(ABKD(alpha=1, beta=small), z) == pytest.approx(forward, rel=10 * small)
        assert student_divergence(ABKD(alpha=small, beta=1), z) == pytest.approx(reverse, rel=10 * small)
        for alpha, beta in ((0.4, 0.0), (0.0, 0.4)):
            at = student_divergence(ABKD(alpha=alpha, beta=beta), z)
            near = student_divergence(ABKD(alpha=max(alpha, small), beta=max(beta, small)), z)
            assert near == pytest.approx(at, rel=10 * small)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1e-3), (1, 1e-6), (1e-6, 1), (1e-3, 1.0), (0.9, 0.2), (1e-2, 1e-2)])
def test_abkd_keeps_its_digits_in_float32_near_the_corners(alpha: float, beta: float) -> None:
    z, _ = batch(5, samples=64, classes=10, scale=2.0)
    student, teacher = (torch.tensor(each).log_softmax(1) for each in z.all)
    p, q = (each.numpy().astype(np.longdouble) for each in (teacher, student))
    total = np.longdouble(alpha) + np.longdouble(beta)
    exact = alpha / total * np.exp(total * p) + beta / total * np.exp(total * q) - np.exp(alpha * p + beta * q)
    expected = (exact.sum(1) / (np.longdouble(alpha) * np.longdouble(beta))).astype(float)
    found = alpha_beta(teacher.float(), student.float(), alpha, beta).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_abkd_swaps_with_its_parameters() -> None:
    z, _ = batch()
    swapped = Networks([z.teacher], z.students[0])
    for alpha, beta in ((0.9, 0.2), (1.3, 0.0), (0.5, 0.5)):
        ours = student_divergence(ABKD(alpha=alpha, beta=beta), z)
        assert ours == pytest.approx(student_divergence(ABKD(alpha=beta, beta=alpha), swapped), rel=1e-13)


def test_min_logit_keeps_the_target_class_at_zero_and_no_class_above_any_network() -> None:
    z, y = batch()
    together = reference.ensemble("min_logit", z.all, y)
    np.testing.assert_array_equal(together[np.arange(16), y], 0)
    ce = losses_of(KDCL(), z, y).diagnostics["ensemble/ce"].item()
    each = [reference.cross_entropy(own, y) for own in z.all]
    assert ce <= np.min(each, axis=0).mean()  # it is at least as sure of the target as the best network
    assert ce == pytest.approx(reference.cross_entropy(together, y).mean(), rel=1e-13)


def test_linear_is_no_worse_than_naive() -> None:
    z, y = batch(7, 60)
    naive, linear = (
        losses_of(KDCL(ensemble=kind), z, y).diagnostics["ensemble/ce"].item() for kind in ("naive", "linear")
    )
    assert linear < naive


def test_the_teacher_of_kd_has_no_loss_and_no_gradient() -> None:
    z, y = batch()
    (student,), teacher = leaves(z)
    losses = KD()(student, teacher, torch.tensor(y))
    assert losses.teacher_loss == 0
    (losses.student_loss + losses.teacher_loss).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not KD.teacher_learns
    assert all(kind.teacher_learns for kind in OBJECTIVES.values() if kind is not KD)


@pytest.mark.parametrize("objective", [CE(), PSKD(past_share=0.3), Focal(), MDCA()])
def test_networks_alone_do_not_look_at_each_other(objective: Objective) -> None:
    z, y = batch()
    other, _ = batch(1)
    ours, others = losses_of(objective, z, y), losses_of(objective, Networks(z.students, other.teacher), y)
    assert ours.student_loss == others.student_loss
    assert ours.teacher_loss != others.teacher_loss


@pytest.mark.parametrize("soft", [False, True])
def test_a_focal_loss_without_gamma_is_cross_entropy(soft: bool) -> None:
    for z, y in (batch(soft=soft), batch(3, scale=1e4, soft=soft)):
        close(losses_of(Focal(gamma_low=0, gamma_high=0), z, y), losses_of(CE(), z, y), 1e-15)
        expected = gradients_of(CE(), z, y)
        for found, each in zip(gradients_of(Focal(gamma_low=0, gamma_high=0), z, y), expected, strict=True):
            np.testing.assert_allclose(found, each, rtol=0, atol=1e-16)


def test_a_focal_loss_takes_its_gamma_by_the_targets_probability() -> None:
    # Targets of 0.1, 0.2 to the bit and 0.6; a probability of the threshold itself has the lower γ.
    p = np.array([[0.1, 0.9], [0.2, 0.8], [0.6, 0.4]])
    z = torch.tensor(p).log()
    threshold = float(torch.log_softmax(z, 1)[1, 0].exp())
    losses = Focal(gamma_low=4, gamma_high=1.5, threshold=threshold)(z, z, torch.tensor([0, 0, 0]))
    expected = [-(0.9**4) * math.log(0.1), -(0.8**1.5) * math.log(0.2), -(0.4**1.5) * math.log(0.6)]
    assert losses.student_loss.item() == pytest.approx(sum(expected) / 3, rel=1e-13)


def test_mdca_has_the_slope_of_its_definition() -> None:
    # Of the mean over the batch, in which samples stand together: one logit at a time, by central differences.
    z, y = batch(7, samples=5, classes=4)
    one_hot, step = np.eye(4)[y], 1e-6
    numeric = np.empty_like(z.teacher)
    for i, k in np.ndindex(numeric.shape):
        move = np.zeros_like(z.teacher)
        move[i, k] = step
        above, below = (reference.mdca(reference.softmax(z.teacher + sign * move), one_hot) for sign in (1, -1))
        numeric[i, k] = (above - below) / (2 * step)
    found = gradients_of(MDCA(weight=1), z, y)[1] - gradients_of(CE(), z, y)[1]
    np.testing.assert_allclose(found, numeric, atol=1e-9)
    assert np.abs(numeric).max() > 1e-3


def test_only_the_winner_of_a_competition_learns_from_labels_alone() -> None:
    z, y = batch(5, students=2)
    ce = [reference.cross_entropy(own, y).mean() for own in z.all]
    found = losses_of(Competitive(), z, y).diagnostics
    for name, own in zip(("student_1", "student_2", "teacher"), ce, strict=True):
        assert found[f"{name}/teaches"] == (own == min(ce))
        assert (found[f"{name}/loss"].item() == pytest.approx(own, rel=1e-13)) == (own == min(ce))


def test_the_balanced_teacher_term_weights_by_the_teachers_entropy() -> None:
    # The teacher is the less certain of the two: its reverse term KL(p_t‖p_s) is the boosted one.
    student, teacher = torch.tensor([[math.log(3), 0.0]]).double(), torch.zeros(1, 2).double()
    losses = BDKD(ce_weight=0, nu_forward=5, teacher_term="balanced")(student, teacher, torch.tensor([0]))
    assert losses.teacher_loss.item() == pytest.approx(0.130812035941137 + 2 * 0.143841036225890, abs=1e-6)
