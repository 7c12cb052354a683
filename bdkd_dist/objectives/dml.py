"""DML: two networks that teach each other."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bdkd_dist.objectives.base import (
    Losses,
    Objective,
    check_number,
    cross_entropy,
    diagnostics,
    entropy,
    kl_divergence,
    log_probabilities,
)


@dataclass(frozen=True, kw_only=True)
class DML(Objective):
    """Deep mutual learning (Zhang et al. 2018, arXiv 1706.00384), for two networks at temperature 1.

    ``L_i = CE(y, z_i) + weight·mean[KL(p_j‖p_i)]``, with the other network's logits z_j detached.

    Raises:
        UserError: ``weight`` is negative or not finite.
    """

    name: Literal["dml"] = "dml"
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight)

    def losses(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Losses:
        """Return the losses of a batch (see :class:`~bdkd_dist.objectives.base.Objective`)."""
        log_student, log_teacher = log_probabilities(student_logits), log_probabilities(teacher_logits)
        student_ce, teacher_ce = cross_entropy(log_student, targets), cross_entropy(log_teacher, targets)
        to_student = kl_divergence(log_teacher.detach(), log_student)
        to_teacher = kl_divergence(log_student.detach(), log_teacher)
        described = diagnostics(
            student_ce=student_ce,
            teacher_ce=teacher_ce,
            student_entropy=entropy(log_student.detach()),
            teacher_entropy=entropy(log_teacher.detach()),
            forward_kl=to_student,
            reverse_kl=to_teacher,
        )
        return Losses(
            (student_ce + self.weight * to_student).mean(), (teacher_ce + self.weight * to_teacher).mean(), described
        )
