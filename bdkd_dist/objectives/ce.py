"""CE: each network alone, the baseline of every comparison."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bdkd_dist.objectives.base import (
    Losses,
    Objective,
    cross_entropy,
    diagnostics,
    entropy,
    kl_divergence,
    log_probabilities,
)


@dataclass(frozen=True, kw_only=True)
class CE(Objective):
    """``L_i = CE(y, z_i)``: neither network learns from the other; their divergences are only watched."""

    name: Literal["ce"] = "ce"

    def losses(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Losses:
        """Return the losses of a batch (see :class:`~bdkd_dist.objectives.base.Objective`)."""
        log_student, log_teacher = log_probabilities(student_logits), log_probabilities(teacher_logits)
        student_ce, teacher_ce = cross_entropy(log_student, targets), cross_entropy(log_teacher, targets)
        watched_student, watched_teacher = log_student.detach(), log_teacher.detach()
        described = diagnostics(
            student_ce=student_ce,
            teacher_ce=teacher_ce,
            student_entropy=entropy(watched_student),
            teacher_entropy=entropy(watched_teacher),
            forward_kl=kl_divergence(watched_teacher, watched_student),
            reverse_kl=kl_divergence(watched_student, watched_teacher),
        )
        return Losses(student_ce.mean(), teacher_ce.mean(), described)
