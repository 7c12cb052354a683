"""Every objective in plain NumPy float64, written from the formulas and the papers, not from the package.

Shapes: a network's logits are (N, K); targets are (N,) class indices or (N, K) probabilities. p is the teacher, q the
student. Sources beyond the papers: the authors' code of SwitOKD (hfutqian/SwitOKD), AKL (wutaiqiang/LLM_KD_AKL), ABKD
(ghwang-s/abkd), FLSD-53 (torrvision/focal_calibration) and MDCA (mdca-loss/MDCA-Calibration); for ABKD's limits
Cichocki, Cruces and Amari 2011, "Generalized Alpha-Beta Divergences" (the authors' code divides by β there, not by β²,
which is no limit of their general case).

What an objective holds fixed (gates, shares, the ensemble, the decision to wait, the other networks) is taken from
logits of its own, ``at``, so that a complex step through the rest gives the gradient to the last digit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize

Array = NDArray[np.float64]
STEP = 1e-30


class Networks(NamedTuple):
    students: Sequence[Array]
    teacher: Array

    @property
    def all(self) -> list[Array]:
        return [*self.students, self.teacher]


class Figures(NamedTuple):
    student_loss: float
    teacher_loss: float
    diagnostics: dict[str, float]


def log_softmax(z: Array, temperature: float = 1.0) -> Array:
    shifted = (z - z.real.max(axis=1, keepdims=True)) / temperature
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def softmax(z: Array, temperature: float = 1.0) -> Array:
    return np.exp(log_softmax(z, temperature))


def one_hot(targets: NDArray[Any], classes: int) -> Array:
    return np.eye(classes)[targets] if targets.ndim == 1 else targets.astype(np.float64)


def cross_entropy(z: Array, targets: NDArray[Any]) -> Array:
    return -(one_hot(targets, z.shape[1]) * log_softmax(z)).sum(axis=1)


def shannon(p: Array) -> Array:
    return -(p * np.log(p)).sum(axis=1)


def kl(p: Array, q: Array) -> Array:
    return (p * np.log(p / q)).sum(axis=1)


def jeffreys(p: Array, q: Array) -> Array:
    return ((p - q) * np.log(p / q)).sum(axis=1)


def jsd(p: Array, q: Array) -> Array:
    # As entropies, not as the two divergences from the middle: another way to the same number.
    return shannon((p + q) / 2) - (shannon(p) + shannon(q)) / 2


def skew(p: Array, q: Array, share: float) -> Array:
    return kl(p, share * p + (1 - share) * q)


def head_share(p: Array, q: Array, head_mass: float) -> Array:
    """Share of the head in Σ|p − q|: the teacher's likeliest classes, while their summed mass is at most head_mass."""
    shares = np.empty(len(p))
    for i, (teacher, student) in enumerate(zip(p, q, strict=True)):
        head = tail = mass = 0.0
        for rank, k in enumerate(sorted(range(len(teacher)), key=lambda k: -teacher[k])):
            mass += teacher[k]
            if rank == 0 or mass <= head_mass:
                head += abs(teacher[k] - student[k])
            else:
                tail += abs(teacher[k] - student[k])
        shares[i] = head / (head + tail)
    return shares


def akl(p: Array, q: Array, head: Array) -> Array:
    return head * kl(p, q) + (1 - head) * kl(q, p)


def alpha_beta(p: Array, q: Array, alpha: float, beta: float) -> Array:
    both = alpha + beta
    if alpha == 0 and beta == 0:
        each = np.log(p / q) ** 2 / 2
    elif alpha == 0:
        each = (q**beta * np.log(q**beta / p**beta) - q**beta + p**beta) / beta**2
    elif beta == 0:
        each = (p**alpha * np.log(p**alpha / q**alpha) - p**alpha + q**alpha) / alpha**2
    elif both == 0:
        each = (np.log(q**alpha / p**alpha) + (q**alpha / p**alpha) ** -1 - 1) / alpha**2
    else:
        each = -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both) / (alpha * beta)
    return each.sum(axis=1)


