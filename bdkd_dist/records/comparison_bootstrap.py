"""What networks said about test images, in bins of confidence, and the paired bootstrap between methods."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bdkd_dist.metrics.bins import NUM_BINS, bin_edges

DIFFERENCES = ("top1", "nll", "ece")
"""What the bootstrap tells the methods apart by."""
RESAMPLES = 2000
INTERVAL = (0.025, 0.975)
CHUNK_ELEMENTS = 2**20  # weights of 8 MiB at a time


@dataclass(frozen=True)
class Said:
    """What one network said about the test images; float64, at temperature 1."""

    confidence: np.ndarray
    correct: np.ndarray
    """1 where the most probable class is the label, else 0."""
    nll: np.ndarray


@dataclass(frozen=True)
class Difference:
    """How far a method lies from the first one, and the 95 % interval of that."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    methods: Sequence[Sequence[Said]], resamples: int = RESAMPLES, seed: int = 0
) -> list[dict[str, Difference]]:
    """Return how each further method differs from the first, with 95 % percentile intervals (Efron & Tibshirani, 1993).

    What is drawn with replacement are the N test images, the same draws for every run of every method: an image that
    is hard for all does not widen the interval. From each draw every run's figure is computed, averaged over the
    method's runs and subtracted. The trained networks stay as they are: the intervals speak of the choice of the test
    images, not of that of the seed. Drawing with replacement raises every ECE; in the difference most of that cancels.

    Args:
        methods: For each method what each of its runs' networks said about the same N images, in the same order.
        resamples: Number of draws.
        seed: Of the draws.
    """
    count = len(methods[0][0].confidence)
    columns = [np.stack([_columns(said) for said in runs], axis=1) for runs in methods]
    rng = np.random.default_rng(seed)
    exact = [_figures(np.ones((1, count)), column)[0] for column in columns]
    drawn: list[list[np.ndarray]] = [[] for _ in methods]
    for start in range(0, resamples, rows := max(1, CHUNK_ELEMENTS // max(1, count))):
        weights = _weights(rng, min(rows, resamples - start), count)
        for figures, column in zip(drawn, columns, strict=True):
            figures.append(_figures(weights, column))
    first, *others = (np.concatenate(figures) for figures in drawn)
    found = []
    for other, value in zip(others, exact[1:], strict=True):
        ends = np.quantile(other - first, INTERVAL, axis=0)
        rows_of = zip(value - exact[0], *ends, strict=True)
        found.append(dict(zip(DIFFERENCES, (Difference(*map(float, row)) for row in rows_of), strict=True)))
    return found


def _columns(said: Said) -> np.ndarray:
    """Return (N, 2 + bins): correct, NLL, and confidence - correct in the column of the sample's bin."""
    gaps = np.zeros((len(said.confidence), NUM_BINS))
    gaps[np.arange(len(gaps)), bins(said.confidence)] = said.confidence - said.correct
    return np.column_stack((said.correct, said.nll, gaps))


def _figures(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return (R, 3) top-1, NLL and ECE, means over runs, for (R, N) weights and (N, runs, 2 + bins) columns."""
    count, runs, width = columns.shape
    sums = (weights @ columns.reshape(count, runs * width)).reshape(-1, runs, width) / max(1, count)
    ece = np.abs(sums[..., 2:]).sum(-1)
    return np.stack((sums[..., 0], sums[..., 1], ece), axis=-1).mean(1)


def _weights(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Return (rows, count): how often each image is among ``count`` drawn with replacement."""
    draws = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
    return np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count).astype(float)


def bins(confidence: np.ndarray) -> np.ndarray:
    """Return the bin (edge_b, edge_b+1] of each confidence."""
    return np.searchsorted(bin_edges(NUM_BINS)[1:-1], confidence)
