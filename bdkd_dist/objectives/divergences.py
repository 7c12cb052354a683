"""Entropies, cross-entropies and divergences of (N, K) log-probabilities, one value a row, in nats.

All of them stay finite, in value and gradient, wherever the log-probabilities are: ``kl_div`` of probabilities that
underflow does not.
"""

import math

import torch
from torch import Tensor

from bdkd_dist.objectives.schedule import Value, equals


def log_probabilities(logits: Tensor, temperature: Value = 1.0) -> Tensor:
    """Return the (N, K) log-softmax of ``logits / temperature``."""
    return torch.log_softmax(logits if equals(temperature, 1) else logits / temperature, dim=1)


def entropy(log_p: Tensor) -> Tensor:
    """Return (N,) Shannon entropies."""
    return -(log_p.exp() * log_p).sum(dim=1)


def cross_entropy(log_p: Tensor, targets: Tensor) -> Tensor:
    """Return (N,) cross-entropies.

    Args:
        log_p: (N, K) log-probabilities.
        targets: (N,) int64 class indices (each must be one: there is no index to ignore), or (N, K) probabilities.
    """
    if targets.is_floating_point():
        return -(targets.to(log_p.dtype) * log_p).sum(dim=1)
    return -log_p.gather(1, targets[:, None]).squeeze(1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (N,) KL(p‖q)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (N,) ½·KL(p‖m) + ½·KL(q‖m) with m = (p+q)/2, in [0, log 2] (Lin 1991)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2


def skew_kl(log_p: Tensor, log_q: Tensor, skew: Value) -> Tensor:
    """Return (N,) KL(p‖λp + (1−λ)q) with λ = ``skew`` in [0, 1) (Lee 2001; DistiLLM, arXiv 2402.03898, eq. 4)."""
    log_skew: Value
    log_rest: Value
    if isinstance(skew, Tensor):
        log_skew, log_rest = skew.log(), torch.log1p(-skew)  # −inf for 0, which adds nothing
    elif skew == 0:
        return kl_divergence(log_p, log_q)
    else:
        log_skew, log_rest = math.log(skew), math.log1p(-skew)
    return kl_divergence(log_p, torch.logaddexp(log_p + log_skew, log_q + log_rest))


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: Value, beta: Value) -> Tensor:
    """Return the (N,) α-β divergence of p and q (Cichocki et al. 2011; ABKD, arXiv 2505.04560, eq. 6).

    ``−1/(αβ)·Σ_k[p^α·q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)]``, and its limits where α or β is 0: (1, 0) is KL(p‖q),
    (0, 1) is KL(q‖p). Written in differences of powers, which keeps its digits near those limits; where both α and β
    are small it loses about as many as they have zeros.

    Args:
        log_p: (N, K) log-probabilities.
        log_q: (N, K) log-probabilities.
        alpha: At least 0.
        beta: At least 0; not both are 0.
    """
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        return _alpha_beta_of_tensors(log_p, log_q, *(torch.as_tensor(v, device=log_p.device) for v in (alpha, beta)))
    if alpha < beta:
        return alpha_beta(log_q, log_p, beta, alpha)
    return _alpha_alone(log_p, log_q, alpha) if beta == 0 else _alpha_and_beta(log_p, log_q, alpha, beta)


def _alpha_beta_of_tensors(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return :func:`alpha_beta` without a look at any value: all cases are computed, and the right one is taken."""
    swapped = alpha < beta
    log_p, log_q = torch.where(swapped, log_q, log_p), torch.where(swapped, log_p, log_q)
    larger, smaller = torch.maximum(alpha, beta), torch.minimum(alpha, beta)
    both = _alpha_and_beta(log_p, log_q, larger, torch.where(smaller == 0, 1.0, smaller))
    return torch.where(smaller == 0, _alpha_alone(log_p, log_q, larger), both)


def _alpha_alone(log_p: Tensor, log_q: Tensor, alpha: Value) -> Tensor:
    """Return :func:`alpha_beta` for β = 0 < α."""
    log_ratio = alpha * (log_p - log_q)
    return ((alpha * log_p).exp() * (log_ratio - 1) + (alpha * log_q).exp()).sum(dim=1) / alpha**2


def _alpha_and_beta(log_p: Tensor, log_q: Tensor, alpha: Value, beta: Value) -> Tensor:
    """Return :func:`alpha_beta` for α ≥ β > 0."""
    total = alpha + beta
    log_ratio = log_q - log_p
    apart = _power_step(total * log_p, total * log_ratio) / total
    half_way = _power_step(total * log_p, beta * log_ratio) / beta
    return (apart - half_way).sum(dim=1) / alpha


def _power_step(x: Tensor, step: Tensor) -> Tensor:
    """Return e^(x + step) − eˣ to full precision for small steps, finite where the sum is at most 0."""
    up, down = step.clamp(min=0), step.clamp(max=0)
    return x.exp() * torch.expm1(down) - (x + up).exp() * torch.expm1(-up)
