"""The fitted temperature against SciPy's root of the derivative and against temperatures known by construction."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from metrics_reference import drawn
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax
from torch import Tensor

from bdkd_dist.errors import UserError
from bdkd_dist.metrics import fit_temperature, temperature


def mean_nll(temperature: float, logits: np.ndarray, targets: np.ndarray) -> float:
    z = logits.astype(np.float64) / temperature
    return float(np.mean(logsumexp(z, axis=1) - z[np.arange(len(z)), targets]))


def best_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Where the derivative of the mean NLL by 1/T, which grows, is 0: comparing NLLs would lose half the digits."""
    z = logits.astype(np.float64)

    def slope(beta: float) -> float:
        return float(np.mean((softmax(beta * z, axis=1) * z).sum(1) - z[np.arange(len(z)), targets]))

    if slope(0.01) >= 0:
        return 100.0
    return 0.01 if slope(100) <= 0 else 1 / brentq(slope, 0.01, 100, xtol=1e-15, rtol=1e-14)


@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0.1, 10), st.floats(0.2, 20))
@example(2, 2, 4.0, 0.5)  # so flat that a minimiser of the NLL is wrong in the sixth digit
@settings(max_examples=60, deadline=None)
def test_equals_scipys_root(seed: int, K: int, temperature: float, scale: float) -> None:
    logits, targets = drawn(200, K, temperature, seed, scale)
    z, y = logits.numpy(), targets.numpy()
    assume((z.argmax(1) != y).any())
    fitted, found = fit_temperature(logits, targets), best_temperature(z, y)
    assert fitted == pytest.approx(found, rel=1e-9)
    assert mean_nll(fitted, z, y) <= mean_nll(found, z, y) + 1e-14


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_recovers_the_temperature_the_labels_were_drawn_with(temperature: float) -> None:
    logits, targets = drawn(20_000, 10, temperature, seed=5)
    z = logits.double().numpy()
    p = softmax(z / temperature, axis=1)
    information = ((p * z**2).sum(1) - (p * z).sum(1) ** 2).sum()
    standard_error = 1 / math.sqrt(information)  # of 1/T
    assert abs(1 / fit_temperature(logits, targets) - 1 / temperature) < 4 * standard_error


def test_scaling_the_logits_scales_the_temperature() -> None:
    logits, targets = drawn(300, 5, 2.0, seed=1)
    once = fit_temperature(logits, targets)
    assert fit_temperature(logits.double() * 7, targets) == pytest.approx(7 * once, rel=1e-9)
    assert fit_temperature(logits.double() / once, targets) == pytest.approx(1.0, rel=1e-9)


def test_a_constant_on_a_row_changes_nothing() -> None:
    logits, targets = drawn(300, 5, 2.0, seed=1)
    shift = torch.linspace(-1e3, 1e3, 300, dtype=torch.float64)[:, None]
    assert fit_temperature(logits + shift, targets) == pytest.approx(fit_temperature(logits, targets), rel=1e-9)


def test_predicted_classes_are_unchanged() -> None:
    logits, targets = drawn(500, 10, 4.0, seed=2)
    scaled = logits / fit_temperature(logits, targets)
    assert not torch.equal(scaled, logits)
    assert torch.equal(scaled.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_read_exactly(dtype: torch.dtype) -> None:
    logits, targets = drawn(300, 5, 2.0, seed=3)
    assert fit_temperature(logits.to(dtype), targets) == fit_temperature(logits.to(dtype).double(), targets)


def test_samples_all_classified_rightly_are_not_scaled() -> None:
    assert fit_temperature(torch.eye(4) * 0.1, torch.arange(4)) == 1.0
    assert fit_temperature(torch.eye(4) * 10, torch.arange(4)) == 1.0


def test_small_logits_with_one_error_stop_at_the_lower_bound() -> None:
    logits, targets = torch.eye(40) * 1e-4, torch.arange(40)
    targets[0] = 1
    assert fit_temperature(logits, targets) == pytest.approx(0.01)


def test_logits_that_mislead_stop_at_the_upper_bound() -> None:
    assert fit_temperature(torch.eye(4), (torch.arange(4) + 1) % 4) == pytest.approx(100)
    assert fit_temperature(torch.eye(4) * 1e4, (torch.arange(4) + 1) % 4) == pytest.approx(100)


def test_a_flat_nll_leaves_the_temperature_at_1() -> None:
    assert fit_temperature(torch.full((6, 3), 2.5), torch.arange(6) % 3) == 1.0
    assert fit_temperature(torch.eye(3) * 1e6, torch.arange(3)) == 1.0


def test_large_logits_with_one_error_have_a_finite_optimum() -> None:
    # β = 1 lies where every p is 0 or 1 and the curvature vanishes: Newton alone would leap away.
    # 9 right, 1 wrong, margin m: the best p is .9, so T = m / ln 9.
    logits = torch.tensor([[150.0, 0.0]]).repeat(10, 1)
    targets = torch.tensor([0] * 9 + [1])
    assert fit_temperature(logits, targets) == pytest.approx(150 / math.log(9), rel=1e-9)
    assert fit_temperature(logits / 5000, targets) == pytest.approx(0.03 / math.log(9), rel=1e-6)


@pytest.mark.parametrize(("targets", "most"), [([0, 1, 2, 3], 1), ([1, 2, 3, 0], 2), ([0, 1, 2, 0], 10)])
def test_few_passes_over_the_samples_suffice(targets: list[int], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[float] = []

    def counted(logits: Tensor, targets: Tensor, beta: float) -> tuple[float, float]:
        passes.append(beta)
        return derivatives(logits, targets, beta)

    derivatives = temperature._derivatives
    monkeypatch.setattr(temperature, "_derivatives", counted)
    fit_temperature(torch.eye(4) * 3, torch.tensor(targets))
    assert 0 < len(passes) <= most


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_number_gives_nan(bad: float) -> None:
    logits, targets = drawn(20, 3, 1.0, seed=4)
    logits[7, 1] = bad
    assert math.isnan(fit_temperature(logits, targets))
    rightly = torch.eye(4)
    rightly[2, 1] = bad
    assert math.isnan(fit_temperature(rightly, torch.arange(4)))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "no samples"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "1 of 2 are no class index; allowed: 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "1 of 2 are no class index"),
        (torch.zeros(2, 3), torch.tensor([0]), "targets"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "targets"),
        (torch.zeros(2), torch.tensor([0, 1]), "logits"),
    ],
)
def test_wrong_samples_are_named(logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_temperature(logits, targets)
