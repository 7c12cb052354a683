"""Smoothed targets beside a loop over samples and classes, and beside torch's own label smoothing."""

import pytest
import torch
from torch.nn import functional as F

from bdkd_dist.data.targets import one_hot, smoothed


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.75])
def test_smoothed_targets_are_the_formula_class_by_class(share: float, soft: bool) -> None:
    labels = torch.tensor([2, 0, 1, 2])
    plain = [[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    if not soft:
        plain = [[float(k == label) for k in range(3)] for label in labels.tolist()]
    expected = [[(1 - share) * y + share / 3 for y in row] for row in plain]
    found = smoothed(torch.tensor(plain) if soft else labels, share, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(4), rtol=0, atol=1e-6)


def test_a_value_worked_by_hand() -> None:
    assert smoothed(torch.tensor([1]), 0.2, 4).tolist() == [pytest.approx([0.05, 0.85, 0.05, 0.05])]
    assert smoothed(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), 0.2, 4).tolist() == [pytest.approx([0.45, 0.45, 0.05, 0.05])]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.99])
def test_cross_entropy_of_smoothed_targets_is_torchs_label_smoothing(share: float) -> None:
    logits = 3 * torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 7
    for targets in (labels, torch.softmax(2 * logits.flip(0), 1)):  # which torch smooths in the same way
        ours = F.cross_entropy(logits, smoothed(targets, share, 7))
        peer = F.cross_entropy(logits, targets, label_smoothing=share)
        torch.testing.assert_close(ours, peer, rtol=1e-5, atol=0)


def test_without_smoothing_targets_are_those_given() -> None:
    for targets in (torch.tensor([2, 0]), torch.tensor([[0.3, 0.7]])):
        assert smoothed(targets, 0.0, 3) is targets


def test_no_value_is_looked_at() -> None:
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    assert smoothed(labels, 0.1, 5).shape == one_hot(labels, 5).shape == (4, 5)
