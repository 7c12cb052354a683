"""What every objective shares: the interface, the precision, and the divergences from log-probabilities."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bdkd_dist.errors import UserError, unknown


class Losses(NamedTuple):
    """What an objective returns for a batch.

    Attributes:
        student_loss: Scalar, batch mean; its gradient reaches the student's logits alone.
        teacher_loss: Scalar, batch mean; its gradient reaches the teacher's logits alone.
        diagnostics: Detached scalars, batch means: ``student/ce``, ``teacher/ce``, ``student/entropy``,
            ``teacher/entropy``, ``forward_kl`` (KL(p_t‖p_s)), ``reverse_kl`` (KL(p_s‖p_t)), all in nats, and what an
            objective adds.
    """

    student_loss: Tensor
    teacher_loss: Tensor
    diagnostics: dict[str, Tensor]


class Objective(ABC):
    """A pure function of both networks' logits and the targets; its fields are its section of a recipe.

    Subclasses are frozen keyword-only dataclasses with a literal ``name``, and define :meth:`losses`. The formulas
    run in float32 or wider whatever the logits' type, and outside any autocast. Nothing depends on a tensor's value
    in Python, so that a step never waits for the device and compiles as one graph.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # read where recipes are checked

    name: str

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Losses:
        """Return the losses of a batch.

        Args:
            student_logits: (B, K) of any floating type.
            teacher_logits: (B, K).
            targets: (B,) int64 class indices, or (B, K) floating class probabilities.

        Raises:
            UserError: The shapes or types do not fit together.
        """
        _check_inputs(student_logits, teacher_logits, targets)
        with torch.autocast(student_logits.device.type, enabled=False):
            return self.losses(_widened(student_logits), _widened(teacher_logits), targets)

    @abstractmethod
    def losses(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Losses:
        """Return the losses of a batch whose logits are float32 or float64 and whose shapes fit."""


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the (B, K) log-softmax of ``logits / temperature``."""
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (B,) KL(p‖q) in nats from (B, K) log-probabilities: finite wherever those are."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def entropy(log_p: Tensor) -> Tensor:
    """Return (B,) Shannon entropies in nats from (B, K) log-probabilities."""
    return -(log_p.exp() * log_p).sum(dim=1)


def cross_entropy(log_p: Tensor, targets: Tensor) -> Tensor:
    """Return (B,) cross-entropies in nats.

    Args:
        log_p: (B, K) log-probabilities.
        targets: (B,) int64 class indices (each must be one: there is no index to ignore), or (B, K) probabilities.
    """
    if targets.is_floating_point():
        return -(targets.to(log_p.dtype) * log_p).sum(dim=1)
    return -log_p.gather(1, targets[:, None]).squeeze(1)


def diagnostics(
    *,
    student_ce: Tensor,
    teacher_ce: Tensor,
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    forward_kl: Tensor,
    reverse_kl: Tensor,
    **more: Tensor,
) -> dict[str, Tensor]:
    """Return detached batch means of (B,) values under the names of :class:`Losses`."""
    per_sample = {
        "student/ce": student_ce,
        "teacher/ce": teacher_ce,
        "student/entropy": student_entropy,
        "teacher/entropy": teacher_entropy,
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        **more,
    }
    return {name: values.detach().mean() for name, values in per_sample.items()}


def check_number(field: str, value: float, *, positive: bool = False) -> None:
    """Raise UserError unless a parameter is a finite number that is not negative, or above 0 where asked."""
    number = isinstance(value, int | float) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        raise UserError(f"{field}={value} is not allowed (allowed: finite, {'> 0' if positive else '>= 0'})")


def check_word(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError unless a parameter is one of the allowed words."""
    if value not in allowed:
        raise unknown(field, str(value), allowed)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_inputs(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> None:
    """Raise UserError for shapes and types that do not fit, without a look at any value."""
    indices = targets.dtype == torch.int64 and targets.shape == student_logits.shape[:1]
    probabilities = targets.is_floating_point() and targets.shape == student_logits.shape
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape or not (indices or probabilities):
        raise UserError(
            f"objective: student logits {_kind(student_logits)}, teacher logits {_kind(teacher_logits)} and targets "
            f"{_kind(targets)} do not fit (allowed: logits (B, K) both, targets (B,) int64 or (B, K) floating)"
        )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
