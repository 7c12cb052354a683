"""The objectives that the tests go through, and batches for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from numpy_reference import Networks
from torch import Tensor

from bdkd_dist.objectives import (
    ABKD,
    AKL,
    BDKD,
    CE,
    DML,
    JSD,
    KD,
    KDCL,
    MDCA,
    PSKD,
    Competitive,
    Focal,
    Jeffreys,
    Losses,
    Objective,
    Skew,
    SwitOKD,
)

EVERY: dict[str, Objective] = {
    "bdkd": BDKD(),
    "ce": CE(),
    "kd": KD(),
    "dml": DML(),
    "kdcl_min_logit": KDCL(),
    "kdcl_naive": KDCL(ensemble="naive"),
    "kdcl_linear": KDCL(ensemble="linear"),
    "switokd": SwitOKD(),
    "competitive": Competitive(),
    "ps_kd": PSKD(past_share=0.3),
    "focal": Focal(),
    "mdca": MDCA(),
    "jeffreys": Jeffreys(),
    "jsd": JSD(),
    "skew": Skew(),
    "akl": AKL(),
    "abkd": ABKD(),
}
"""Each objective once, and each way of it that is another computation altogether, at the defaults."""

VARIANTS: dict[str, Objective] = EVERY | {
    "bdkd_boosts": BDKD(nu_forward=3, nu_reverse=0.5, temperature=2.5, entropy_temperature=4),
    "bdkd_one_temperature": BDKD(temperature=4, entropy_temperature=4, teacher_term="teacher_to_student"),
    "bdkd_balanced": BDKD(temperature=0.5, teacher_term="balanced", nu_forward=1.5, nu_reverse=3),
    "bdkd_alone": BDKD(ce_weight=0.3, student_weight=0.7, teacher_weight=1.9, teacher_term="none"),
    "bdkd_no_boost": BDKD(ce_weight=0.3, student_weight=0.7, teacher_weight=1.9, nu_forward=0, nu_reverse=0),
    "bdkd_soft": BDKD(gate="soft", sharpness=1.7, nu_forward=3, nu_reverse=2, entropy_temperature=2),
    "bdkd_soft_balanced": BDKD(gate="soft", teacher_term="balanced", nu_forward=3, nu_reverse=0.25, temperature=3),
    "kd_cold": KD(temperature=0.7, ce_weight=1.2, weight=2),
    "dml_weight": DML(weight=2.5),
    "kdcl_min_logit_warm": KDCL(temperature=3.5, weight=0.4),
    "kdcl_naive_cold": KDCL(ensemble="naive", temperature=0.6, weight=1.3),
    "kdcl_linear_cold": KDCL(ensemble="linear", temperature=1, weight=0.8),
    "competitive_warm": Competitive(temperature=3, weight=0.6),
    "focal_none": Focal(gamma_low=0, gamma_high=0),
    "focal_gentle": Focal(gamma_low=2, gamma_high=0.5, threshold=0.4),
    "mdca_heavy": MDCA(weight=7.5),
    "jeffreys_warm": Jeffreys(temperature=3, ce_weight=0.2, student_weight=0.6, teacher_weight=1.7),
    "jsd_cold": JSD(temperature=0.5, ce_weight=2, student_weight=3, teacher_weight=0.5),
    "skew_none": Skew(skew=0),
    "skew_most": Skew(skew=0.95, temperature=2, student_weight=1.5),
    "akl_narrow": AKL(head_mass=0.2, temperature=2),
    "akl_wide": AKL(head_mass=0.93, ce_weight=0.5),
    "abkd_forward": ABKD(alpha=1, beta=0),
    "abkd_reverse": ABKD(alpha=0, beta=1, temperature=2),
    "abkd_limit_alpha": ABKD(alpha=0, beta=0.4),
    "abkd_limit_beta": ABKD(alpha=1.6, beta=0, student_weight=0.3),
    "abkd_large": ABKD(alpha=1.2, beta=0.7, temperature=4),
}
"""Every parameter away from its default somewhere."""

every_objective = pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY)
every_variant = pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)

HALF = (torch.float16, torch.bfloat16)


def tolerance(objective: Objective, students: int = 1) -> float:
    """How close to the reference."""
    # Rounding. But the mixing weights of KDCL's "linear" are found to about 1e-6, by bisection.
    if getattr(objective, "ensemble", "") == "linear":
        return 3e-5
    return 1e-10


def several(objective: Objective) -> bool:
    return objective.max_students is None


def batch(
    seed: int = 0,
    samples: int = 16,
    classes: int = 7,
    scale: float = 2.0,
    students: int = 1,
    soft: bool = False,
) -> tuple[Networks, NDArray[Any]]:
    """Logits of the networks, the teacher's somewhat sharper, and targets that half of the samples' teachers know."""
    rng = np.random.default_rng(seed)
    z = [scale * rng.normal(size=(samples, classes)) for _ in range(students)]
    teacher = 1.3 * scale * rng.normal(size=(samples, classes))
    y = np.where(rng.random(samples) < 0.5, teacher.argmax(axis=1), rng.integers(classes, size=samples))
    return Networks(z, teacher), rng.dirichlet(np.full(classes, 0.4), size=samples) if soft else y


def leaves(z: Networks, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Fresh logits that want a gradient."""
    students = [torch.tensor(each, dtype=dtype).requires_grad_() for each in z.students]
    return students, torch.tensor(z.teacher, dtype=dtype).requires_grad_()


def losses_of(objective: Objective, z: Networks, targets: NDArray[Any]) -> Losses:
    students, teacher = leaves(z)
    return objective(students if len(students) > 1 else students[0], teacher, torch.tensor(targets))


def gradients_of(objective: Objective, z: Networks, targets: NDArray[Any]) -> list[NDArray[Any]]:
    """The gradient of each network's loss by its own logits."""
    students, teacher = leaves(z)
    losses = objective(students if len(students) > 1 else students[0], teacher, torch.tensor(targets))
    by_students = torch.autograd.grad(losses.student_loss, students)
    if not losses.teacher_loss.requires_grad:
        return [*(g.numpy() for g in by_students), np.zeros_like(z.teacher)]
    return [g.numpy() for g in (*by_students, *torch.autograd.grad(losses.teacher_loss, teacher))]


def scalars(losses: Losses) -> dict[str, Tensor]:
    return {"student_loss": losses.student_loss, "teacher_loss": losses.teacher_loss, **losses.diagnostics}


def torch_batch(
    samples: int = 12, classes: int = 6, dtype: torch.dtype = torch.float32, students: int = 1
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """Leaves of float type ``dtype`` and hard targets."""
    z, y = batch(3, samples, classes, students=students)
    return *leaves(z, dtype), torch.tensor(y)
