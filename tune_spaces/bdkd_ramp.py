"""BD-KD's ramp: how strongly the networks agree at last, when, at which temperature, and what is left of the labels.

    bdkd tune tune_spaces/bdkd_ramp.py cifar100_r56_r20 data.root=CIFAR100 --num-trials 48

Both divergences' weights rise from 0, so that the networks learn from labels first and agree later; weights that are
constant are in `bdkd_weighting`. Where the networks agree too much they become under-confident, so the search looks for
the whole trade-off between accuracy and calibration.
"""

from typing import Any

from ray import tune

DEFAULTS = {"goal": "pareto"}


def search_space() -> dict[str, Any]:
    """Return the domains; weights and temperatures are factors, so their ranges are logarithmic."""
    return {
        "objective.student_weight.start": 0.0,
        "objective.student_weight.shape": "sigmoid",
        # 3 to 10 were best in small studies; beyond 20 accuracy falls, below 1 little changes.
        "objective.student_weight.end": tune.loguniform(1.0, 20.0),
        "objective.teacher_weight.start": 0.0,
        "objective.teacher_weight.shape": "sigmoid",
        "objective.teacher_weight.end": tune.loguniform(0.5, 20.0),
        # 1 compares the networks' very probabilities, 4 is usual in distillation; τ² keeps the gradients' size.
        "objective.temperature": tune.loguniform(1.0, 8.0),
        # 1 leaves the labels as they are; less lets the networks' agreement replace them.
        "objective.ce_weight.start": 1.0,
        "objective.ce_weight.end": tune.uniform(0.5, 1.0),
        "objective.ce_weight.shape": "sigmoid",
        # 1 boosts nothing; below 1 the gate weakens its direction.
        "objective.nu_forward": tune.loguniform(0.5, 4.0),
        "objective.nu_reverse": tune.loguniform(0.5, 4.0),
    }
