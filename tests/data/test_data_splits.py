import hashlib
import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdkd_dist.data.splits import limit, stratified
from bdkd_dist.errors import UserError

label_arrays = st.lists(st.integers(0, 6), min_size=1, max_size=200).map(lambda x: np.array(x, np.int64))
fractions = st.floats(0.01, 0.99)


def splitmix64(salt: str, index: int) -> int:
    """SplitMix64 in plain integers, as its authors print it, seeded by the salt's SHA-256 and ``index`` steps on."""
    mask = 2**64 - 1
    key = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little")
    state = 0
    for value in (key, 0, index, 0):
        z = ((state ^ value) + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        state = z ^ (z >> 31)
    return state


@given(label_arrays, fractions)
def test_the_two_parts_are_rising_and_make_up_the_whole(labels: np.ndarray, fraction: float) -> None:
    kept, held = stratified(labels, fraction)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert list(kept) == sorted(kept)
    assert list(held) == sorted(held)


@given(label_arrays, fractions)
def test_every_class_gives_its_share_by_rising_hash(labels: np.ndarray, fraction: float) -> None:
    held = set(stratified(labels, fraction, salt="some")[1].tolist())
    for label in set(labels.tolist()):
        members = np.flatnonzero(labels == label).tolist()
        share = min(max(int(fraction * len(members) + 0.5), 1), len(members) - 1)
        assert held & set(members) == set(sorted(members, key=lambda i: splitmix64("some", i))[:share])


@given(label_arrays, fractions, fractions)
def test_a_larger_fraction_holds_out_a_superset(labels: np.ndarray, one: float, other: float) -> None:
    small, large = (set(stratified(labels, f)[1].tolist()) for f in sorted((one, other)))
    assert small <= large


def test_the_held_out_positions_stay_what_they_were() -> None:
    labels = np.arange(40) % 4
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert stratified(labels, 0.2)[1].tolist() == [3, 16, 20, 21, 22, 25, 26, 39]
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_other_salts_choose_independently() -> None:
    labels = np.zeros(10_000, np.int64)
    one, other = (set(stratified(labels, 0.5, salt)[1].tolist()) for salt in ("one", "other"))
    assert abs(len(one & other) - 2500) < 4 * 25  # hypergeometric, standard deviation 25


def test_a_class_of_one_sample_keeps_it() -> None:
    kept, held = stratified(np.array([0, 1, 1]), 0.99)
    assert len(held) == 1
    assert 0 in kept


@given(label_arrays, st.data())
def test_limit_chooses_exactly_count_in_proportion(labels: np.ndarray, draw: st.DataObject) -> None:
    indices = 3 * np.arange(len(labels)) + 1
    count = draw.draw(st.integers(1, len(labels)))
    chosen = limit(indices, labels, count)
    assert len(chosen) == count
    assert list(chosen) == sorted(set(chosen.tolist()))
    assert set(chosen) <= set(indices)
    sizes = [int(np.sum(labels == k)) for k in np.unique(labels)]
    taken = [int(np.sum(labels[np.isin(indices, chosen)] == k)) for k in np.unique(labels)]
    last = [need(t - 1, size) for t, size in zip(taken, sizes, strict=True) if t]
    following = [need(t, size) for t, size in zip(taken, sizes, strict=True) if t < size]
    assert max(last) <= min(following, default=np.inf)


def need(taken: int, size: int) -> float:
    """Webster's divisor rule: the next seat goes where this is smallest; a class without any comes first."""
    return (taken + 0.5) / size if taken else 0.0


def test_limit_of_equal_classes_is_balanced() -> None:
    labels = np.arange(1000) % 10
    assert np.bincount(labels[limit(np.arange(1000), labels, 200)]).tolist() == [20] * 10


@given(label_arrays)
def test_limit_grows_by_supersets(labels: np.ndarray) -> None:
    indices = np.arange(len(labels))
    sets = [set(limit(indices, labels, count).tolist()) for count in range(1, len(labels) + 1)]
    assert all(one < other for one, other in itertools.pairwise(sets))


def test_limit_beyond_the_images_names_its_key() -> None:
    with pytest.raises(UserError, match=r"data\.train_limit=4: there are only 3 training images"):
        limit(np.arange(3), np.zeros(3, np.int64), 4)


@pytest.mark.slow
def test_imagenet_splits_in_about_a_second() -> None:
    labels = np.random.default_rng(0).integers(0, 1000, 1_281_167)
    start_s = time.process_time()
    kept, held = stratified(labels, 0.1)
    limit(kept, labels[kept], 50_000)
    assert time.process_time() - start_s < 5  # about 1.3 s
    assert abs(len(held) / len(labels) - 0.1) < 0.001
