"""PS-KD: each network alone, its targets softened by what it said of the same images an epoch before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bdkd_dist.objectives.base import Objective, Parts, Terms, watch_students
from bdkd_dist.objectives.divergences import cross_entropy, log_probabilities
from bdkd_dist.objectives.schedule import Number, ParameterSchedule, check_number, value


@dataclass(frozen=True, kw_only=True)
class PSKD(Objective):
    """Progressive self-distillation (Kim et al. 2021, "Self-Knowledge Distillation with Progressive Refinement").

    ``L_i = mean[(1 − a)·CE(y, z_i) + a·CE(q_i, z_i)]`` with a = ``past_share``, and q_i the probabilities, at
    temperature 1, that network i gave the same sample when it last saw it, in the epoch before and under that epoch's
    augmentation, as in the official code. Where it has not seen a sample yet, a is 0.

    The paper lets a grow in a straight line to 0.8, epoch by epoch; here it grows step by step.

    Attributes:
        past_share: a, in [0, 1].

    Raises:
        UserError: ``past_share`` is out of range.
    """

    uses_past: ClassVar[bool] = True

    name: Literal["ps_kd"] = "ps_kd"
    past_share: Number = ParameterSchedule(start=0.0, end=0.8)

    def __post_init__(self) -> None:
        check_number("past_share", self.past_share, most=1)

    def parts(self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Parts:
        """See :meth:`~bdkd_dist.objectives.base.Objective.parts`: nothing has been seen before."""
        unseen = torch.zeros_like(teacher)
        return self.parts_after(students, teacher, targets, [unseen for _ in (*students, teacher)])

    def parts_after(
        self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor, past: Sequence[Tensor]
    ) -> Parts:
        """See :meth:`~bdkd_dist.objectives.base.Objective.parts_after`."""
        logs = [log_probabilities(logits) for logits in (*students, teacher)]
        terms = [self._terms(log_p, targets, own.to(log_p.dtype)) for log_p, own in zip(logs, past, strict=True)]
        return Parts(terms[:-1], terms[-1], watch_students(logs, targets))

    def _terms(self, log_p: Tensor, targets: Tensor, past: Tensor) -> Terms:
        share = value(self.past_share) * (past.sum(1) > 0).to(log_p.dtype)
        return {"ce": (1 - share) * cross_entropy(log_p, targets), "past": share * cross_entropy(log_p, past)}
