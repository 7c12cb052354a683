"""BD-KD's weights as they should change while the networks train: population based training.

    bdkd tune tune_spaces/weighting_schedule.py cifar100_r56_r20 data.root=CIFAR100 --num-trials 8

Trials train side by side; now and then the worst ones go on from the weights of the best with a changed balance. What
the winner went through is a schedule: in the beginning the networks know little to teach each other. As many trials as
the machine holds at once are best: those that wait hold up the comparison.
"""

from typing import Any

from ray import tune

DEFAULTS = {"search": "random", "scheduler": "pbt"}


def search_space() -> dict[str, Any]:
    """Return the domains of what may change from one epoch to the next without a jump in the networks' task.

    Temperatures and the gate's form stay the recipe's. Ranges are those of ``bdkd_weighting``, logarithmic for the same
    reason, with BD-KD's defaults in them.
    """
    return {
        "objective.nu_forward": tune.loguniform(0.5, 8.0),
        "objective.nu_reverse": tune.loguniform(0.5, 8.0),
        "objective.student_weight": tune.loguniform(0.2, 5.0),
        "objective.teacher_weight": tune.loguniform(0.2, 5.0),
    }
