"""DML: networks that teach each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bdkd_dist.objectives.base import Objective, Parts, Terms, watch_students
from bdkd_dist.objectives.divergences import cross_entropy, kl_divergence, log_probabilities
from bdkd_dist.objectives.schedule import Number, check_number, value


@dataclass(frozen=True, kw_only=True)
class DML(Objective):
    """Deep mutual learning (Zhang et al. 2018, arXiv 1706.00384) of M networks, at temperature 1.

    ``L_i = CE(y, z_i) + weight/(M−1)·Σ_{j≠i} mean[KL(p_j‖p_i)]``, with the other networks' logits z_j detached. All are
    peers: with several students each learns from the teacher and from the other students (the paper's equation 9).

    Raises:
        UserError: ``weight`` is negative or not finite.
    """

    name: Literal["dml"] = "dml"
    weight: Number = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight)

    def parts(self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Parts:
        """See :meth:`~bdkd_dist.objectives.base.Objective.parts`."""
        logs = [log_probabilities(logits) for logits in (*students, teacher)]
        terms = [self._terms(logs, index, targets) for index in range(len(logs))]
        return Parts(terms[:-1], terms[-1], watch_students(logs, targets))

    def _terms(self, logs: list[Tensor], index: int, targets: Tensor) -> Terms:
        own, others = logs[index], logs[:index] + logs[index + 1 :]
        taught = [kl_divergence(other.detach(), own) for other in others]
        weight = value(self.weight) / len(others)
        return {"ce": cross_entropy(own, targets), "mutual": weight * sum(taught[1:], start=taught[0])}
