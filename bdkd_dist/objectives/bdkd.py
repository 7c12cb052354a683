"""BD-KD: both directions of the Kullback-Leibler divergence, balanced sample by sample.

This is a *documented reconstruction* of "Balancing the Divergences for Online Knowledge Distillation" (BD-KD,
arXiv 2212.12965), not the authors' code:

* Stated by the authors: online and on logits only; student's and teacher's loss are both adjusted; forward and reverse
  divergence are weighted per sample; the aim is a student that is accurate and calibrated.
* From later papers and their public code: the weights follow from the entropies of the two softmax outputs by a hard
  switch; both terms are always present; the boosted one is multiplied by 2 or 3; no gradient through the weights.
* Unknown: the paper's boost, temperature, loss weights and teacher term. Each is a parameter here, and the defaults
  are this project's choice.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bdkd_dist.objectives.base import PairParts, PairwiseObjective, Terms, check_word, watch
from bdkd_dist.objectives.divergences import cross_entropy, entropy, kl_divergence, log_probabilities
from bdkd_dist.objectives.schedule import Number, Value, check_number, equals, value

Gate = Literal["hard", "soft"]
TeacherTerm = Literal["student_to_teacher", "teacher_to_student", "balanced", "none"]


@dataclass(frozen=True, kw_only=True)
class BDKD(PairwiseObjective):
    """Balanced divergences (a reconstruction of arXiv 2212.12965; see the module's text).

    With p = softmax(z/τ), H the entropy in nats of softmax(z/τ_H), and the other network's logits detached::

        L_student = λ_ce·CE(y, z_s) + λ_s·τ²·mean[w_f·KL(p_t‖p_s) + w_r·KL(p_s‖p_t)]
        L_teacher = λ_ce·CE(y, z_t) + λ_t·τ²·mean[KL(p_s‖p_t)]

        hard gate:  w_r = ν_r where H_s > H_t, else 1          w_f = ν_f where H_t > H_s, else 1
        soft gate:  w_r = 1 + (ν_r−1)·σ(k·(H_s−H_t))           w_f = 1 + (ν_f−1)·σ(k·(H_t−H_s))

    An under-confident student (H_s > H_t) is sharpened by the mode-seeking reverse term, an over-confident one
    softened by the mass-covering forward term. The weights carry no gradient; a tie boosts neither term.

    Beside the common diagnostics (entropies at τ_H, divergences at τ) there are ``student/boosted_forward`` and
    ``student/boosted_reverse``: the shares of samples with H_t > H_s and H_s > H_t, for either gate.

    Of several students each is balanced against the teacher, whose divergence is the mean over them.

    Attributes:
        nu_forward: ν_f, the boost of KL(p_t‖p_s).
        nu_reverse: ν_r, the boost of KL(p_s‖p_t).
        temperature: τ of the divergences.
        entropy_temperature: τ_H of the gate's entropies.
        ce_weight: λ_ce, in both losses.
        student_weight: λ_s.
        teacher_weight: λ_t.
        gate: ``hard`` or ``soft``.
        sharpness: k of the soft gate, per nat; the hard gate has none.
        teacher_term: The teacher's divergence: KL(p_s‖p_t) is ``student_to_teacher``, KL(p_t‖p_s)
            ``teacher_to_student``, the student's form with the networks swapped ``balanced``.

    Raises:
        UserError: A parameter is out of range.
    """

    name: Literal["bdkd"] = "bdkd"
    nu_forward: Number = 2.0
    nu_reverse: Number = 2.0
    temperature: Number = 1.0
    entropy_temperature: Number = 1.0
    ce_weight: Number = 1.0
    student_weight: Number = 1.0
    teacher_weight: Number = 1.0
    gate: Gate = "hard"
    sharpness: Number = 4.0
    teacher_term: TeacherTerm = "student_to_teacher"

    def __post_init__(self) -> None:
        for field in ("nu_forward", "nu_reverse", "ce_weight", "student_weight", "teacher_weight"):
            check_number(field, getattr(self, field))
        for field in ("temperature", "entropy_temperature", "sharpness"):
            check_number(field, getattr(self, field), positive=True)
        check_word("gate", self.gate, get_args(Gate))
        check_word("teacher_term", self.teacher_term, get_args(TeacherTerm))

    def pair(self, student: Tensor, teacher: Tensor, targets: Tensor) -> PairParts:
        """See :class:`~bdkd_dist.objectives.base.PairwiseObjective`."""
        log_student, student_at_tau, student_at_gate = self._log_probabilities(student)
        log_teacher, teacher_at_tau, teacher_at_gate = self._log_probabilities(teacher)
        student_ce, teacher_ce = cross_entropy(log_student, targets), cross_entropy(log_teacher, targets)
        student_entropy, teacher_entropy = entropy(student_at_gate.detach()), entropy(teacher_at_gate.detach())
        gap = student_entropy - teacher_entropy

        forward = kl_divergence(teacher_at_tau.detach(), student_at_tau)
        reverse = kl_divergence(student_at_tau, teacher_at_tau.detach())
        scale = value(self.student_weight) * value(self.temperature) ** 2
        student_terms = {
            "ce": value(self.ce_weight) * student_ce,
            "forward": scale * self._weight(value(self.nu_forward), -gap) * forward,
            "reverse": scale * self._weight(value(self.nu_reverse), gap) * reverse,
        }
        teacher_terms = {
            "ce": value(self.ce_weight) * teacher_ce,
            **self._teacher_terms(student_at_tau.detach(), teacher_at_tau, gap),
        }
        watched = watch(
            student_ce=student_ce,
            teacher_ce=teacher_ce,
            student_entropy=student_entropy,
            teacher_entropy=teacher_entropy,
            forward_kl=forward,
            reverse_kl=reverse,
            boosted_forward=(gap < 0).to(gap.dtype),
            boosted_reverse=(gap > 0).to(gap.dtype),
        )
        return PairParts(student_terms, teacher_terms, watched)

    def _log_probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities at temperatures 1, τ and τ_H; equal temperatures share one softmax."""
        tau, tau_entropy = value(self.temperature), value(self.entropy_temperature)
        at_one = log_probabilities(logits)
        at_tau = at_one if equals(tau, 1) else log_probabilities(logits, tau)
        if equals(tau_entropy, 1):
            return at_one, at_tau, at_one
        if not isinstance(tau, Tensor) and equals(tau_entropy, tau):
            return at_one, at_tau, at_tau
        return at_one, at_tau, log_probabilities(logits, tau_entropy)

    def _weight(self, nu: Value, gap: Tensor) -> Tensor:
        opened = (gap > 0).to(gap.dtype) if self.gate == "hard" else torch.sigmoid(value(self.sharpness) * gap)
        return 1 + (nu - 1) * opened

    def _teacher_terms(self, log_student: Tensor, log_teacher: Tensor, gap: Tensor) -> Terms:
        """Return the divergences of the teacher, for which its own direction to the student is the reverse one."""
        scale = value(self.teacher_weight) * value(self.temperature) ** 2
        terms: Terms = {}
        if self.teacher_term in ("student_to_teacher", "balanced"):
            weight = self._weight(value(self.nu_forward), gap) if self.teacher_term == "balanced" else 1
            terms["forward"] = scale * weight * kl_divergence(log_student, log_teacher)
        if self.teacher_term in ("teacher_to_student", "balanced"):
            weight = self._weight(value(self.nu_reverse), -gap) if self.teacher_term == "balanced" else 1
            terms["reverse"] = scale * weight * kl_divergence(log_teacher, log_student)
        return terms
