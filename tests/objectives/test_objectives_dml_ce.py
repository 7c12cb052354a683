"""DML and CE against independent formulas."""

import math

import numpy as np
import pytest
import torch

from bdkd_dist.errors import UserError
from bdkd_dist.objectives import CE, DML, Losses


def logits(seed: int = 0, samples: int = 9, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
    )
    return student, teacher, torch.randint(classes, (samples,), generator=generator)


def numpy_terms(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Probabilities of both, and the common diagnostics."""
    p_s, p_t = (
        np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (student.detach().numpy(), teacher.detach().numpy())
    )
    rows, y = np.arange(len(targets)), targets.numpy()
    return (
        p_s,
        p_t,
        {
            "student/ce": -np.log(p_s[rows, y]).mean(),
            "teacher/ce": -np.log(p_t[rows, y]).mean(),
            "student/entropy": -(p_s * np.log(p_s)).sum(1).mean(),
            "teacher/entropy": -(p_t * np.log(p_t)).sum(1).mean(),
            "forward_kl": (p_t * np.log(p_t / p_s)).sum(1).mean(),
            "reverse_kl": (p_s * np.log(p_s / p_t)).sum(1).mean(),
        },
    )


def check_diagnostics(losses: Losses, expected: dict[str, float]) -> None:
    assert losses.diagnostics.keys() == expected.keys()
    for name, value in losses.diagnostics.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-12), name
        assert not value.requires_grad


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_dml_is_cross_entropy_plus_the_divergence_from_the_peer(weight: float) -> None:
    student, teacher, targets = logits()
    p_s, p_t, expected = numpy_terms(student, teacher, targets)
    losses = DML(weight=weight)(student, teacher, targets)
    assert losses.student_loss.item() == pytest.approx(expected["student/ce"] + weight * expected["forward_kl"])
    assert losses.teacher_loss.item() == pytest.approx(expected["teacher/ce"] + weight * expected["reverse_kl"])
    check_diagnostics(losses, expected)
    one_hot = np.eye(5)[targets.numpy()]
    (by_student,) = torch.autograd.grad(losses.student_loss, student)
    (by_teacher,) = torch.autograd.grad(losses.teacher_loss, teacher)
    np.testing.assert_allclose(9 * by_student.numpy(), p_s - one_hot + weight * (p_s - p_t), atol=1e-13)
    np.testing.assert_allclose(9 * by_teacher.numpy(), p_t - one_hot + weight * (p_t - p_s), atol=1e-13)


def test_dml_worked_by_hand() -> None:
    # p_s = (1/2, 1/2), p_t = (3/4, 1/4), y = 1.
    losses = DML()(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), torch.tensor([1]))
    assert losses.student_loss.item() == pytest.approx(0.693147180559945 + 0.130812035941137, rel=1e-6)
    assert losses.teacher_loss.item() == pytest.approx(1.386294361119891 + 0.143841036225890, rel=1e-6)


def test_ce_is_each_networks_own_cross_entropy() -> None:
    student, teacher, targets = logits()
    p_s, p_t, expected = numpy_terms(student, teacher, targets)
    losses = CE()(student, teacher, targets)
    check_diagnostics(losses, expected)
    assert losses.student_loss.item() == pytest.approx(expected["student/ce"])
    assert losses.teacher_loss.item() == pytest.approx(expected["teacher/ce"])
    one_hot = np.eye(5)[targets.numpy()]
    by_student, by_teacher = torch.autograd.grad(losses.student_loss + losses.teacher_loss, (student, teacher))
    np.testing.assert_allclose(9 * by_student.numpy(), p_s - one_hot, atol=1e-13)
    np.testing.assert_allclose(9 * by_teacher.numpy(), p_t - one_hot, atol=1e-13)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_wrong_weight_is_one_line(weight: float) -> None:
    with pytest.raises(UserError, match=f"^weight={weight} is not allowed") as caught:
        DML(weight=weight)
    assert "\n" not in str(caught.value)