def bdkd_weights(objective: Any, own_entropy: Array, other_entropy: Array) -> tuple[Array, Array]:
    """(w_f, w_r) of a network, as the formulas say it, case by case."""
    if objective.gate == "hard":
        w_f = np.where(other_entropy > own_entropy, objective.nu_forward, 1.0)
        w_r = np.where(own_entropy > other_entropy, objective.nu_reverse, 1.0)
        return w_f, w_r
    k = objective.sharpness
    w_f = 1 + (objective.nu_forward - 1) / (1 + np.exp(-k * (other_entropy - own_entropy)))
    w_r = 1 + (objective.nu_reverse - 1) / (1 + np.exp(-k * (own_entropy - other_entropy)))
    return w_f, w_r


def bdkd_terms(o: Any, z: Networks, at: Networks) -> tuple[Array, Array]:
    """The divergence terms of one student and the teacher, before λ·τ²."""
    q, p, fixed_q, fixed_p = (softmax(each, o.temperature) for each in (*z.all, *at.all))
    h_s, h_t = (shannon(softmax(each, o.entropy_temperature)) for each in at.all)
    w_f, w_r = bdkd_weights(o, h_s, h_t)
    mirrored_f, mirrored_r = bdkd_weights(o, h_t, h_s)
    by_teacher = {
        "student_to_teacher": kl(fixed_q, p),
        "teacher_to_student": kl(p, fixed_q),
        "balanced": mirrored_f * kl(fixed_q, p) + mirrored_r * kl(p, fixed_q),
        "none": np.zeros(len(p)),
    }[o.teacher_term]
    return w_f * kl(fixed_p, q) + w_r * kl(q, fixed_p), by_teacher


def ensemble(kind: str, networks: Sequence[Array], targets: NDArray[Any]) -> Array:
    """KDCL's target logits (N, K) from all networks', sample by sample."""
    z = np.stack(networks)  # (M, N, K)
    y = one_hot(targets, z.shape[2])
    if kind == "min_logit":  # z − z_y; a soft target has the mean of its classes as z_y
        return (z - (y * z).sum(axis=2, keepdims=True)).min(axis=0)
    if kind == "naive":  # the network of least cross-entropy
        best = np.argmin([cross_entropy(each, targets) for each in networks], axis=0)
        return z[best, np.arange(len(y))]
    return np.stack([linear_ensemble(z[:, i], y[i]) for i in range(len(y))])


def linear_ensemble(z: Array, y: Array) -> Array:
    """The convex mixture αᵀz of one sample's (M, K) logits with the least cross-entropy, by SciPy.

    Of two networks by the root of the derivative, which is sharp also where the loss is as good as flat.
    """
    if len(z) == 2:
        margins = z - (z @ y)[:, None]
        difference = margins[0] - margins[1]

        def slope(share: float) -> float:
            return float(softmax((share * margins[0] + (1 - share) * margins[1])[None])[0] @ difference)

        if slope(0) >= 0 or slope(1) <= 0:
            return z[1] if slope(0) >= 0 else z[0]
        share = brentq(slope, 0, 1, xtol=1e-14)
        return share * z[0] + (1 - share) * z[1]

    def loss(alpha: Array) -> tuple[float, Array]:
        mixed = (alpha @ z)[None]
        return float(-(y * log_softmax(mixed)).sum()), z @ (softmax(mixed)[0] * y.sum() - y)

    count = len(z)
    found = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones_like(a)},
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 500},
    )
    return found.x @ z


def switokd_teacher_waits(z_s: Array, z_t: Array, targets: NDArray[Any]) -> bool:
    q, p, y = softmax(z_s), softmax(z_t), one_hot(targets, z_s.shape[1])
    gap, a, b = (np.abs(d).sum(axis=1).mean() for d in (q - p, q - y, p - y))
    threshold = a - np.exp(-b / (a + b)) * b
    return bool(gap > threshold and b < a)


