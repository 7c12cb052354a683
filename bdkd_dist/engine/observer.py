"""What the loop tells whoever watches it: plain numbers, already on the host, already summed over ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from bdkd_dist.metrics import Reliability


@dataclass(frozen=True)
class StepLog:
    """Means over the steps since the last log."""

    step: int
    """Optimiser steps done since the run began."""
    total_steps: int
    epoch: int
    """Epoch under way, from 0."""
    scalars: dict[str, float]
    """TensorBoard tag to value; a function of the recipe alone, so a resumed run repeats them."""
    images_per_s: float
    remaining_s: float


@dataclass(frozen=True)
class NetworkDiagnosis:
    """One network's calibration figure: bins, and the metrics that stand in its title."""

    metrics: dict[str, float]
    reliability: Reliability


@dataclass(frozen=True)
class EvalLog:
    """All networks on the validation split."""

    step: int
    epoch: int
    """Epochs completed."""
    networks: dict[str, NetworkDiagnosis]
    """By network: ``teacher``, ``student`` and, with a moving average, ``student_ema``."""
    entropies: dict[str, torch.Tensor] = field(default_factory=dict)
    """By network, (N,) in nats, sample by sample in one order: what the objective's gate would look at."""


class Observer(Protocol):
    """Watches a run. Only rank 0 has observers; what one of them does not care for it inherits."""

    def start(self, step: int, total_steps: int) -> None:
        """The loop begins or goes on at ``step``: what was recorded after it will come again, so forget it."""
        return

    def stepped(self, log: StepLog) -> None:
        """Some steps are done."""
        return

    def evaluated(self, log: EvalLog) -> None:
        """The validation split was evaluated."""
        return

    def flush(self) -> None:
        """Make everything recorded so far durable: a checkpoint that covers it follows."""
        return

    def close(self) -> None:
        """The loop ends, finished or not."""
        return


class Observers:
    """Several observers as one."""

    def __init__(self, members: Sequence[Observer] = ()):
        self.members = tuple(members)

    def start(self, step: int, total_steps: int) -> None:
        """See :meth:`Observer.start`."""
        for member in self.members:
            member.start(step, total_steps)

    def stepped(self, log: StepLog) -> None:
        """See :meth:`Observer.stepped`."""
        for member in self.members:
            member.stepped(log)

    def evaluated(self, log: EvalLog) -> None:
        """See :meth:`Observer.evaluated`."""
        for member in self.members:
            member.evaluated(log)

    def flush(self) -> None:
        """See :meth:`Observer.flush`."""
        for member in self.members:
            member.flush()

    def close(self) -> None:
        """See :meth:`Observer.close`."""
        for member in self.members:
            member.close()


@dataclass(frozen=True)
class SamplePredictions:
    """Per-sample outputs of one network on one split, on the CPU, in the order of ``indices``."""

    top_classes: torch.Tensor
    """(N, min(5, K)) int64, most probable first."""
    top_probabilities: torch.Tensor
    """(N, min(5, K)) float64 at temperature 1."""
    nll: torch.Tensor
    """(N,) float64, nats."""
