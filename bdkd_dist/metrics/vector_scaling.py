"""Vector scaling: a scale and a bias for each class, fitted on validation samples (Guo et al., 2017)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bdkd_dist.distributed import broadcast_, sum_
from bdkd_dist.metrics.inputs import check_logits, float64_chunks
from bdkd_dist.metrics.temperature import fit_temperature

PRIOR = 1e-3
MAX_RMS = 10.0
MAX_STEPS = 100  # Newton needs about 10
TOLERANCE = 1e-12  # of the summed objective: twice its distance from the minimum, before the last step
SUFFICIENT = 1e-4  # share of the promised decrease that a step must bring (Armijo, 1966)
ROUNDING = 1e-12  # relative, of the summed objective


@dataclass(frozen=True)
class VectorScaling:
    """Logits z become scale·z + bias, class by class."""

    scale: Tensor
    """(K,) float64, on the CPU."""
    bias: Tensor
    """(K,) float64, on the CPU."""

    def apply(self, logits: Tensor) -> Tensor:
        """Return the scaled logits, (B, K) float64, for (B, K) logits of any floating dtype, on their device.

        Raises:
            UserError: ``logits`` are of another shape or dtype.
        """
        check_logits(logits, len(self.scale))
        return logits.double() * self.scale.to(logits.device) + self.bias.to(logits.device)


@torch.no_grad()
def fit_vector_scaling(logits: Tensor, targets: Tensor) -> VectorScaling:
    """Return the scales and biases that minimise the NLL of softmax(scale·z + bias) over all ranks' samples.

    With T from :func:`fit_temperature` the scales are w/T, and what is minimised, from w = 1 and bias = 0 on, is

        Σ_i NLL_i + PRIOR/2·Σ_k [(w_k - 1)² + bias_k²],  PRIOR = 0.001

    The NLL alone often has no minimum (the bias of a class that no sample has would fall for ever) and never a single
    one (a constant on all biases changes nothing). With the small second term it has exactly one: biases add up to 0,
    and where the samples do determine a parameter it moves by about PRIOR over that parameter's information. Damped
    Newton steps in float64; a step costs n·(2K)² operations and (2K)² numbers of memory. Logits whose root mean square
    is above 10 even over T (T has a bound) are divided by more, so that this root mean square is 10.

    Where every sample is classified rightly (its label has the one largest logit) nothing is scaled: scale 1, bias 0,
    as :func:`fit_temperature` has T = 1.
    A NaN or infinite logit gives nan. Other than a temperature, vector scaling may change the predicted classes, and a
    constant on a row of logits matters.

    Args:
        logits: (n, K) this rank's part, any floating dtype; n may be 0 on some ranks.
        targets: (n,) int64 class indices.

    Returns:
        The scaling, the same on all ranks.

    Raises:
        UserError: Shapes or dtypes differ from these, a target is no class index, or no rank has a sample.
    """
    temperature = fit_temperature(logits, targets)  # checks the samples too
    parameters = torch.zeros(2, logits.shape[1], dtype=torch.float64, device=logits.device)
    parameters[0] = 1
    mistakes, root_mean_square = _survey(logits, targets)
    if math.isnan(temperature):
        parameters.fill_(math.nan)
    elif mistakes:
        unit = max(temperature, root_mean_square / MAX_RMS)
        parameters = _minimum(logits, targets, unit, parameters)
        parameters[0] /= unit
    scale, bias = parameters.cpu()
    return VectorScaling(scale, bias)


def _survey(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return how many samples' labels lack the one largest logit, and the logits' root mean square, over all ranks."""
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for z, y in float64_chunks(logits, targets):
        rivals = (z >= z.gather(1, y)).sum(1) - 1
        sums += torch.stack(((rivals > 0).sum(), z.square().sum(), torch.full_like(sums[2], z.numel())))
    mistakes, squares, count = sum_(sums).tolist()
    return mistakes, math.sqrt(squares / count)


def _minimum(logits: Tensor, targets: Tensor, unit: float, parameters: Tensor) -> Tensor:
    """Return the (2, K) parameters that minimise the objective; every decision is taken on what all ranks agree on."""
    value, gradient, hessian = _derivatives(logits, targets, unit, parameters)
    for _ in range(MAX_STEPS):
        step, decrement = _newton_step(gradient, hessian)
        if decrement <= TOLERANCE:
            return parameters + step
        least = value + ROUNDING * abs(value)
        length = 1.0
        while True:
            candidate = parameters + length * step
            value, gradient, hessian = _derivatives(logits, targets, unit, candidate)
            if value <= least - SUFFICIENT * length * decrement:  # false for NaN, where a step overflows
                break
            length /= 2
        parameters = candidate
    return parameters


def _newton_step(gradient: Tensor, hessian: Tensor) -> tuple[Tensor, float]:
    """Return the (2, K) step and the squared Newton decrement gᵀH⁻¹g, both rank 0's on all ranks.

    Last bits of a factorisation depend on the processor: ranks on different machines would part ways.
    """
    step = -torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
    agreed = torch.cat((step, -(step @ gradient)[None]))
    broadcast_([agreed])
    return agreed[:-1].view(2, -1), float(agreed[-1])


def _derivatives(logits: Tensor, targets: Tensor, unit: float, parameters: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the objective with its (2K,) gradient and (2K, 2K) Hessian in (w, bias), over all ranks.

    With z_i the logits over ``unit`` and J_i = [diag(z_i), I], sample i adds J_iᵀ(p_i - y_i) to the gradient and
    J_iᵀ(diag(p_i) - p_i·p_iᵀ)J_i to the Hessian.
    """
    scale, bias = parameters
    K = len(scale)
    sums = torch.zeros(1 + 2 * K + 4 * K * K, dtype=torch.float64, device=logits.device)
    value, gradient, hessian = sums[:1], sums[1 : 1 + 2 * K], sums[1 + 2 * K :].view(2 * K, 2 * K)
    diagonals = torch.zeros(3, K, dtype=torch.float64, device=logits.device)
    for z, y in float64_chunks(logits, targets):
        z = z / unit
        log_p = (scale * z + bias).log_softmax(1)
        value -= log_p.gather(1, y).sum()
        p = log_p.exp()
        weighted = p * z
        both = torch.cat((weighted, p), dim=1)
        hessian.addmm_(both.T, both, alpha=-1)
        diagonals += torch.stack(((weighted * z).sum(0), weighted.sum(0), p.sum(0)))
        residuals = p.scatter_add(1, y, torch.full_like(p[:, :1], -1))
        gradient += torch.cat(((residuals * z).sum(0), residuals.sum(0)))
    ww, wb, bb = diagonals
    hessian.diagonal().add_(torch.cat((ww, bb)))
    hessian.diagonal(K).add_(wb)
    hessian.diagonal(-K).add_(wb)
    sum_(sums)
    away = torch.cat((scale - 1, bias))
    hessian.diagonal().add_(PRIOR)
    return float(value) + PRIOR / 2 * float(away @ away), gradient + PRIOR * away, hessian
