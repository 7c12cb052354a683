"""Cost of each objective as a share of a training step.

    .venv/bin/python benchmarks/objectives.py [--recipe cifar100_r56_r20] [--rounds 15]

An objective's cost is its forward and backward at the logits, diagnostics included; the step is ``Trainer``'s whole
step with ``bdkd`` on a batch in memory. Both alternate in rounds, medians count; the last line is the largest share.
"""

import argparse
import statistics

import torch
from machine import Work, header, rounds
from step import random_batch, trainer_of

from bdkd_dist import config
from bdkd_dist.objectives import KDCL, OBJECTIVES, Objective

VARIANTS: dict[str, Objective] = {
    **{name: kind() for name, kind in OBJECTIVES.items()},
    "kdcl naive": KDCL(ensemble="naive"),
    "kdcl linear": KDCL(ensemble="linear"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar100_r56_r20")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    recipe = config.load(arguments.recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = trainer_of(recipe, device)
    batch = random_batch(recipe, device)
    work: dict[str, Work] = {"step": lambda: trainer._train_step(batch)}
    work |= {name: alone(objective, recipe, batch.labels) for name, objective in VARIANTS.items()}
    times = rounds(work, arguments.rounds, warm_up=2, device=device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    step = medians.pop("step")
    print(header(threads=True))
    print(f"{arguments.recipe}, batch {recipe.train.batch_size}: step {1e3 * step:.2f} ms")
    for name, seconds in medians.items():
        print(f"{name:12} {1e3 * seconds:7.3f} ms  {100 * seconds / step:5.2f} % of the step")
    worst = max(medians, key=lambda name: medians[name])
    print(f"largest share: {100 * medians[worst] / step:.2f} % ({worst})")


def alone(objective: Objective, recipe: config.Recipe, labels: torch.Tensor) -> Work:
    """An objective's forward and backward at logits of the recipe's shape."""
    shape = (len(labels), recipe.data.num_classes)
    student, teacher = (torch.randn(shape, device=labels.device, requires_grad=True) for _ in range(2))

    def run() -> None:
        losses = objective.compute(student, teacher, labels)
        (losses.student_loss + losses.teacher_loss).backward()
        student.grad = teacher.grad = None

    return run


if __name__ == "__main__":
    main()
