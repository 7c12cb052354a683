"""Competitive distillation: whichever network does best on a batch teaches the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bdkd_dist.objectives.across_ranks import mean_across_ranks
from bdkd_dist.objectives.base import Objective, Parts, Terms, student_names, watch_students
from bdkd_dist.objectives.divergences import cross_entropy, kl_divergence, log_probabilities
from bdkd_dist.objectives.schedule import Number, check_number, value


@dataclass(frozen=True, kw_only=True)
class Competitive(Objective):
    """Competitive distillation (Shi et al. 2025, arXiv 2506.23285).

    ``L_w = CE(y, z_w)`` for the network w of the lowest mean cross-entropy on this batch, and for every other one
    ``L_i = CE(y, z_i) + weight·T²·mean[KL(p_w‖p_i)]`` with p = softmax(z/T), the winner's logits detached. All are
    peers: with several students each may teach the teacher and the other students. The batch is that of all ranks
    where torch.distributed runs: every rank must call it, with however many samples.

    The paper has weight and temperature 1. Left out are its stochastic perturbation of one network's images and its
    feature loss, which wants features of one shape. With more than two networks the official code differs from the
    paper: there each network learns from all that do better, here as in the paper from the winner alone.

    The added diagnostics ``network/teaches`` are 1 where that network wins; their means are its share of the steps.

    Raises:
        UserError: A parameter is out of range.
    """

    name: Literal["competitive"] = "competitive"
    temperature: Number = 1.0
    weight: Number = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, positive=True)
        check_number("weight", self.weight)

    def parts(self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Parts:
        """See :meth:`~bdkd_dist.objectives.base.Objective.parts`."""
        networks = [*students, teacher]
        logs = [log_probabilities(z) for z in networks]
        losses = [cross_entropy(log_p, targets) for log_p in logs]
        winner = mean_across_ranks(torch.stack(losses, dim=1)).argmin()
        best = torch.stack(networks).detach().index_select(0, winner[None])[0]
        wins = [winner == index for index in range(len(networks))]
        terms = [self._terms(*each, best) for each in zip(networks, losses, wins, strict=True)]
        names = [*student_names(len(students)), "teacher"]
        teaches = {f"{name}/teaches": won.to(teacher.dtype) for name, won in zip(names, wins, strict=True)}
        return Parts(terms[:-1], terms[-1], watch_students(logs, targets) | teaches)

    def _terms(self, logits: Tensor, loss: Tensor, won: Tensor, best: Tensor) -> Terms:
        tau = value(self.temperature)
        taught = kl_divergence(log_probabilities(best, tau), log_probabilities(logits, tau))
        taught = value(self.weight) * tau**2 * taught
        return {"ce": loss, "winner": torch.where(won, torch.zeros_like(taught), taught)}