def focal(o: Any, p: Array, fixed_p: Array, y: Array) -> Array:
    rest = p @ (1 - np.eye(p.shape[1]))  # 1 − p as a sum, which keeps its digits
    gamma = np.where(fixed_p < o.threshold, o.gamma_low, o.gamma_high)
    return -(y * rest**gamma * np.log(p)).sum(axis=1)


def mdca(p: Array, y: Array) -> float:
    """The paper's definition, which is no mean over samples."""
    return float(np.abs(p.mean(axis=0) - y.mean(axis=0)).mean())


def mdca_by_sample(p: Array, fixed_p: Array, y: Array) -> Array:
    """What each sample adds to it, (N,): its mean is the definition's value, its slope the definition's slope."""
    return (np.sign((fixed_p - y).mean(axis=0)) * (p - y)).mean(axis=1)


def competition_winner(networks: Sequence[Array], targets: NDArray[Any]) -> int:
    return int(np.argmin([cross_entropy(z, targets).mean() for z in networks]))


# D(p, q) of the other balances; the third and fourth arguments are the same at the fixed logits.
BALANCES: dict[str, Callable[[Any, Array, Array, Array, Array], Array]] = {
    "jeffreys": lambda o, p, q, fixed_p, fixed_q: jeffreys(p, q),
    "jsd": lambda o, p, q, fixed_p, fixed_q: jsd(p, q),
    "skew": lambda o, p, q, fixed_p, fixed_q: skew(p, q, o.skew),
    "akl": lambda o, p, q, fixed_p, fixed_q: akl(p, q, head_share(fixed_p, fixed_q, o.head_mass)),
    "abkd": lambda o, p, q, fixed_p, fixed_q: alpha_beta(p, q, o.alpha, o.beta),
}


def pair_terms(o: Any, z: Networks, at: Networks, targets: NDArray[Any]) -> tuple[Array, Array]:
    """What one student and the teacher minimise, (N,) each."""
    ce_s, ce_t = (cross_entropy(each, targets) for each in z.all)
    if o.name in ("ce", "ps_kd"):  # which has seen nothing yet
        return ce_s, ce_t
    if o.name == "kd":
        q, p = softmax(z.students[0], o.temperature), softmax(at.teacher, o.temperature)
        return o.ce_weight * ce_s + o.weight * o.temperature**2 * kl(p, q), np.zeros(len(ce_t))
    if o.name == "switokd":
        q, p, fixed_q, fixed_p = (softmax(each) for each in (*z.all, *at.all))
        teacher = np.zeros(len(ce_t)) if switokd_teacher_waits(*at.all, targets) else ce_t + kl(fixed_q, p)
        return ce_s + kl(fixed_p, q), teacher
    if o.name == "bdkd":
        by_student, by_teacher = bdkd_terms(o, z, at)
    else:
        q, p, fixed_q, fixed_p = (softmax(each, o.temperature) for each in (*z.all, *at.all))
        by_student, by_teacher = BALANCES[o.name](o, fixed_p, q, fixed_p, fixed_q), kl(fixed_q, p)
    square = o.temperature**2
    student = o.ce_weight * ce_s + o.student_weight * square * by_student
    return student, o.ce_weight * ce_t + o.teacher_weight * square * by_teacher


