"""KD: a finished teacher, frozen, teaches the student."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bdkd_dist.objectives.base import PairParts, PairwiseObjective, watch_apart
from bdkd_dist.objectives.divergences import cross_entropy, kl_divergence, log_probabilities
from bdkd_dist.objectives.schedule import Number, check_number, value


@dataclass(frozen=True, kw_only=True)
class KD(PairwiseObjective):
    """Offline distillation (Hinton et al. 2015, arXiv 1503.02531).

    ``L_student = ce_weight·CE(y, z_s) + weight·T²·mean[KL(p_t‖p_s)]`` with p = softmax(z/T). The teacher comes from a
    checkpoint (``models.teacher_checkpoint`` of a recipe), runs in eval mode and does not learn: its loss is 0. The
    defaults are those of the public CIFAR-100 benchmark mdistiller (``distillers/KD.py``).

    Raises:
        UserError: A parameter is out of range.
    """

    teacher_learns: ClassVar[bool] = False

    name: Literal["kd"] = "kd"
    temperature: Number = 4.0
    ce_weight: Number = 0.1
    weight: Number = 0.9

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, positive=True)
        check_number("ce_weight", self.ce_weight)
        check_number("weight", self.weight)

    def pair(self, student: Tensor, teacher: Tensor, targets: Tensor) -> PairParts:
        """See :class:`~bdkd_dist.objectives.base.PairwiseObjective`."""
        log_student, log_teacher = log_probabilities(student), log_probabilities(teacher.detach())
        tau = value(self.temperature)
        forward = kl_divergence(log_probabilities(teacher.detach(), tau), log_probabilities(student, tau))
        terms = {
            "ce": value(self.ce_weight) * cross_entropy(log_student, targets),
            "forward": value(self.weight) * tau**2 * forward,
        }
        return PairParts(terms, {}, watch_apart(log_student, log_teacher, targets))
