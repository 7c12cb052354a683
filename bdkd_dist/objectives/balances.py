"""Other balances of the two directions: fixed or adaptive mixtures in place of BD-KD's gate.

They come from work on other tasks, with a frozen teacher. Here the teacher learns beside the student with BD-KD's own
default loss, so that a comparison changes one thing, the divergence by which the student follows.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bdkd_dist.errors import UserError
from bdkd_dist.objectives.base import PairParts, PairwiseObjective, watch_apart
from bdkd_dist.objectives.divergences import (
    alpha_beta,
    cross_entropy,
    jensen_shannon,
    kl_divergence,
    log_probabilities,
    skew_kl,
)
from bdkd_dist.objectives.schedule import Number, ParameterSchedule, check_number, equals, value


@dataclass(frozen=True, kw_only=True)
class Balance(PairwiseObjective):
    """A divergence D in the student's loss, KL(p_s‖p_t) in the teacher's; p = softmax(z/τ), the other detached.

    ::

        L_student = ce_weight·CE(y, z_s) + student_weight·τ²·mean[D(p_t, p_s)]
        L_teacher = ce_weight·CE(y, z_t) + teacher_weight·τ²·mean[KL(p_s‖p_t)]

    Raises:
        UserError: A parameter is out of range.
    """

    temperature: Number = 1.0
    ce_weight: Number = 1.0
    student_weight: Number = 1.0
    teacher_weight: Number = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, positive=True)
        for field in ("ce_weight", "student_weight", "teacher_weight"):
            check_number(field, getattr(self, field))

    @abstractmethod
    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """Return (N,) D(p_t, p_s) of (N, K) log-probabilities; the teacher's carry no gradient."""

    def pair(self, student: Tensor, teacher: Tensor, targets: Tensor) -> PairParts:
        """See :class:`~bdkd_dist.objectives.base.PairwiseObjective`."""
        log_student, log_teacher = log_probabilities(student), log_probabilities(teacher)
        soft_student, soft_teacher = log_student, log_teacher
        tau, ce_weight = value(self.temperature), value(self.ce_weight)
        if not equals(tau, 1):
            soft_student, soft_teacher = log_probabilities(student, tau), log_probabilities(teacher, tau)
        scale = tau**2
        following = self.divergence(soft_teacher.detach(), soft_student)
        student_terms = {
            "ce": ce_weight * cross_entropy(log_student, targets),
            "divergence": value(self.student_weight) * scale * following,
        }
        teacher_terms = {
            "ce": ce_weight * cross_entropy(log_teacher, targets),
            "forward": value(self.teacher_weight) * scale * kl_divergence(soft_student.detach(), soft_teacher),
        }
        return PairParts(student_terms, teacher_terms, watch_apart(log_student, log_teacher, targets))


@dataclass(frozen=True, kw_only=True)
class Jeffreys(Balance):
    """``D = KL(p_t‖p_s) + KL(p_s‖p_t)`` (Jeffreys 1946): BD-KD without its gate."""

    name: Literal["jeffreys"] = "jeffreys"

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """See :meth:`Balance.divergence`."""
        return kl_divergence(log_teacher, log_student) + kl_divergence(log_student, log_teacher)


@dataclass(frozen=True, kw_only=True)
class JSD(Balance):
    """``D = ½·KL(p_t‖m) + ½·KL(p_s‖m)``, m = (p_t + p_s)/2 (Lin 1991)."""

    name: Literal["jsd"] = "jsd"

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """See :meth:`Balance.divergence`."""
        return jensen_shannon(log_teacher, log_student)


@dataclass(frozen=True, kw_only=True)
class Skew(Balance):
    """``D = KL(p_t‖λ·p_t + (1−λ)·p_s)``, λ = ``skew`` (DistiLLM, arXiv 2402.03898)."""

    name: Literal["skew"] = "skew"
    skew: Number = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("skew", self.skew, below=1)

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """See :meth:`Balance.divergence`."""
        return skew_kl(log_teacher, log_student, value(self.skew))


@dataclass(frozen=True, kw_only=True)
class AKL(Balance):
    """Adaptive KL (Wu et al. 2024, arXiv 2404.02657, and their code LLM_KD_AKL).

    ``D = g_head/(g_head+g_tail)·KL(p_t‖p_s) + g_tail/(g_head+g_tail)·KL(p_s‖p_t)`` per sample, where g is Σ|p_t − p_s|
    over the teacher's head (its most probable classes while their cumulative mass stays within ``head_mass``, always
    the first) and over the rest. The shares carry no gradient; where the networks agree, each is ½.
    """

    name: Literal["akl"] = "akl"
    head_mass: Number = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("head_mass", self.head_mass, positive=True, below=1)

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """See :meth:`Balance.divergence`."""
        head = self._head_share(log_teacher.exp(), log_student.detach().exp())
        forward, reverse = kl_divergence(log_teacher, log_student), kl_divergence(log_student, log_teacher)
        return head * forward + (1 - head) * reverse

    def _head_share(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return (N,) g_head/(g_head+g_tail) of (N, K) probabilities."""
        ranked, order = teacher.sort(dim=1, descending=True)
        gaps = (ranked - student.gather(1, order)).abs()
        mass = torch.cat((torch.zeros_like(ranked[:, :1]), ranked.cumsum(1)[:, 1:]), dim=1)  # the first is always in
        head = torch.where(mass <= value(self.head_mass), gaps, 0.0).sum(1)
        total = gaps.sum(1)
        return torch.where(total > 0, head / total, 0.5)


@dataclass(frozen=True, kw_only=True)
class ABKD(Balance):
    """``D`` = the α-β divergence of p_t and p_s (Wang et al. 2025, arXiv 2505.04560).

    (1, 0) is the forward, (0, 1) the reverse KL divergence; the defaults are the authors' for image classification.
    """

    name: Literal["abkd"] = "abkd"
    alpha: Number = 0.9
    beta: Number = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        check_number("beta", self.beta)
        # A number that moves between two bounds is 0 at one of its ends at most, until it moves or once it has come.
        ends = [0.0, 1.0, *(schedule.until for schedule in self.schedules.values())]
        if any(_at(self.alpha, progress) == _at(self.beta, progress) == 0 for progress in ends):
            raise UserError("alpha=0 and beta=0 are not allowed together (allowed: >= 0, one of them > 0)")

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """See :meth:`Balance.divergence`."""
        return alpha_beta(log_teacher, log_student, value(self.alpha), value(self.beta))


def _at(parameter: Number, progress: float) -> float:
    return parameter.at(progress) if isinstance(parameter, ParameterSchedule) else parameter
