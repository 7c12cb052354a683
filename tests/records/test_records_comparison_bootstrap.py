"""The paired bootstrap against resamples written out, and against the normal interval."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from bdkd_dist.records.comparison_bootstrap import Said, paired_bootstrap

CLASSES, COUNT = 10, 200


def said(seed: int, count: int = 150, skill: float = 0.0) -> Said:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.1, 1, count)
    return Said(confidence, (rng.random(count) < confidence - skill).astype(float), rng.exponential(size=count))


def ece_of(confidence: np.ndarray, correct: np.ndarray) -> float:
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def written_out(one: Sequence[Said], other: Sequence[Said], resamples: int) -> dict[str, tuple[float, float, float]]:
    """Each draw's samples taken one by one, each run's figures from them."""
    count = len(one[0].confidence)

    def figures(runs: Sequence[Said], chosen: np.ndarray) -> np.ndarray:
        each = [
            (run.correct[chosen].mean(), run.nll[chosen].mean(), ece_of(run.confidence[chosen], run.correct[chosen]))
            for run in runs
        ]
        return np.mean(each, axis=0)

    everything = np.arange(count)
    value = figures(other, everything) - figures(one, everything)
    draws = np.random.default_rng(0).integers(count, size=(resamples, count))
    differences = [figures(other, chosen) - figures(one, chosen) for chosen in draws]
    low, high = np.quantile(differences, [0.025, 0.975], axis=0)
    return dict(zip(("top1", "nll", "ece"), zip(value, low, high, strict=True), strict=True))


def test_intervals_are_those_of_resamples_written_out() -> None:
    one, other = [said(1), said(2)], [said(3, skill=0.1), said(4, skill=0.1), said(5, skill=0.1)]
    (found,) = paired_bootstrap([one, other], resamples=300)
    for metric, (value, low, high) in written_out(one, other, 300).items():
        assert (found[metric].value, found[metric].low, found[metric].high) == pytest.approx(
            (value, low, high), abs=1e-12
        )


def test_draws_in_parts_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [[said(1)], [said(3)], [said(4)]]
    whole = paired_bootstrap(methods, resamples=200)
    monkeypatch.setattr("bdkd_dist.records.comparison_bootstrap.CHUNK_ELEMENTS", 7 * 150 + 1)
    for one, other in zip(whole, paired_bootstrap(methods, resamples=200), strict=True):
        for metric in one:
            assert one[metric].low == pytest.approx(other[metric].low, abs=1e-12)


def test_an_interval_of_accuracy_is_as_wide_as_the_normal_one_of_paired_differences() -> None:
    one, other = said(1, 4000), said(2, 4000, skill=0.05)
    (found,) = paired_bootstrap([[one], [other]])
    deviation = (other.correct - one.correct).std(ddof=1) / np.sqrt(4000)
    assert found["top1"].high - found["top1"].low == pytest.approx(2 * 1.96 * deviation, rel=0.08)
    deviation = (other.nll - one.nll).std(ddof=1) / np.sqrt(4000)
    assert found["nll"].high - found["nll"].low == pytest.approx(2 * 1.96 * deviation, rel=0.08)


def test_a_method_does_not_differ_from_itself() -> None:
    (found,) = paired_bootstrap([[said(1), said(2)], [said(2), said(1)]], resamples=50)
    for difference in found.values():
        assert (difference.value, difference.low, difference.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_pairing_keeps_a_constant_difference_constant() -> None:
    one = said(1)
    worse = replace(one, nll=one.nll + 0.25)
    (found,) = paired_bootstrap([[one], [worse]], resamples=50)
    assert (found["nll"].low, found["nll"].high) == pytest.approx((0.25, 0.25), abs=1e-12)
    assert found["nll"].is_clear
    assert not found["top1"].is_clear
