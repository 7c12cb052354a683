"""The learning rate as a function of the step, against values worked by hand."""

import math

import pytest

from bdkd_dist.config import Schedule
from bdkd_dist.engine.optim import learning_rate


def rates(schedule: Schedule, steps: list[int]) -> list[float]:
    return [learning_rate(step, steps_per_epoch=10, epochs=10, lr=0.4, schedule=schedule) for step in steps]


def test_cosine_falls_from_the_full_rate_to_nearly_zero() -> None:
    got = rates(Schedule(kind="cosine"), [0, 25, 50, 75, 99])
    by_hand = [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5)), 0.2 * (1 - math.cos(math.pi / 100))]
    assert got == pytest.approx(by_hand, rel=1e-12)


def test_warmup_rises_in_equal_steps_to_the_full_rate() -> None:
    got = rates(Schedule(kind="cosine", warmup_epochs=0.5), [0, 1, 2, 3, 4, 5])
    assert got == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4, 0.4], rel=1e-12)


def test_step_multiplies_at_each_milestone() -> None:
    got = rates(Schedule(kind="step", milestones=(3, 6), gamma=0.1), [29, 30, 59, 60, 99])
    assert got == pytest.approx([0.4, 0.04, 0.04, 0.004, 0.004], rel=1e-12)