def network_losses(o: Any, z: Networks, targets: NDArray[Any], at: Networks | None = None) -> list[Array]:
    """(N,) losses of each student and, last, of the teacher."""
    at = at or z
    if o.name == "dml":
        logs, fixed = [softmax(each) for each in z.all], [softmax(each) for each in at.all]
        return [
            cross_entropy(own, targets)
            + o.weight * np.mean([kl(fixed[j], logs[i]) for j in range(len(fixed)) if j != i], axis=0)
            for i, own in enumerate(z.all)
        ]
    if o.name == "kdcl":
        together = softmax(ensemble(o.ensemble, at.all, targets), o.temperature)
        scale = o.weight * o.temperature**2
        return [cross_entropy(own, targets) + scale * kl(together, softmax(own, o.temperature)) for own in z.all]
    y = one_hot(targets, z.teacher.shape[1])
    alone = [(own, softmax(own), softmax(fixed)) for own, fixed in zip(z.all, at.all, strict=True)]
    if o.name == "focal":
        return [focal(o, p, fixed_p, y) for _, p, fixed_p in alone]
    if o.name == "mdca":
        return [cross_entropy(own, targets) + o.weight * mdca_by_sample(p, fixed_p, y) for own, p, fixed_p in alone]
    if o.name == "competitive":
        winner, tau = competition_winner(at.all, targets), o.temperature
        best, scale = softmax(at.all[winner], tau), o.weight * tau**2
        return [
            cross_entropy(own, targets) + (0 if i == winner else scale * kl(best, softmax(own, tau)))
            for i, own in enumerate(z.all)
        ]
    pairs = [
        pair_terms(o, Networks([s], z.teacher), Networks([fixed], at.teacher), targets)
        for s, fixed in zip(z.students, at.students, strict=True)
    ]
    return [*(student for student, _ in pairs), np.mean([teacher for _, teacher in pairs], axis=0)]


def gradients(o: Any, z: Networks, targets: NDArray[Any]) -> list[Array]:
    """The gradient of each network's mean loss by its own (N, K) logits: a complex step along each class."""
    found = []
    for index, own in enumerate(z.all):
        gradient = np.empty_like(own)
        for k in range(own.shape[1]):
            stepped = list(z.all)
            stepped[index] = own + 1j * STEP * np.eye(own.shape[1])[k]
            loss = network_losses(o, Networks(stepped[:-1], stepped[-1]), targets, z)[index]
            gradient[:, k] = loss.imag / STEP / len(own)
        found.append(gradient)
    return found


def diagnostics(o: Any, z: Networks, targets: NDArray[Any]) -> dict[str, float]:
    """What is watched, as the docstring of ``Losses`` names it."""
    several = len(z.students) > 1
    names = [*(f"student_{i + 1}" if several else "student" for i in range(len(z.students))), "teacher"]
    tau, tau_h = (o.temperature, o.entropy_temperature) if o.name == "bdkd" else (1.0, 1.0)
    p, h_t = softmax(z.teacher, tau), shannon(softmax(z.teacher, tau_h))
    found: dict[str, float] = {}
    for name, own, loss in zip(names, z.all, network_losses(o, z, targets), strict=True):
        h, q = shannon(softmax(own, tau_h)), softmax(own, tau)
        found |= {f"{name}/ce": cross_entropy(own, targets).mean(), f"{name}/entropy": h.mean()}
        if name != "teacher" or o.name != "kd":  # a frozen teacher has no loss
            found[f"{name}/loss"] = loss.mean()
        if name == "teacher":
            continue
        found |= {f"{name}/forward_kl": kl(p, q).mean(), f"{name}/reverse_kl": kl(q, p).mean()}
        for percent in (10, 50, 90):
            found[f"{name}/entropy_gap_p{percent}"] = sorted(h - h_t)[(len(h) - 1) * percent // 100]
        if o.name == "bdkd":
            found |= {f"{name}/boosted_forward": np.mean(h_t > h), f"{name}/boosted_reverse": np.mean(h > h_t)}
    if o.name == "kdcl":
        found["ensemble/ce"] = cross_entropy(ensemble(o.ensemble, z.all, targets), targets).mean()
    if o.name == "mdca":
        y = one_hot(targets, p.shape[1])
        found |= {f"{name}/mdca": mdca(softmax(own), y) for name, own in zip(names, z.all, strict=True)}
    if o.name == "competitive":
        winner = names[competition_winner(z.all, targets)]
        found |= {f"{name}/teaches": float(name == winner) for name in names}
    if o.name == "switokd":
        found["teacher/paused"] = float(switokd_teacher_waits(*z.all, targets))
    return found


def figures(o: Any, z: Networks, targets: NDArray[Any]) -> Figures:
    """Both losses and the diagnostics: the students' losses add up."""
    losses = [loss.mean() for loss in network_losses(o, z, targets)]
    return Figures(sum(losses[:-1]), losses[-1], diagnostics(o, z, targets))
