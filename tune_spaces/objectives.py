"""Every objective that trains both networks, three seeds each, with equal epochs: which one suits these data?

    bdkd tune tune_spaces/objectives.py cifar100_r56_r20 data.root=CIFAR100
    bdkd compare runs/cifar100_r56_r20-objectives

Nothing is stopped early and nothing is chosen, so that the test split may be looked at for all of them. Each objective
has its defaults, except that the recipe's own one keeps what the recipe sets.
"""

from typing import Any

from ray import tune

DEFAULTS = {"search": "grid", "scheduler": "none", "test": "all"}

# KD is missing: it learns from a finished teacher, from which the others must not begin. It is a search of its own over
# the same seeds, to be laid beside this one with `bdkd compare`; a trial of `ce` above leaves such a teacher:
#     "objective.name": "kd", "models.teacher_checkpoint": "RUN FOLDER", "train.seed": tune.grid_search([0, 1, 2])
OBJECTIVES = [
    *("bdkd", "ce", "dml", "kdcl", "switokd", "competitive", "ps_kd", "focal", "mdca"),
    *("jeffreys", "jsd", "skew", "akl", "abkd"),
]


def search_space() -> dict[str, Any]:
    """Return the grid; the seed of a trial sets its initial weights, order and crops for whichever objective."""
    return {
        "objective.name": tune.grid_search(OBJECTIVES),
        "train.seed": tune.grid_search([0, 1, 2]),
    }
