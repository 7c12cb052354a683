"""KDCL: all networks learn from an ensemble of themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bdkd_dist.objectives.base import Objective, Parts, check_word, watch_students
from bdkd_dist.objectives.divergences import cross_entropy, kl_divergence, log_probabilities
from bdkd_dist.objectives.schedule import Number, check_number, value

Ensemble = Literal["min_logit", "naive", "linear"]
HALVINGS = 20
"""Bisection steps of ``linear``: mixing weights to about 1e-6; a third network takes as many of them each."""


@dataclass(frozen=True, kw_only=True)
class KDCL(Objective):
    """Collaborative learning (Guo et al. 2020, "Online Knowledge Distillation via Collaborative Learning").

    ``L_i = CE(y, z_i) + weight·T²·mean[KL(p_ens‖p_i)]`` with p = softmax(z/T), for the teacher as for the students; the
    ensemble's logits z_ens carry no gradient. Per sample:

    * ``min_logit``: z_ens,k = min_i(z_i,k − z_i,y), for soft targets with z_i,y = Σ_k y_k·z_i,k;
    * ``naive``: the logits of the network with the lowest cross-entropy;
    * ``linear``: Σ_i a_i·z_i with the a on the simplex that minimise the cross-entropy (convex), found by bisection,
      whose cost grows twentyfold with each student after the first.

    The paper's formulas; that naive and linear choose per sample is this project's reading.

    Raises:
        UserError: A parameter is out of range.
    """

    name: Literal["kdcl"] = "kdcl"
    ensemble: Ensemble = "min_logit"
    temperature: Number = 2.0
    weight: Number = 1.0

    def __post_init__(self) -> None:
        check_word("ensemble", self.ensemble, get_args(Ensemble))
        check_number("temperature", self.temperature, positive=True)
        check_number("weight", self.weight)

    def parts(self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Parts:
        """See :meth:`~bdkd_dist.objectives.base.Objective.parts`."""
        networks = [*students, teacher]
        together = self._ensemble(torch.stack([z.detach() for z in networks]), targets)
        tau = value(self.temperature)
        log_together = log_probabilities(together, tau)
        logs = [log_probabilities(z) for z in networks]
        scale = value(self.weight) * tau**2
        terms = [
            {
                "ce": cross_entropy(log_p, targets),
                "ensemble": scale * kl_divergence(log_together, log_probabilities(z, tau)),
            }
            for z, log_p in zip(networks, logs, strict=True)
        ]
        ensemble = {"ensemble/ce": cross_entropy(log_probabilities(together), targets)}
        return Parts(terms[:-1], terms[-1], ensemble | watch_students(logs, targets))

    def _ensemble(self, networks: Tensor, targets: Tensor) -> Tensor:
        """Return (N, K) logits of the ensemble of (M, N, K) logits."""
        margins = networks - _own(networks, targets)
        if self.ensemble == "min_logit":
            return margins.amin(0)
        if self.ensemble == "naive":
            best = margins.logsumexp(2).argmin(0)  # the cross-entropy, for hard and soft targets
            return networks.gather(0, best[None, :, None].expand(1, *networks.shape[1:])).squeeze(0)
        return (_mixing(margins)[:, :, None] * networks).sum(0)


def _own(networks: Tensor, targets: Tensor) -> Tensor:
    """Return (M, N, 1) logits of each sample's target, or their mean under a soft target."""
    if targets.is_floating_point():
        return (networks * targets.to(networks.dtype)).sum(2, keepdim=True)
    return networks.gather(2, targets[None, :, None].expand(len(networks), -1, 1))


# Opaque to torch.compile, which would unroll the bisections: the weights carry no gradient.
@torch.library.custom_op("bdkd_dist::mixing", mutates_args=())
def _mixing(margins: Tensor) -> Tensor:
    """Return the (M, N) weights on the simplex that minimise log Σ_k exp(Σ_i a_i·margins_i,k), sample by sample."""
    return _share_out(torch.zeros_like(margins[0]), margins, torch.ones_like(margins[0, :, 0]))


@_mixing.register_fake
def _(margins: Tensor) -> Tensor:
    return margins.new_empty(margins.shape[:2])


def _share_out(mixed: Tensor, margins: Tensor, mass: Tensor) -> Tensor:
    """Return the (M, N) weights that share ``mass`` (N,) out so that log Σ_k exp(mixed + Σ_i a_i·margins_i) is least.

    Bisection over the first network's weight. With the others at their best, the least value over them is convex in
    it, with slope E_p[margins_first] − min_j E_p[margins_j]: what the first costs against the cheapest other.
    """
    first, others = margins[0], margins[1:]
    if not len(others):
        return mass[None].clone()
    low, high = torch.zeros_like(mass), mass
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        begun = mixed + middle[:, None] * first
        shares = _share_out(begun, others, mass - middle)
        p = (begun + (shares[:, :, None] * others).sum(0)).softmax(1)
        cost = (p * margins).sum(2)
        rising = cost[0] > cost[1:].amin(0)
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    weight = (low + high) / 2
    return torch.cat((weight[None], _share_out(mixed + weight[:, None] * first, others, mass - weight)))
