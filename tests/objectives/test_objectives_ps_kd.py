"""PS-KD: targets softened by what each network said before, against NumPy and by hand."""

import math

import numpy as np
import numpy_reference as reference
import pytest
import torch
from objective_cases import batch, leaves, torch_batch
from torch import Tensor

from bdkd_dist.objectives import CE, PSKD


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("students", [1, 2])
def test_losses_and_gradients_are_the_formulas(students: int, soft: bool) -> None:
    z, y = batch(seed=2, students=students, soft=soft)
    rng = np.random.default_rng(7)
    past = rng.dirichlet(np.full(7, 0.5), size=(students + 1, 16))
    past[:, 3:6] = 0  # these samples are new
    share = np.where(np.isin(np.arange(16), (3, 4, 5)), 0, 0.35)[:, None]
    own, teacher = leaves(z)
    losses = PSKD(past_share=0.35)(own, teacher, torch.tensor(y), torch.tensor(past))
    total = 0.0
    gradients = torch.autograd.grad(losses.student_loss + losses.teacher_loss, (*own, teacher))
    for logits, before, gradient in zip(z.all, past, gradients, strict=True):
        target = (1 - share) * reference.one_hot(y, 7) + share * before
        total += reference.cross_entropy(logits, target).mean()
        np.testing.assert_allclose(gradient.numpy(), (reference.softmax(logits) - target) / 16, rtol=1e-9, atol=1e-12)
    assert (losses.student_loss + losses.teacher_loss).item() == pytest.approx(total, rel=1e-12)


def test_a_value_worked_out_by_hand() -> None:
    # Two classes, p = (0.8, 0.2), label 0, said (0.5, 0.5) before: targets (0.875, 0.125) at a share of a quarter.
    z = torch.tensor([[math.log(4), 0.0]], dtype=torch.float64)
    loss = PSKD(past_share=0.25)(z, z, torch.tensor([0]), 2 * [torch.tensor([[0.5, 0.5]])])
    assert float(loss.teacher_loss) == pytest.approx(-0.875 * math.log(0.8) - 0.125 * math.log(0.2))
    assert float(loss.diagnostics["student/ce"]) == pytest.approx(-math.log(0.8))


def test_without_a_past_it_is_cross_entropy() -> None:
    students, teacher, targets = torch_batch()
    unseen = 2 * [torch.zeros(12, 6)]
    want = CE()(students, teacher, targets)
    for past in (None, unseen):
        got = PSKD(past_share=0.6)(students, teacher, targets, past)
        torch.testing.assert_close(got.diagnostics, want.diagnostics)
        torch.testing.assert_close((got.student_loss, got.teacher_loss), (want.student_loss, want.teacher_loss))


def test_the_past_has_a_share_of_the_gradient_and_no_gradient_of_its_own() -> None:
    students, teacher, targets = torch_batch()
    past: list[Tensor] = [torch.softmax(z.detach(), 1).requires_grad_() for z in (*students, teacher)]
    shares = PSKD(past_share=0.5).gradient_shares(students, teacher, targets, past)
    # Where a network says what it said before, the past pulls at nothing.
    assert float(shares["student/gradient_share_past"]) == pytest.approx(0, abs=1e-6)
    assert float(shares["student/gradient_share_ce"]) == pytest.approx(1, abs=1e-6)


def test_dense_outputs_have_a_past_too() -> None:
    z, y = batch(samples=12)
    rng = np.random.default_rng(1)
    past = torch.tensor(rng.dirichlet(np.ones(7), size=(2, 12)))
    (student,), teacher = leaves(z)
    flat = PSKD(past_share=0.5)(student, teacher, torch.tensor(y), past)
    dense = [each.detach().T.reshape(1, 7, 3, 4) for each in (student, teacher)]
    maps = [each.T.reshape(1, 7, 3, 4) for each in past]
    got = PSKD(past_share=0.5)(*dense, torch.tensor(y).reshape(1, 3, 4), maps)
    torch.testing.assert_close(got.student_loss, flat.student_loss.detach())


def test_other_objectives_do_not_look_at_a_past() -> None:
    students, teacher, targets = torch_batch()
    past = 2 * [torch.full((12, 6), 1 / 6)]
    with_past, without = CE()(students, teacher, targets, past), CE()(students, teacher, targets)
    assert torch.equal(with_past.student_loss, without.student_loss)
