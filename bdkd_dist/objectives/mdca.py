"""MDCA: each network alone, its mean confidence in each class drawn to how often the class occurs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bdkd_dist.objectives.across_ranks import mean_across_ranks
from bdkd_dist.objectives.base import Objective, Parts, student_names, watch_students
from bdkd_dist.objectives.divergences import cross_entropy, log_probabilities
from bdkd_dist.objectives.schedule import Number, check_number, value


@dataclass(frozen=True, kw_only=True)
class MDCA(Objective):
    """Multi-class difference in confidence and accuracy (Hebbalaguppe et al. 2022, arXiv 2203.13834).

    ``L_i = CE(y, z_i) + weight·1/K·Σ_k|mean[p_k] − mean[y_k]|``; networks do not learn from each other. The default
    weight is that of the official code's loss and of its commands for CIFAR-10; its ``NLL+MDCA`` is this loss.

    Both means are over the batch of all ranks where torch.distributed runs: every rank must call it, with however many
    samples. A sample's part is ``weight/K·Σ_k s_k·(p_k − y_k)``, s_k the sign of the whole batch's difference: the mean
    of these is MDCA, and their gradient MDCA's, on any number of ranks. The added diagnostics ``network/mdca`` are MDCA
    without its weight. Of micro-batches each has means of its own.

    Raises:
        UserError: ``weight`` is negative or not finite.
    """

    name: Literal["mdca"] = "mdca"
    weight: Number = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight)

    def parts(self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Parts:
        """See :meth:`~bdkd_dist.objectives.base.Objective.parts`."""
        logs = [log_probabilities(logits) for logits in (*students, teacher)]
        gaps = [_gap(log_p, targets) for log_p in logs]
        means = mean_across_ranks(torch.cat(gaps, dim=1)).chunk(len(gaps))
        terms = [
            {"ce": cross_entropy(log_p, targets), "mdca": value(self.weight) * (mean.sign() * gap).mean(1)}
            for log_p, gap, mean in zip(logs, gaps, means, strict=True)
        ]
        names = [*student_names(len(students)), "teacher"]
        mdca = {f"{name}/mdca": mean.abs().mean() for name, mean in zip(names, means, strict=True)}
        return Parts(terms[:-1], terms[-1], watch_students(logs, targets) | mdca)


def _gap(log_p: Tensor, targets: Tensor) -> Tensor:
    """Return (N, K) p − y."""
    if targets.is_floating_point():
        return log_p.exp() - targets.to(log_p.dtype)
    classes = torch.arange(log_p.shape[1], device=log_p.device)
    return log_p.exp() - (targets[:, None] == classes).to(log_p.dtype)
