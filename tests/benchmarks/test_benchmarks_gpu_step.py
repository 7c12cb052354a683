"""The step that the benchmark writes out as public code would computes what ours does."""

import importlib
import sys
from pathlib import Path

import torch

from bdkd_dist.objectives import BDKD

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
gpu_step = importlib.import_module("gpu_step")


def test_the_loss_written_out_is_the_objectives() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (64,), generator=generator)
    student, teacher = (3 * torch.randn(64, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    found, expected = [], []
    for outcome, losses in ((found, gpu_step.losses), (expected, BDKD())):
        logits = [z.clone().requires_grad_() for z in (student, teacher)]
        of_student, of_teacher = losses(*logits, labels)[:2]
        (of_student + of_teacher).backward()
        outcome += [of_student.detach(), of_teacher.detach(), *(z.grad for z in logits)]
    torch.testing.assert_close(found, expected)
