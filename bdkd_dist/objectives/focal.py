"""Focal loss: each network alone, samples that it is sure of weighing less."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bdkd_dist.objectives.base import Objective, Parts, watch_students
from bdkd_dist.objectives.divergences import cross_entropy, log_probabilities
from bdkd_dist.objectives.schedule import Number, check_number, value


@dataclass(frozen=True, kw_only=True)
class Focal(Objective):
    """Focal loss with sample-dependent γ (FLSD-53; Mukhoti et al. 2020, arXiv 2002.09437).

    ``L_i = mean[−(1 − p_y)^γ(p_y)·log p_y]`` with γ(p) = ``gamma_low`` where p < ``threshold``, else ``gamma_high``.
    As in the official code γ is chosen without a gradient, and (1 − p_y)^γ carries one. With γ = 0 it is cross-entropy.
    Networks do not learn from each other.

    A soft target weighs the classes, each with a γ of its own: ``Σ_k y_k·(1 − p_k)^γ(p_k)·(−log p_k)``. The paper has
    hard targets only, which a one-hot soft target equals.

    Attributes:
        gamma_low: γ of samples whose target has a low probability, at least 0.
        gamma_high: γ of the others, at least 0.
        threshold: The probability that separates them, in [0, 1].

    Raises:
        UserError: A parameter is out of range.
    """

    name: Literal["focal"] = "focal"
    gamma_low: Number = 5.0
    gamma_high: Number = 3.0
    threshold: Number = 0.2

    def __post_init__(self) -> None:
        check_number("gamma_low", self.gamma_low)
        check_number("gamma_high", self.gamma_high)
        check_number("threshold", self.threshold, most=1)

    def parts(self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Parts:
        """See :meth:`~bdkd_dist.objectives.base.Objective.parts`."""
        logs = [log_probabilities(logits) for logits in (*students, teacher)]
        terms = [{"focal": cross_entropy(self._modulated(log_p), targets)} for log_p in logs]
        return Parts(terms[:-1], terms[-1], watch_students(logs, targets))

    def _modulated(self, log_p: Tensor) -> Tensor:
        """Return (N, K) (1 − p)^γ(p)·log p."""
        ones, low = torch.ones_like(log_p), log_p.detach().exp() < value(self.threshold)
        gamma = torch.where(low, value(self.gamma_low) * ones, value(self.gamma_high) * ones)
        return (gamma * _log_complement(log_p)).exp() * log_p


def _log_complement(log_p: Tensor) -> Tensor:
    """Return (N, K) log(1 − p), finite in value and gradient also where p rounds to 1."""
    top = log_p.argmax(1, keepdim=True)
    others = log_p.scatter(1, top, -torch.inf)
    # No other class has more than ½, where log1p keeps its digits; 1 − p of the top class is the sum of the others.
    return torch.log1p(-others.exp()).scatter(1, top, others.logsumexp(1, keepdim=True))
