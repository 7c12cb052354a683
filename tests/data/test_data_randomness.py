import numpy as np
import pytest
from scipy import stats

from bdkd_dist.data.randomness import bits, uniform

MASK = 2**64 - 1


def reference_bits(seed: int, epoch: int, index: int, draw: int) -> int:
    """SplitMix64's finaliser over the four numbers, in Python's unbounded integers."""
    state = 0
    for value in (seed, epoch, index, draw):
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def test_bits_equal_big_integer_arithmetic() -> None:
    for seed in (0, 1, 2**63 - 1):
        for epoch in (0, 7):
            indices, draws = np.array([0, 1, 5, 1_281_166]), np.array([0, 3, 23])
            got = bits(seed, epoch, indices[:, None], draws)
            want = [[reference_bits(seed, epoch, int(i), int(d)) for d in draws] for i in indices]
            assert got.tolist() == want


def test_bits_never_change() -> None:
    assert bits(0, 0, [0, 1], 0).tolist() == FROZEN_ZERO
    assert bits(2026, 3, [0, 41], [1, 2]).tolist() == FROZEN_OTHER


FROZEN_ZERO = [2391539541053276776, 15703761562794949698]
FROZEN_OTHER = [1611910587323586464, 5247271324064874297]


def test_first_step_is_splitmix64() -> None:
    # SplitMix64 seeded with 0 first gives 0xE220A8397B1DCDAF (reference implementation, prng.di.unimi.it).
    state = 0xE220A8397B1DCDAF
    for _ in range(3):
        state = reference_step(state)
    assert bits(0, 0, 0, 0) == state


def reference_step(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_uniform_is_the_upper_53_bits() -> None:
    got = uniform(5, 2, np.arange(100), 4)
    assert got.tolist() == [(reference_bits(5, 2, i, 4) >> 11) / 2**53 for i in range(100)]
    assert got.dtype == np.float64


def test_samples_never_share_bits() -> None:
    assert len(np.unique(bits(3, 1, np.arange(1_000_000), 0))) == 1_000_000


def test_uniform_fills_the_interval_evenly() -> None:
    counts, _ = np.histogram(uniform(1, 0, np.arange(200_000), 1), bins=200, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("neighbour", ["seed", "epoch", "index", "draw"])
def test_neighbours_are_independent(neighbour: str) -> None:
    indices = np.arange(100_000)
    here = uniform(10, 4, indices, 2)
    there = {
        "seed": uniform(11, 4, indices, 2),
        "epoch": uniform(10, 5, indices, 2),
        "index": uniform(10, 4, indices + 1, 2),
        "draw": uniform(10, 4, indices, 3),
    }[neighbour]
    pairs, _, _ = np.histogram2d(here, there, bins=16, range=((0, 1), (0, 1)))
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3
    assert abs(np.corrcoef(here, there)[0, 1]) < 0.015


def test_every_bit_of_the_index_flips_half_of_the_result() -> None:
    indices = np.arange(2_000)
    for bit in range(21):
        changed = bits(0, 0, indices, 0) ^ bits(0, 0, indices ^ (1 << bit), 0)
        shares = np.unpackbits(changed.view(np.uint8)).reshape(-1, 64).mean(axis=0)
        assert np.all(np.abs(shares - 0.5) < 0.06)
