"""BD-KD against an independent NumPy float64 reference, its identities, hand-worked and frozen values."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bdkd_dist.errors import UserError
from bdkd_dist.objectives import BDKD, Losses

Array = NDArray[np.float64]


def softmax(z: Array, temperature: float = 1.0) -> Array:
    e = np.exp((z - z.max(axis=1, keepdims=True)) / temperature)
    return e / e.sum(axis=1, keepdims=True)


def shannon(p: Array) -> Array:
    return -(p * np.log(p)).sum(axis=1)


def kl(p: Array, q: Array) -> Array:
    return (p * np.log(p / q)).sum(axis=1)


def weights(objective: BDKD, own_entropy: Array, other_entropy: Array) -> tuple[Array, Array]:
    """(w_f, w_r) of a network, as the formulas say it, case by case."""
    if objective.gate == "hard":
        w_f = np.where(other_entropy > own_entropy, objective.nu_forward, 1.0)
        w_r = np.where(own_entropy > other_entropy, objective.nu_reverse, 1.0)
        return w_f, w_r
    k = objective.sharpness
    w_f = 1 + (objective.nu_forward - 1) / (1 + np.exp(-k * (other_entropy - own_entropy)))
    w_r = 1 + (objective.nu_reverse - 1) / (1 + np.exp(-k * (own_entropy - other_entropy)))
    return w_f, w_r


def reference(objective: BDKD, z_s: Array, z_t: Array, y: NDArray[Any]) -> tuple[float, float, dict[str, float]]:
    """Both losses and the diagnostics from probabilities, in float64 (for logits of moderate size)."""
    tau = objective.temperature
    one_hot = np.eye(z_s.shape[1])[y] if y.ndim == 1 else y
    ce_s, ce_t = (-(one_hot * np.log(softmax(z))).sum(axis=1) for z in (z_s, z_t))
    p_s, p_t = softmax(z_s, tau), softmax(z_t, tau)
    h_s, h_t = (shannon(softmax(z, objective.entropy_temperature)) for z in (z_s, z_t))
    forward, reverse = kl(p_t, p_s), kl(p_s, p_t)
    w_f, w_r = weights(objective, h_s, h_t)
    mirrored_f, mirrored_r = weights(objective, h_t, h_s)
    teacher_term = {
        "student_to_teacher": reverse,
        "teacher_to_student": forward,
        "balanced": mirrored_f * reverse + mirrored_r * forward,
        "none": np.zeros_like(forward),
    }[objective.teacher_term]
    loss_s = (
        objective.ce_weight * ce_s.mean() + objective.student_weight * tau**2 * (w_f * forward + w_r * reverse).mean()
    )
    loss_t = objective.ce_weight * ce_t.mean() + objective.teacher_weight * tau**2 * teacher_term.mean()
    diagnostics = {
        "student/ce": ce_s.mean(),
        "teacher/ce": ce_t.mean(),
        "student/entropy": h_s.mean(),
        "teacher/entropy": h_t.mean(),
        "forward_kl": forward.mean(),
        "reverse_kl": reverse.mean(),
        "boosted_forward": np.mean(h_t > h_s),
        "boosted_reverse": np.mean(h_s > h_t),
    }
    return loss_s, loss_t, diagnostics


def batch(seed: int = 0, samples: int = 16, classes: int = 7, scale: float = 2.0) -> tuple[Array, Array, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    z_s, z_t = (scale * rng.normal(size=(samples, classes)) for _ in range(2))
    return z_s, z_t, rng.integers(classes, size=samples)


def leaves(z_s: Array, z_t: Array, y: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = (torch.tensor(z, requires_grad=True) for z in (z_s, z_t))
    return student, teacher, torch.tensor(y)


def gradients(objective: BDKD, z_s: Array, z_t: Array, y: NDArray[Any]) -> tuple[Array, Array]:
    """Gradients of each loss by its own logits, times B: per sample, as the formulas give them."""
    student, teacher, targets = leaves(z_s, z_t, y)
    losses = objective(student, teacher, targets)
    (by_student,) = torch.autograd.grad(losses.student_loss, student, retain_graph=True)
    (by_teacher,) = torch.autograd.grad(losses.teacher_loss, teacher)
    return len(y) * by_student.numpy(), len(y) * by_teacher.numpy()


VARIANTS = [
    BDKD(),
    BDKD(nu_forward=3, nu_reverse=0.5, temperature=2.5, entropy_temperature=4),
    BDKD(temperature=4, entropy_temperature=4, teacher_term="teacher_to_student"),
    BDKD(temperature=0.5, teacher_term="balanced", nu_forward=1.5, nu_reverse=3),
    BDKD(ce_weight=0.3, student_weight=0.7, teacher_weight=1.9, teacher_term="none"),
    BDKD(ce_weight=0.3, student_weight=0.7, teacher_weight=1.9, nu_forward=0, nu_reverse=0),
    BDKD(gate="soft", sharpness=1.7, nu_forward=3, nu_reverse=2, entropy_temperature=2),
    BDKD(gate="soft", teacher_term="balanced", nu_forward=3, nu_reverse=0.25, temperature=3),
]


@pytest.mark.parametrize("objective", VARIANTS)
@pytest.mark.parametrize("soft_targets", [False, True])
def test_losses_and_diagnostics_equal_the_numpy_reference(objective: BDKD, soft_targets: bool) -> None:
    z_s, z_t, y = batch()
    targets = softmax(batch(seed=1)[0]) if soft_targets else y
    expected_s, expected_t, expected = reference(objective, z_s, z_t, targets)
    losses = objective(*leaves(z_s, z_t, targets))
    assert losses.student_loss.dtype == torch.float64
    assert losses.student_loss.item() == pytest.approx(expected_s, rel=1e-12)
    assert losses.teacher_loss.item() == pytest.approx(expected_t, rel=1e-12)
    assert losses.diagnostics.keys() == expected.keys()
    for name, value in losses.diagnostics.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-12), name
        assert value.shape == ()
        assert not value.requires_grad
    assert 0 < expected["boosted_forward"] < 1  # the batch opens both gates


def test_a_two_class_batch_worked_by_hand() -> None:
    # p_s = (1/2, 1/2), p_t = (3/4, 1/4), y = 0: H_s = ln 2 > H_t, so the reverse term counts twice.
    # KL(p_t‖p_s) = 3/4·ln(3/2) + 1/4·ln(1/2), KL(p_s‖p_t) = 1/2·ln(2/3) + 1/2·ln 2.
    forward, reverse = 0.130812035941137, 0.143841036225890
    losses = BDKD()(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), torch.tensor([0]))
    assert losses.student_loss.item() == pytest.approx(math.log(2) + forward + 2 * reverse, rel=1e-6)
    assert losses.teacher_loss.item() == pytest.approx(math.log(4 / 3) + reverse, rel=1e-6)
    assert losses.diagnostics["boosted_reverse"] == 1
    assert losses.diagnostics["boosted_forward"] == 0
    assert losses.diagnostics["student/entropy"].item() == pytest.approx(0.693147180559945, rel=1e-6)
    assert losses.diagnostics["teacher/entropy"].item() == pytest.approx(0.562335144618808, rel=1e-6)


# Worked out with 40 digits of Python's decimal arithmetic, apart from torch and NumPy.
FROZEN = [
    (BDKD(), 4.8415592068080522, 1.4117268895565854),
    (
        BDKD(
            nu_forward=3,
            nu_reverse=1.5,
            temperature=4,
            entropy_temperature=2,
            ce_weight=0.5,
            student_weight=0.9,
            teacher_weight=0.1,
        ),
        4.6743801860374466,
        0.29258670163402424,
    ),
    (BDKD(gate="soft", teacher_term="balanced", nu_forward=3), 5.3171464502302586, 4.1873394279848872),
    (BDKD(temperature=2, teacher_term="teacher_to_student"), 5.6397175113399500, 1.5905666377473266),
    (BDKD(teacher_term="none", student_weight=0.25), 2.4233454827750620, 0.30432668910318160),
]


@pytest.mark.parametrize(("objective", "student_loss", "teacher_loss"), FROZEN)
def test_values_stay_what_they_were(objective: BDKD, student_loss: float, teacher_loss: float) -> None:
    student = torch.tensor([[1.0, 0.5, -1.0], [3.0, 0.0, 0.0], [0.2, 0.1, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, -0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 4.0]], dtype=torch.float64)
    losses = objective(student, teacher, torch.tensor([0, 1, 2]))
    assert losses.student_loss.item() == pytest.approx(student_loss, rel=1e-12)
    assert losses.teacher_loss.item() == pytest.approx(teacher_loss, rel=1e-12)


def test_gradients_are_the_formulas_at_temperature_one() -> None:
    z_s, z_t, y = batch()
    p_s, p_t = softmax(z_s), softmax(z_t)
    forward_grad = p_s - p_t
    reverse_grad = p_s * (np.log(p_s / p_t) - kl(p_s, p_t)[:, None])
    for objective in (BDKD(nu_forward=3, nu_reverse=5), BDKD(gate="soft", nu_forward=3, nu_reverse=5)):
        w_f, w_r = (w[:, None] for w in weights(objective, shannon(p_s), shannon(p_t)))  # constants: no gradient
        by_student, by_teacher = gradients(objective, z_s, z_t, y)
        one_hot = np.eye(z_s.shape[1])[y]
        np.testing.assert_allclose(by_student, p_s - one_hot + w_f * forward_grad + w_r * reverse_grad, atol=1e-13)
        np.testing.assert_allclose(by_teacher, p_t - one_hot + p_t - p_s, atol=1e-13)


@pytest.mark.parametrize("objective", [v for v in VARIANTS if v.gate == "hard"])
def test_gradcheck_in_float64(objective: BDKD) -> None:
    student, teacher, targets = leaves(*batch(samples=3, classes=4))
    assert torch.autograd.gradcheck(lambda z: objective(z, teacher.detach(), targets).student_loss, student)
    assert torch.autograd.gradcheck(lambda z: objective(student.detach(), z, targets).teacher_loss, teacher)


def test_weights_of_one_give_the_jeffreys_divergence() -> None:
    z_s, z_t, y = batch()
    p_s, p_t = softmax(z_s), softmax(z_t)
    jeffreys = ((p_t - p_s) * np.log(p_t / p_s)).sum(axis=1).mean()
    for gate in ("hard", "soft"):
        objective = BDKD(nu_forward=1, nu_reverse=1, ce_weight=0, gate=gate)
        assert objective(*leaves(z_s, z_t, y)).student_loss.item() == pytest.approx(jeffreys, rel=1e-12)


def test_swapping_the_networks_swaps_the_gate() -> None:
    z_s, z_t, y = batch()
    for gate in ("hard", "soft"):
        objective = BDKD(nu_forward=3, nu_reverse=1.5, gate=gate, teacher_term="balanced")
        ours, swapped = objective(*leaves(z_s, z_t, y)), objective(*leaves(z_t, z_s, y))
        assert ours.student_loss.item() == pytest.approx(swapped.teacher_loss.item(), rel=1e-14)
        assert ours.teacher_loss.item() == pytest.approx(swapped.student_loss.item(), rel=1e-14)
        assert ours.diagnostics["boosted_forward"] == swapped.diagnostics["boosted_reverse"] != 0.5


def test_a_tie_boosts_neither_term() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    permuted = logits.roll(1, dims=1)
    tied = BDKD(nu_forward=9, nu_reverse=9)(logits, permuted, torch.tensor([0]))
    plain = BDKD(nu_forward=1, nu_reverse=1)(logits, permuted, torch.tensor([0]))
    assert tied.diagnostics["boosted_forward"] == tied.diagnostics["boosted_reverse"] == 0
    assert tied.student_loss == plain.student_loss
    assert plain.diagnostics["forward_kl"] > 0.1


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    z_s, z_t, y = batch()
    for objective in VARIANTS:
        before, after = objective(*leaves(z_s, z_t, y)), objective(*leaves(z_s + 50, z_t - 30, y))
        torch.testing.assert_close(before.student_loss, after.student_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(before.teacher_loss, after.teacher_loss, rtol=1e-12, atol=0)


def test_a_sharp_soft_gate_is_the_hard_gate() -> None:
    inputs = leaves(*batch())
    hard = BDKD(nu_forward=3, nu_reverse=4, teacher_term="balanced")(*inputs)
    soft = BDKD(nu_forward=3, nu_reverse=4, teacher_term="balanced", gate="soft", sharpness=1e6)(*inputs)
    torch.testing.assert_close(hard, soft, rtol=1e-14, atol=0)
    gentle = BDKD(nu_forward=3, nu_reverse=4, teacher_term="balanced", gate="soft", sharpness=1.0)(*inputs)
    assert gentle.student_loss != hard.student_loss


def test_networks_that_agree_have_no_divergence() -> None:
    z_s, _, y = batch()
    losses = BDKD(ce_weight=0, teacher_term="balanced", temperature=3)(*leaves(z_s, z_s, y))
    assert losses.student_loss.item() == losses.teacher_loss.item() == 0


def test_the_balanced_teacher_term_weights_by_the_teachers_entropy() -> None:
    # The teacher is the less certain of the two: its reverse term KL(p_t‖p_s) is the boosted one.
    student, teacher = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    losses = BDKD(ce_weight=0, nu_forward=5, teacher_term="balanced")(student, teacher, torch.tensor([0]))
    assert losses.teacher_loss.item() == pytest.approx(0.130812035941137 + 2 * 0.143841036225890, rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("nu_forward", -1.0, ">= 0"),
        ("nu_reverse", math.inf, "finite"),
        ("temperature", 0.0, "> 0"),
        ("entropy_temperature", math.nan, "finite, > 0"),
        ("ce_weight", -0.1, ">= 0"),
        ("student_weight", -0.1, ">= 0"),
        ("teacher_weight", "much", ">= 0"),
        ("sharpness", 0, "> 0"),
        ("gate", "softt", "did you mean 'soft'"),
        ("teacher_term", "student_to_teachr", "did you mean 'student_to_teacher'"),
    ],
)
def test_a_wrong_parameter_is_one_line(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        BDKD(**{field: value})
    line = str(caught.value)
    assert "\n" not in line
    for word in (field, str(value), allowed):
        assert word in line


def test_losses_come_as_a_named_triple() -> None:
    losses = BDKD()(*leaves(*batch()))
    assert isinstance(losses, Losses)
    assert losses._fields == ("student_loss", "teacher_loss", "diagnostics")
