import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bdkd_dist.data.order import epoch_order, rank_batches, rank_shard
from bdkd_dist.data.randomness import bits

sizes = st.integers(1, 300)
worlds = st.sampled_from([1, 2, 3, 4, 8])


@given(st.sets(st.integers(0, 2**40), min_size=1, max_size=200), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_order_is_the_indices_by_rising_bits(indices: set[int], seed: int, epoch: int) -> None:
    given_order = np.array(list(indices))
    want = sorted(indices, key=lambda index: int(bits(seed, epoch, index, 0)))
    assert epoch_order(given_order, seed, epoch).tolist() == want
    assert epoch_order(given_order[::-1], seed, epoch).tolist() == want


def test_order_never_changes() -> None:
    assert epoch_order(np.arange(12), seed=0, epoch=0).tolist() == FROZEN
    assert epoch_order(np.arange(12), seed=0, epoch=1).tolist() != FROZEN
    assert epoch_order(np.arange(12), seed=1, epoch=0).tolist() != FROZEN


FROZEN = [6, 0, 3, 8, 5, 4, 7, 9, 10, 11, 1, 2]


def test_every_sample_comes_at_every_place_equally_often() -> None:
    counts = np.zeros((10, 10))
    for epoch in range(5_000):
        counts[epoch_order(np.arange(10), 0, epoch), np.arange(10)] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_order_needs_no_compiler() -> None:
    code = "import sys, bdkd_dist.data.order, bdkd_dist.data.augment; print({'numba', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@given(sizes, st.integers(1, 50), worlds, st.integers(0, 5))
def test_ranks_share_the_global_batches_in_order(count: int, size: int, world: int, first_step: int) -> None:
    order = np.random.default_rng(count).permutation(count)
    steps = -(-count // size)
    large, sizes_left = count % steps, steps
    whole, start = [], 0
    for k in range(sizes_left):
        end = start + count // steps + (k < large)
        whole.append(order[start:end].tolist())
        start = end
    ranks = [rank_batches(order, size, rank, world, first_step) for rank in range(world)]
    joined = [np.concatenate(shares).tolist() for shares in zip(*ranks, strict=True)]
    assert joined == whole[first_step:]
    assert max(map(len, whole)) <= size
    for shares in zip(*ranks, strict=True):
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 3  # a pair more, and the last pair may lack one
        starts = np.cumsum([0, *lengths])[:-1]
        assert all(start % 2 == 0 or start == sum(lengths) for start in starts)


@given(sizes, st.integers(1, 6), worlds, st.data())
def test_a_resumed_epoch_brings_the_samples_not_yet_seen_to_any_number_of_ranks(
    count: int, per_rank: int, world: int, data: st.DataObject
) -> None:
    order, size = np.random.default_rng(count).permutation(count), per_rank * world
    first_step, later = data.draw(st.integers(0, -(-count // size))), data.draw(worlds)
    before = [rank_batches(order, size, rank, world)[:first_step] for rank in range(world)]
    after = [rank_batches(order, size, rank, later, first_step) for rank in range(later)]
    seen = np.concatenate([np.empty(0, int), *(b for batches in before + after for b in batches)])
    assert sorted(seen.tolist()) == sorted(order.tolist())


@given(sizes, st.integers(1, 6), worlds, st.data())
def test_resumed_batches_are_the_tail(count: int, per_rank: int, world: int, data: st.DataObject) -> None:
    order, size = np.arange(count)[::-1], per_rank * world
    rank, first_step = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, -(-count // size)))
    whole = rank_batches(order, size, rank, world)
    tail = rank_batches(order, size, rank, world, first_step)
    assert [batch.tolist() for batch in tail] == [batch.tolist() for batch in whole[first_step:]]


@given(st.integers(0, 300), st.integers(1, 40), worlds)
def test_evaluation_counts_every_sample_once(count: int, batch_size: int, world: int) -> None:
    indices = np.random.default_rng(count).permutation(1000)[:count]
    ranks = [rank_shard(indices, batch_size, rank, world) for rank in range(world)]
    seen = [int(index) for batches in ranks for batch in batches for index in batch]
    assert seen == indices.tolist()
    share = max(1, batch_size // world)
    for batches in ranks:
        assert all(len(batch) == share for batch in batches[:-1])
        assert all(0 < len(batch) <= share for batch in batches)
    lengths = [sum(map(len, batches)) for batches in ranks]
    assert max(lengths) - min(lengths) <= 1
