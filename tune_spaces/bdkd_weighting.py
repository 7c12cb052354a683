"""BD-KD's balance: how much each direction of the divergence counts, for which samples, against the labels.

    bdkd tune tune_spaces/bdkd_weighting.py cifar100_r56_r20 data.root=CIFAR100 --num-trials 48 --scheduler asha

All numbers multiply something, so that their ratios matter: each range is logarithmic, with BD-KD's default in it.
"""

from typing import Any

from ray import tune


def search_space() -> dict[str, Any]:
    """Return the domains of the objective's parameters; ``ce_weight`` stays, against which the others are measured."""
    return {
        # 1 boosts nothing, 2 and 3 are what later papers used; below 1 the gate weakens its direction instead.
        "objective.nu_forward": tune.loguniform(0.5, 8.0),
        "objective.nu_reverse": tune.loguniform(0.5, 8.0),
        # 1 compares the networks' very probabilities, 4 is usual in distillation; τ² keeps the gradients' size.
        "objective.temperature": tune.loguniform(0.5, 8.0),
        "objective.entropy_temperature": tune.loguniform(0.5, 8.0),
        # Times ν at most 40 times the cross-entropy, more of which rarely trains.
        "objective.student_weight": tune.loguniform(0.2, 5.0),
        "objective.teacher_weight": tune.loguniform(0.2, 5.0),
        # The soft gate's k, per nat of entropy: from nearly no gate to nearly the hard one, which does not read it.
        "objective.gate": tune.choice(["hard", "soft"]),
        "objective.sharpness": tune.loguniform(1.0, 16.0),
    }
