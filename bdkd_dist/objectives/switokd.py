"""SwitOKD: the teacher waits where it would run too far ahead of the student."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bdkd_dist.objectives.across_ranks import mean_across_ranks
from bdkd_dist.objectives.base import PairParts, PairwiseObjective, watch_apart
from bdkd_dist.objectives.divergences import cross_entropy, kl_divergence, log_probabilities


@dataclass(frozen=True, kw_only=True)
class SwitOKD(PairwiseObjective):
    """Switchable online distillation (Qian et al. 2022, "Switchable Online Knowledge Distillation").

    ``L_student = CE(y, z_s) + mean[KL(p_t‖p_s)]`` and ``L_teacher = CE(y, z_t) + mean[KL(p_s‖p_t)]``, the other network
    detached. With batch means G = ‖p_s − p_t‖₁, a = ‖p_s − y‖₁, b = ‖p_t − y‖₁ and δ = a − b·e^(−b/(a+b)): where G > δ
    and b < a the teacher's loss is 0 for this batch and only the student learns (the official code; its README omits
    b < a). The official code then leaves the teacher's optimiser out of the step; here its gradient is 0, so that its
    momentum and weight decay go on.

    The batch is that of all ranks where torch.distributed runs: every rank must call it, with however many samples.
    The added diagnostic ``teacher/paused`` is 1 where the teacher waits.
    """

    max_students: ClassVar[int | None] = 1

    name: Literal["switokd"] = "switokd"

    def pair(self, student: Tensor, teacher: Tensor, targets: Tensor) -> PairParts:
        """See :class:`~bdkd_dist.objectives.base.PairwiseObjective`."""
        log_student, log_teacher = log_probabilities(student), log_probabilities(teacher)
        paused = _teacher_waits(log_student.detach().exp(), log_teacher.detach().exp(), targets)
        student_terms = {
            "ce": cross_entropy(log_student, targets),
            "forward": kl_divergence(log_teacher.detach(), log_student),
        }
        teacher_terms = {
            "ce": cross_entropy(log_teacher, targets),
            "forward": kl_divergence(log_student.detach(), log_teacher),
        }
        learning = {term: torch.where(paused, torch.zeros_like(v), v) for term, v in teacher_terms.items()}
        watched = watch_apart(log_student, log_teacher, targets) | {"teacher/paused": paused.to(student.dtype)}
        return PairParts(student_terms, learning, watched)


def _teacher_waits(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Return the scalar decision for (N, K) probabilities of both networks."""
    gap = (student - teacher).abs().sum(1)
    distances = (gap, _distance(student, targets), _distance(teacher, targets))
    gap_mean, student_distance, teacher_distance = mean_across_ranks(torch.stack(distances, dim=1)).unbind()
    total = student_distance + teacher_distance
    ratio = torch.where(total > 0, teacher_distance / total, 0.5)
    threshold = student_distance - torch.exp(-ratio) * teacher_distance
    return (gap_mean > threshold) & (teacher_distance < student_distance)


def _distance(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return (N,) ‖p − y‖₁."""
    if targets.is_floating_point():
        return (probabilities - targets.to(probabilities.dtype)).abs().sum(1)
    return 2 - 2 * probabilities.gather(1, targets[:, None]).squeeze(1)
