"""What every objective shares: the interface, the precision, the checks, and what is watched beside the losses."""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from bdkd_dist.errors import UserError, unknown
from bdkd_dist.objectives.divergences import cross_entropy, entropy, kl_divergence
from bdkd_dist.objectives.schedule import ParameterSchedule

Terms = dict[str, Tensor]
"""What a network minimises: (N,) values by term, weights included; the loss is the mean of their sum."""

QUANTILES = (10, 50, 90)
"""Percent, of the entropy gap H_s − H_t over a batch."""

SUM_TOLERANCE = 1e-3
"""How far the sum of a soft target may lie from 1; where its type is coarser, that type's resolution."""


class Losses(NamedTuple):
    """What an objective returns for a batch.

    Attributes:
        student_loss: Scalar, batch mean; its gradient reaches the student's logits alone. With several students the
            sum of their losses, each of which reaches its own student alone.
        teacher_loss: Scalar, batch mean; its gradient reaches the teacher's logits alone.
        diagnostics: Detached scalars, batch means in nats, named ``network/quantity``: ``loss`` of each network that
            learns, ``ce`` and ``entropy`` of each; for a student also ``forward_kl`` (KL(p_t‖p_s)), ``reverse_kl``
            (KL(p_s‖p_t)), and ``entropy_gap_p10``, ``_p50``, ``_p90``, quantiles of H_s − H_t over the given batch (so
            that of several workers each speaks of its part); and what an objective adds. The networks are ``teacher``
            and ``student``, or ``student_1``, ``student_2`` and so on.
    """

    student_loss: Tensor
    teacher_loss: Tensor
    diagnostics: dict[str, Tensor]


class Parts(NamedTuple):
    """The losses before they are added up and averaged."""

    students: list[Terms]
    teacher: Terms
    watched: dict[str, Tensor]
    """(N,) or scalar values by ``network/quantity``."""


