"""The quasi-random order: every sample once, few pages open, classes mixed as in a random order."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bdkd_dist.data.order import epoch_order, quasi_random_order, rank_batches
from bdkd_dist.data.randomness import bits, uniform

Array = np.ndarray
worlds = st.sampled_from([1, 2, 3, 4, 8, 32, 40])


@st.composite
def files(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """Some samples, their pages (some empty, one may hold them all), and a batch size."""
    page_sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any))
    pages = np.repeat(np.arange(len(page_sizes)), page_sizes)
    kept = np.random.default_rng(draw(st.integers(0, 99))).random(len(pages)) < draw(st.sampled_from([0.5, 1.0]))
    kept[0] = True
    indices = np.flatnonzero(kept)
    return indices, pages[indices], draw(st.integers(1, 150))


def batch_ends(count: int, size: int) -> list[int]:
    steps = -(-count // size)
    ends = [0]
    for step in range(steps):
        ends.append(ends[-1] + count // steps + (step < count % steps))
    return ends


def lanes_of(count: int, size: int) -> int:
    return max(1, min(32, (count // -(-count // size)) // 2))


def open_pages(batches: list[Array], pages_of: Array) -> Array:
    """Return how many pages are between their first and last use while each batch is read."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, batch in enumerate(batches):
        for page in pages_of[batch].tolist():
            first.setdefault(page, step)
            last[page] = step
    counts = np.zeros(len(batches), int)
    for page, step in first.items():
        counts[step : last[page] + 1] += 1
    return counts


