"""What the binned sums say: the reliability diagram, and the split of the Brier score."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

NUM_BINS = 15
"""Unless something else is asked for (Guo et al., 2017)."""


def bin_edges(num_bins: int) -> tuple[float, ...]:
    """Return the num_bins + 1 edges of bins (lo, hi] of equal width, from 0 to 1."""
    # Quotients taken on the host: CUDA multiplies by a rounded reciprocal, which moves edges such as 3/15.
    return tuple(b / num_bins for b in range(num_bins + 1))


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows: confidence against accuracy in equal-width bins (lo, hi]."""

    edges: tuple[float, ...]
    """num_bins + 1 edges from 0 to 1."""
    count: tuple[int, ...]
    """Samples per bin."""
    accuracy: tuple[float, ...]
    """Fraction correct per bin; nan where the bin is empty."""
    confidence: tuple[float, ...]
    """Mean confidence per bin; nan where the bin is empty."""

    @classmethod
    def of(cls, count: Tensor, correct: Tensor, confidence: Tensor) -> Self:
        """Return what sums over the samples of each bin say.

        Args:
            count: (num_bins,) samples.
            correct: (num_bins,) of them, those that are right.
            confidence: (num_bins,) float64 sum of their confidences.
        """
        return cls(
            edges=bin_edges(len(count)),
            count=tuple(count.tolist()),
            accuracy=tuple((correct.double() / count).tolist()),
            confidence=tuple((confidence / count).tolist()),
        )


def brier_split(count: Tensor, hits: Tensor, gap: Tensor, total: float) -> tuple[float, float, float]:
    """Return reliability, resolution and uncertainty of the Brier score (Murphy, 1973), summed over classes.

    With n_kb samples whose p_k lies in bin b of class k, of mean probability p_kb and frequency o_kb of class k among
    them, and o_k the frequency of class k among all N samples:

        reliability = Σ_k Σ_b n_kb/N·(p_kb - o_kb)²
        resolution  = Σ_k Σ_b n_kb/N·(o_kb - o_k)²
        uncertainty = Σ_k o_k·(1 - o_k)

    Murphy's brier = reliability - resolution + uncertainty holds where all p_k of a bin are equal. In general the
    variance of p within bins and its covariance with the outcome y remain (Stephenson et al., 2008), exactly:

        brier = reliability - resolution + uncertainty
                + 1/N·Σ_k Σ_b Σ_{i in kb} [(p_ik - p_kb)² - 2·(p_ik - p_kb)·(y_ik - o_kb)]

    Args:
        count: (K, num_bins) n_kb.
        hits: (K, num_bins) Σ y_ik.
        gap: (K, num_bins) float64 Σ(p_ik - y_ik).
        total: N; nan gives nan.
    """
    n, hits = count.clamp(min=1).double(), hits.double()  # sums over an empty bin are 0
    frequency = hits.sum(1, keepdim=True) / total
    reliability = (gap.square() / n).sum() / total
    resolution = (count * (hits / n - frequency).square()).sum() / total
    uncertainty = (frequency * (1 - frequency)).sum()
    return float(reliability), float(resolution), float(uncertainty)