class Objective(ABC):
    """A pure function of the networks' logits and the targets; its fields are its section of a recipe.

    Subclasses are frozen keyword-only dataclasses with a literal ``name``, and define :meth:`parts`. The formulas run
    in float32 or wider whatever the logits' type, and outside any autocast. Nothing depends on a tensor's value in
    Python, so that a step never waits for the device and compiles as one graph.

    A number may be a :class:`~bdkd_dist.objectives.schedule.ParameterSchedule`; :meth:`at` gives the objective of a
    moment, :meth:`bound` the objective of a loop that changes its numbers in place.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # read where recipes are checked

    teacher_learns: ClassVar[bool] = True
    """False where the teacher is given and frozen."""
    max_students: ClassVar[int | None] = None
    """None: any number of students."""
    uses_past: ClassVar[bool] = False
    """Whether networks learn from what they said of the same samples before."""

    name: str

    @property
    def schedules(self) -> dict[str, ParameterSchedule]:
        """The parameters that change over training, by name."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {name: value for name, value in values.items() if isinstance(value, ParameterSchedule)}

    def at(self, progress: float) -> Self:
        """Return the objective as it is once a share ``progress``, in [0, 1], of all steps is done."""
        values = {name: schedule.at(progress) for name, schedule in self.schedules.items()}
        return dataclasses.replace(self, **values)  # type: ignore[type-var]

    def bound(self, values: Mapping[str, Tensor]) -> Self:
        """Return the objective with scalar tensors in place of parameters.

        Whoever holds them may write to them between steps: a compiled or recorded step reads them where they are.

        Args:
            values: 0-dim float64 tensors on the logits' device, by name; within the parameters' bounds.
        """
        bound = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(bound, name, value)
        return bound

    def __call__(
        self,
        student_logits: Tensor | Sequence[Tensor],
        teacher_logits: Tensor,
        targets: Tensor,
        past: Sequence[Tensor] | Tensor | None = None,
    ) -> Losses:
        """Return the losses of a batch.

        On the CPU, and outside ``torch.compile``, values are checked too (see :meth:`check_values`); elsewhere that
        would make every step wait for the device.

        Args:
            student_logits: (B, K) of any floating type, or dense, (B, K, H, W); or a sequence of those, one a student.
            teacher_logits: Of the same shape.
            targets: (B,) or (B, H, W) int64 class indices; or class probabilities of the logits' shape, as mixup,
                cutmix and label smoothing make them. Every position of a dense output counts as a sample.
            past: Where the objective uses it: the probabilities, of the logits' shape, that each network gave these
                samples before, the teacher's last; zeros for a sample that is seen for the first time. None: all are.

        Raises:
            UserError: Shapes or types do not fit together, a logit is not finite, or a target is none.
        """
        if not torch.compiler.is_compiling() and teacher_logits.device.type == "cpu":
            self.check_values(student_logits, teacher_logits, targets)
        return self.compute(student_logits, teacher_logits, targets, past)

    def compute(
        self,
        student_logits: Tensor | Sequence[Tensor],
        teacher_logits: Tensor,
        targets: Tensor,
        past: Sequence[Tensor] | Tensor | None = None,
    ) -> Losses:
        """Return the losses of a batch without a look at any value; for the rest as a call."""
        students = self._students(student_logits, teacher_logits, targets)
        with torch.autocast(teacher_logits.device.type, enabled=False):
            rows = [_rows(z) for z in (*students, teacher_logits)]
            parts = self._parts(rows, _target_rows(targets), past)
            networks = [*parts.students, parts.teacher]
            losses = [_total(terms, teacher_logits).mean() for terms in networks]
        names = [*student_names(len(students)), "teacher"]
        each = zip(names, networks, losses, strict=True)
        diagnostics = {f"{name}/loss": loss.detach() for name, terms, loss in each if terms}
        diagnostics |= {name: values.detach().mean() for name, values in parts.watched.items()}
        return Losses(sum(losses[1:-1], start=losses[0]), losses[-1], diagnostics)

    def gradient_shares(
        self,
        student_logits: Tensor | Sequence[Tensor],
        teacher_logits: Tensor,
        targets: Tensor,
        past: Sequence[Tensor] | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return how much each term pulls at a network: its share of the gradient norms at the logits.

        A term's pull is the sum over samples of ‖∂term/∂z‖₂; the shares of a network's terms add up to 1, or are all
        0 where nothing pulls. One more pass through the objective; the networks are not touched.

        Args:
            student_logits: As for a call.
            teacher_logits: As for a call.
            targets: As for a call.
            past: As for a call.

        Returns:
            Scalars by ``network/gradient_share_term``, e.g. ``student/gradient_share_reverse``.

        Raises:
            UserError: Shapes or types do not fit together.
        """
        students = self._students(student_logits, teacher_logits, targets)
        leaves = [_rows(z).detach().requires_grad_() for z in (*students, teacher_logits)]
        shares: dict[str, Tensor] = {}
        with torch.enable_grad(), torch.autocast(teacher_logits.device.type, enabled=False):
            parts = self._parts(leaves, _target_rows(targets), past)
            names = [*student_names(len(students)), "teacher"]
            for name, terms, leaf in zip(names, [*parts.students, parts.teacher], leaves, strict=True):
                pulls = {term: _pull(values, leaf) for term, values in terms.items()}
                total = sum(pulls.values(), start=torch.zeros((), dtype=leaf.dtype, device=leaf.device))
                for term, pull in pulls.items():
                    shares[f"{name}/gradient_share_{term}"] = torch.where(total > 0, pull / total, 0.0)
        return shares

    def check_values(self, student_logits: Tensor | Sequence[Tensor], teacher_logits: Tensor, targets: Tensor) -> None:
        """Raise UserError for logits that are not finite and targets that are none; waits for the device."""
        students = self._students(student_logits, teacher_logits, targets)
        names = [*student_names(len(students)), "teacher"]
        for name, logits in zip(names, (*students, teacher_logits), strict=True):
            if bad := int((~logits.isfinite()).sum()):
                raise UserError(f"{name} logits: {bad} of {logits.numel()} are not finite (allowed: finite values)")
        classes = teacher_logits.shape[1]
        if targets.is_floating_point():
            off = (targets.double().sum(dim=1) - 1).abs() > max(SUM_TOLERANCE, torch.finfo(targets.dtype).eps)
            if bad := int((~(targets >= 0)).sum() + off.sum()):
                raise UserError(
                    f"targets: {bad} soft targets are no probabilities (allowed: >= 0, adding up to 1 over classes)"
                )
        elif bad := int(((targets < 0) | (targets >= classes)).sum()):
            raise UserError(f"targets: {bad} of {targets.numel()} are no class index (allowed: 0 to {classes - 1})")

    @abstractmethod
    def parts(self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Parts:
        """Return what each network minimises, for (N, K) logits in float32 or float64 whose shapes fit."""

    def parts_after(
        self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor, past: Sequence[Tensor]
    ) -> Parts:
        """Return :meth:`parts` where ``past`` has each network's (N, K) probabilities of before, the teacher's last."""
        raise NotImplementedError(f"{self.name} does not learn from past predictions")

    def _parts(self, rows: Sequence[Tensor], targets: Tensor, past: Sequence[Tensor] | Tensor | None) -> Parts:
        """Return the parts for all networks' (N, K) logits, the teacher's last."""
        *students, teacher = rows
        if past is None or not self.uses_past:
            return self.parts(students, teacher, targets)
        return self.parts_after(students, teacher, targets, [_rows(own) for own in past])

    def _students(
        self, student_logits: Tensor | Sequence[Tensor], teacher_logits: Tensor, targets: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the students' logits as a tuple, once it is sure that shapes and types fit."""
        students = (student_logits,) if isinstance(student_logits, Tensor) else tuple(student_logits)
        _check_shapes(students, teacher_logits, targets)
        if self.max_students is not None and len(students) > self.max_students:
            raise UserError(f"objective {self.name}: {len(students)} students (allowed: {self.max_students})")
        return students


class PairParts(NamedTuple):
    """:class:`Parts` of one student and the teacher; ``watched`` has the names of a single student."""

    student: Terms
    teacher: Terms
    watched: dict[str, Tensor]


class PairwiseObjective(Objective):
    """An objective between a student and the teacher; of several students each stands beside the teacher alone.

    The teacher's terms are then means over the students.
    """

    def parts(self, students: Sequence[Tensor], teacher: Tensor, targets: Tensor) -> Parts:
        """See :meth:`Objective.parts`."""
        pairs = [self.pair(student, teacher, targets) for student in students]
        watched: dict[str, Tensor] = {}
        for name, pair in zip(student_names(len(pairs)), pairs, strict=True):
            watched |= {key.replace("student/", f"{name}/", 1): values for key, values in pair.watched.items()}
        means = {
            term: sum((pair.teacher[term] for pair in pairs[1:]), start=values) / len(pairs)
            for term, values in pairs[0].teacher.items()
        }
        return Parts([pair.student for pair in pairs], means, watched)

    @abstractmethod
    def pair(self, student: Tensor, teacher: Tensor, targets: Tensor) -> PairParts:
        """Return :meth:`parts` of one student."""


def student_names(count: int) -> list[str]:
    """Return the names of ``count`` students: ``student``, or ``student_1``, ``student_2`` and so on."""
    return ["student"] if count == 1 else [f"student_{number}" for number in range(1, count + 1)]


def watch(
    *,
    student_ce: Tensor,
    teacher_ce: Tensor,
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    forward_kl: Tensor,
    reverse_kl: Tensor,
    student: str = "student",
    **more: Tensor,
) -> dict[str, Tensor]:
    """Return (N,) values under the names of :class:`Losses`; ``more`` is the student's."""
    gap = (student_entropy - teacher_entropy).detach().sort().values
    return {
        f"{student}/ce": student_ce,
        "teacher/ce": teacher_ce,
        f"{student}/entropy": student_entropy,
        "teacher/entropy": teacher_entropy,
        f"{student}/forward_kl": forward_kl,
        f"{student}/reverse_kl": reverse_kl,
        **{f"{student}/entropy_gap_p{q}": gap[(len(gap) - 1) * q // 100] for q in QUANTILES},
        **{f"{student}/{name}": values for name, values in more.items()},
    }


def watch_apart(
    log_student: Tensor, log_teacher: Tensor, targets: Tensor, student: str = "student"
) -> dict[str, Tensor]:
    """Return :func:`watch` of log-probabilities, for objectives that do not need these values themselves."""
    log_student, log_teacher = log_student.detach(), log_teacher.detach()
    return watch(
        student_ce=cross_entropy(log_student, targets),
        teacher_ce=cross_entropy(log_teacher, targets),
        student_entropy=entropy(log_student),
        teacher_entropy=entropy(log_teacher),
        forward_kl=kl_divergence(log_teacher, log_student),
        reverse_kl=kl_divergence(log_student, log_teacher),
        student=student,
    )


def watch_students(logs: Sequence[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Return :func:`watch_apart` of each student, for all networks' log-probabilities, the teacher's last."""
    watched: dict[str, Tensor] = {}
    for name, log_student in zip(student_names(len(logs) - 1), logs[:-1], strict=True):
        watched |= watch_apart(log_student, logs[-1], targets, name)
    return watched


def check_word(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError unless a parameter is one of the allowed words."""
    if value not in allowed:
        raise unknown(field, str(value), allowed)


def _rows(logits: Tensor) -> Tensor:
    """Return (N, K) logits in float32 or wider, every position of a dense output a row."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if wide.ndim == 2 else wide.movedim(1, -1).flatten(0, -2)


def _target_rows(targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return targets if targets.ndim == 2 else targets.movedim(1, -1).flatten(0, -2)
    return targets.flatten()


def _total(terms: Terms, like: Tensor) -> Tensor:
    """Return the (N,) sum of a network's terms; without any, a zero that carries no gradient."""
    if not terms:
        return like.new_zeros(1, dtype=torch.promote_types(like.dtype, torch.float32))
    first, *others = terms.values()
    return sum(others, start=first)


def _pull(values: Tensor, leaf: Tensor) -> Tensor:
    if not values.requires_grad:
        return torch.zeros((), dtype=leaf.dtype, device=leaf.device)
    (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True, allow_unused=True)
    return torch.zeros((), dtype=leaf.dtype, device=leaf.device) if gradient is None else gradient.norm(dim=1).sum()


def _check_shapes(students: tuple[Tensor, ...], teacher: Tensor, targets: Tensor) -> None:
    """Raise UserError for shapes and types that do not fit, without a look at any value."""
    indices = targets.dtype == torch.int64 and targets.shape == teacher.shape[:1] + teacher.shape[2:]
    probabilities = targets.is_floating_point() and targets.shape == teacher.shape
    same = bool(students) and all(student.shape == teacher.shape for student in students)
    floating = all(logits.is_floating_point() for logits in (*students, teacher))
    if teacher.ndim < 2 or not teacher.numel() or not same or not floating or not (indices or probabilities):
        raise UserError(
            f"objective: student logits {', '.join(map(_kind, students)) or 'none'}, teacher logits {_kind(teacher)} "
            f"and targets {_kind(targets)} do not fit (allowed: floating logits (B, K) or dense (B, K, …), all of "
            "one shape, none empty; targets (B,) or (B, …) int64, or floating of the logits' shape)"
        )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