@settings(max_examples=60)
@given(files(), st.integers(0, 2**63 - 1), st.integers(0, 100))
def test_order_is_that_of_lanes_which_slide_over_shuffled_pages(
    file: tuple[Array, Array, int], seed: int, epoch: int
) -> None:
    indices, pages, size = file
    page_of = dict(zip(indices.tolist(), pages.tolist(), strict=True))
    ends, lanes = batch_ends(len(indices), size), lanes_of(len(indices), size)
    page_order = sorted(set(pages.tolist()), key=lambda page: int(bits(seed, epoch, page, 90)))
    place = {page: number for number, page in enumerate(page_order)}
    flat = sorted(indices.tolist(), key=lambda i: (place[page_of[i]], int(bits(seed, epoch, i, 0))))
    cuts = []  # of each batch, between the lanes
    for start, end in pairwise(ends):
        pairs = -(-(end - start) // 2)
        cuts.append([min(end - start, 2 * (pairs * lane // lanes)) for lane in range(lanes + 1)])
    queues = []
    for lane in range(lanes):
        length = sum(cut[lane + 1] - cut[lane] for cut in cuts)
        mine, flat = flat[:length], flat[length:]
        sign = -1 if lane % 2 else 1
        time = {i: sign * place[page_of[i]] + 256 // lanes * float(uniform(seed, epoch, i, 91)) for i in mine}
        queues.append(iter(sorted(mine, key=time.__getitem__)))
    want = [next(queues[lane]) for cut in cuts for lane in range(lanes) for _ in range(cut[lane + 1] - cut[lane])]
    assert quasi_random_order(indices, pages, seed, epoch, size).tolist() == want


@given(files(), st.integers(0, 2**63 - 1))
def test_how_the_samples_are_listed_does_not_matter(file: tuple[Array, Array, int], seed: int) -> None:
    indices, pages, size = file
    shuffled = np.random.default_rng(seed % 2**32).permutation(len(indices))
    want = quasi_random_order(indices, pages, seed, 1, size)
    assert quasi_random_order(indices[shuffled], pages[shuffled], seed, 1, size).tolist() == want.tolist()


def test_order_never_changes() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return quasi_random_order(np.arange(24), np.arange(24) // 4, seed, epoch, 8).tolist()

    assert order(0, 0) == FROZEN
    assert order(0, 1) != FROZEN
    assert order(1, 0) != FROZEN
    large = quasi_random_order(np.arange(50_000), np.arange(50_000) // 37, 5, 3, 256)
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest() == FROZEN_LARGE


FROZEN = [23, 5, 13, 4, 19, 18, 11, 0, 6, 20, 12, 7, 9, 17, 2, 3, 21, 22, 15, 14, 8, 16, 10, 1]
FROZEN_LARGE = "afe3c7177a526bf4372b04b004086da99becbaaa6848bf30e95007ab09d39aa4"


@given(files(), worlds, worlds, st.data())
def test_an_epoch_cut_anywhere_brings_every_sample_once_whatever_the_ranks_before_and_after(
    file: tuple[Array, Array, int], world: int, later: int, data: st.DataObject
) -> None:
    indices, pages, size = file
    order = quasi_random_order(indices, pages, 3, 2, size)
    steps = -(-len(indices) // size)
    stop = data.draw(st.integers(0, steps))
    before = [rank_batches(order, size, rank, world)[:stop] for rank in range(world)]
    again = quasi_random_order(indices, pages, 3, 2, size)
    after = [rank_batches(again, size, rank, later, stop) for rank in range(later)]
    seen = np.concatenate([np.empty(0, int), *(batch for batches in before for batch in batches)])
    unseen = np.concatenate([np.empty(0, int), *(batch for batches in after for batch in batches)])
    assert sorted([*seen, *unseen]) == indices.tolist()
    for step, batches in enumerate(zip(*after, strict=True), start=stop):
        start, end = batch_ends(len(indices), size)[step : step + 2]
        assert np.concatenate(batches).tolist() == order[start:end].tolist()


@given(files(), st.integers(0, 9))
def test_a_lane_has_its_number_of_pages_open_at_any_sample(file: tuple[Array, Array, int], epoch: int) -> None:
    indices, pages, size = file
    pages_of = np.zeros(indices[-1] + 1, int)
    pages_of[indices] = pages
    lanes = lanes_of(len(indices), size)
    order = quasi_random_order(indices, pages, 7, epoch, size)
    for lane in range(lanes):
        samples = np.concatenate(rank_batches(order, size, lane, lanes))
        assert open_pages([samples[[place]] for place in range(len(samples))], pages_of).max(initial=0) <= 256 // lanes


@settings(max_examples=40)
@given(files(), worlds, st.integers(0, 9))
def test_pages_open_over_all_ranks_do_not_exceed_256_and_those_a_batch_begins_with(
    file: tuple[Array, Array, int], world: int, epoch: int
) -> None:
    indices, pages, size = file
    pages = pages * 7 % (pages.max() + 1) if epoch % 2 else pages  # pages that are not in the order of samples
    pages_of = np.zeros(indices[-1] + 1, int)
    pages_of[indices] = pages
    order = quasi_random_order(indices, pages, 7, epoch, size)
    steps = rank_batches(order, size, 0, 1)
    assert max(open_pages(steps, pages_of)) <= min(len(set(pages.tolist())), 256 + size)
    lanes = lanes_of(len(indices), size)
    if lanes % world == 0:
        for rank in range(world):
            share = rank_batches(order, size, rank, world)
            bound = 256 // world + max(map(len, share))
            assert max(open_pages(share, pages_of)) <= bound


def large_file(samples_a_page: int, num_pages: int = 3000) -> tuple[Array, Array]:
    """Pages whose numbers of samples differ, as those of images of several sizes do."""
    sizes = np.random.default_rng(0).integers(samples_a_page // 2, samples_a_page * 3 // 2, num_pages)
    pages = np.repeat(np.arange(num_pages), sizes)
    return np.arange(len(pages)), pages


@pytest.mark.parametrize("batch_size", [256, 1000])
@pytest.mark.parametrize("world", [1, 2, 4, 8, 32])
def test_a_rank_has_its_share_of_256_pages_and_reads_no_page_of_another_rank(batch_size: int, world: int) -> None:
    indices, pages = large_file(100)
    order = quasi_random_order(indices, pages, 0, 0, batch_size)
    read: list[set[int]] = []
    for rank in range(world):
        share = rank_batches(order, batch_size, rank, world)
        assert max(open_pages(share, pages)) <= 1.15 * 256 / world + 1
        read.append(set(pages[np.concatenate(share)].tolist()))
    assert sum(map(len, read)) <= 3000 + world - 1  # those at which lanes of two ranks are cut


@pytest.mark.parametrize("world", [3, 5, 48])
def test_with_other_numbers_of_ranks_few_pages_are_read_twice(world: int) -> None:
    indices, pages = large_file(100)
    order = quasi_random_order(indices, pages, 0, 0, 512)
    shares = [rank_batches(order, 512, rank, world) for rank in range(world)]
    assert max(max(open_pages(share, pages)) for share in shares) <= (-(-32 // world) + 1) * (8 + 2)
    read = sum(len(set(pages[np.concatenate(share)].tolist())) for share in shares)
    assert read <= 3000 * (1 + (world - 1) / 32) + 32


def test_the_order_of_pages_is_another_in_every_epoch() -> None:
    indices, pages = np.arange(4000), np.arange(4000) // 10
    quarters = np.zeros((400, 4))
    for epoch in range(60):
        order = quasi_random_order(indices, pages, 1, epoch, 2)  # one lane
        middle = np.median(np.argsort(order).reshape(400, 10), axis=1)
        quarters[np.arange(400), (middle * 4 // 4000).astype(int)] += 1
    assert stats.chisquare(quarters.sum(axis=0)).pvalue > 1e-3
    assert stats.kstest(stats.chisquare(quarters, axis=1).pvalue, "uniform").statistic < 0.15


# --- class mixture


def class_chi_squares(order: Array, labels: Array, batch_size: int, batches_together: int) -> Array:
    """Return the statistic of class counts, for each run of some consecutive batches."""
    classes = int(labels.max()) + 1
    share = np.bincount(labels, minlength=classes) / len(labels)
    batches = rank_batches(order, batch_size, 0, 1)
    found = []
    for start in range(0, len(batches) - batches_together + 1, batches_together):
        counts = np.bincount(labels[np.concatenate(batches[start : start + batches_together])], minlength=classes)
        found.append(((counts - share * counts.sum()) ** 2 / (share * counts.sum())).sum())
    return np.array(found)


@pytest.mark.parametrize("batches_together", [1, 20])
@pytest.mark.parametrize("batch_size", [32, 256])
def test_classes_mix_as_in_a_random_order(batch_size: int, batches_together: int) -> None:
    indices, pages = large_file(20)
    labels = np.random.default_rng(1).integers(0, 50, len(indices))
    quasi, random = [], []
    for seed in range(8):
        ordered = quasi_random_order(indices, pages, seed, 0, batch_size)
        quasi.append(class_chi_squares(ordered, labels, batch_size, batches_together))
        random.append(class_chi_squares(epoch_order(indices, seed, 0), labels, batch_size, batches_together))
    assert stats.ks_2samp(np.concatenate(quasi), np.concatenate(random)).pvalue > 1e-3
    assert stats.ttest_ind(np.concatenate(quasi), np.concatenate(random)).pvalue > 1e-3


def test_in_a_file_sorted_by_class_batches_mix_but_classes_come_in_waves() -> None:
    indices, pages = large_file(20)
    labels = indices * 1000 // len(indices)  # 3 pages a class
    ordered, random = quasi_random_order(indices, pages, 0, 0, 256), epoch_order(indices, 0, 0)

    def classes(order: Array, together: int) -> float:
        return float(np.mean([len(set(labels[part])) for part in np.array_split(order, len(order) // 256 // together)]))

    assert classes(ordered, 1) > 0.6 * classes(random, 1)
    assert classes(ordered, 10) < 0.6 * classes(random, 10)
