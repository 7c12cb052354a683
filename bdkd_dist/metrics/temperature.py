"""Temperature scaling: one T for all logits, fitted on validation samples (Guo et al., 2017)."""

import math

import torch
from torch import Tensor

from bdkd_dist.distributed import sum_
from bdkd_dist.errors import UserError
from bdkd_dist.metrics.inputs import check_shapes, count_outside, float64_chunks, outside

T_MIN, T_MAX = 0.01, 100.0
MAX_STEPS = 200  # bisection alone needs fewer than 50
TOLERANCE = 1e-10


@torch.no_grad()
def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the T that minimises the mean NLL of softmax(logits / T) over all ranks' samples.

    In β = 1/T the NLL is convex, with derivative Σ_i(E_p[z] - z_y) and second derivative Σ_i Var_p[z] under
    p = softmax(βz): Newton steps in float64, replaced by bisection where they leave the bracket.

    Where every sample is classified rightly there is no such T (the NLL falls all the way to T → 0), and where the NLL
    is flat at T = 1 to float64 precision none is better: 1 is returned, no scaling. Otherwise T is bounded to
    [0.01, 100]; for logits that say nothing the optimum is T → ∞. A NaN or infinite logit gives nan.

    Args:
        logits: (n, K) this rank's part, any floating dtype; n may be 0 on some ranks.
        targets: (n,) int64 class indices.

    Returns:
        T, the same on all ranks. Dividing by it leaves the predicted classes as they are.

    Raises:
        UserError: Shapes or dtypes differ from these, a target is no class index, or no rank has a sample.
    """
    check_shapes(logits, targets)
    wrong = count_outside(targets, logits.shape[1])
    count, outsiders = sum_(torch.stack((torch.full_like(wrong, len(targets)), wrong))).tolist()
    if outsiders:  # summed before it is raised, so that no rank is left waiting
        raise outside(outsiders, count, logits.shape[1])
    if not count:
        raise UserError("logits: no samples; allowed: at least one validation sample over all ranks")

    beta = 1.0
    slope, curvature = _derivatives(logits, targets, beta)
    if math.isnan(slope):
        return slope
    if slope == 0 or _separable(logits, targets):
        return 1.0
    bound = 1 / T_MAX if slope > 0 else 1 / T_MIN
    if _derivatives(logits, targets, bound)[0] * math.copysign(1, slope) >= 0:
        return 1 / bound

    low, high = sorted((beta, bound))
    for _ in range(MAX_STEPS):
        low, high = (low, beta) if slope > 0 else (beta, high)
        newton = beta - slope / curvature if curvature > 0 else math.inf
        following = newton if low <= newton <= high else math.sqrt(low * high)
        change, beta = abs(following - beta), following
        if change <= TOLERANCE * beta:
            break
        slope, curvature = _derivatives(logits, targets, beta)
    return 1 / beta


def _separable(logits: Tensor, targets: Tensor) -> bool:
    """Return whether each sample's largest logit is its label's, over all ranks."""
    lacking = sum(((z.amax(1) > z.gather(1, y).squeeze(1)).sum() for z, y in float64_chunks(logits, targets)), 0)
    return int(sum_(torch.as_tensor(lacking, device=logits.device))) == 0


def _derivatives(logits: Tensor, targets: Tensor, beta: float) -> tuple[float, float]:
    """Return the first and second derivative of the summed NLL in β, over all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for z, y in float64_chunks(logits, targets):
        z = z - z.amax(1, keepdim=True)
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1, keepdim=True)
        variance = (p * (z - mean).square()).sum(1)
        sums += torch.stack(((mean - z.gather(1, y)).sum(), variance.sum()))
    slope, curvature = sum_(sums).tolist()
    return slope, curvature
