"""Which samples come in which batch: the epoch's order, and each rank's share of it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from bdkd_dist.data.randomness import ORDER_DRAW, bits, uniform

Indices = npt.NDArray[np.int64]

PAGE_DRAW, PLACE_DRAW = 90, 91
"""Of the quasi-random order: a page's place among pages, a sample's place among those of neighbouring pages."""

LANES = 32
OPEN_PAGES = 256
"""Pages whose samples are mixed, over all lanes: 2 GiB of 8 MiB pages."""


def epoch_order(indices: Indices, seed: int, epoch: int) -> Indices:
    """Return the (N,) distinct indices in the epoch's order, by rising random bits of (seed, epoch, index).

    The order depends only on which indices there are, not on how they were listed.
    """
    return indices[np.argsort(bits(seed, epoch, indices, ORDER_DRAW))]


def quasi_random_order(indices: Indices, pages: Indices, seed: int, epoch: int, batch_size: int) -> Indices:
    """Return the indices in an order that has few pages of the files in use at once, for sets larger than memory.

    It is cut by :func:`rank_batches` as any other. Every global batch takes the same number of samples (or a pair more)
    from each of 32 lanes (fewer where a batch has not 64 samples). Its lanes lie one behind the other, cut as ranks'
    shares are: where the number of ranks divides 32, each rank reads lanes of its own.

    A lane takes the pages in random order, and a sample of its p-th page comes at p + w·u: u is uniform in [0, 1), w is
    256 / lanes. So at any sample at most w pages of a lane, 256 in all, lie between their first and last use; they
    enter and leave one by one, and a rank has its lanes' share of them. Lanes are cut between samples, so neighbours
    may share a page: every second lane goes backwards, and both use it at the same end of the epoch.

    Where pages hold samples of mixed classes, batches mix classes as :func:`epoch_order` does. Where the files are
    sorted by class, a batch still draws on most of the 256 pages, but the batches after it draw on nearly the same:
    classes come in waves as long as 256 pages last.

    Args:
        indices: (N,) distinct samples; how they are listed does not matter.
        pages: (N,) the page of each.
        seed: Of the run.
        epoch: Each has its own order.
        batch_size: Of the global batches; it must be what the order is cut by.

    Returns:
        (N,) the indices, ordered.
    """
    batches = num_batches(len(indices), batch_size)
    sizes = len(indices) // batches + (np.arange(batches) < len(indices) % batches)
    lanes = max(1, min(LANES, sizes[-1] // 2))
    shares = np.diff(_cut(sizes[:, None], np.arange(lanes + 1), lanes))  # (batches, lanes), in samples
    lane = np.repeat(np.arange(lanes), shares.sum(axis=0))
    batch = np.repeat(np.tile(np.arange(batches), lanes), shares.T.ravel())

    by_page = np.lexsort((bits(seed, epoch, indices, ORDER_DRAW), bits(seed, epoch, pages, PAGE_DRAW)))
    indices, pages = indices[by_page], pages[by_page]
    first_use = np.cumsum(np.diff(pages, prepend=pages[:1]) != 0) * np.where(lane % 2, -1, 1)
    place = first_use + OPEN_PAGES // lanes * uniform(seed, epoch, indices, PLACE_DRAW)
    return indices[np.lexsort((place, lane))][np.argsort(batch, kind="stable")]


def num_batches(count: int, batch_size: int) -> int:
    """Return how many batches of at most ``batch_size`` hold ``count`` samples."""
    return -(-count // batch_size)


def rank_batches(order: Indices, batch_size: int, rank: int, world_size: int, first_step: int = 0) -> list[Indices]:
    """Return a rank's training batches from ``first_step`` on.

    The order is cut into as few global batches of at most ``batch_size`` as hold all of it, whose sizes differ by one
    sample at most: every sample comes once an epoch, and no batch is a small rest. Global batch k is the same whatever
    the number of ranks; each rank takes a contiguous share of it, cut between pairs of samples (positions 2j and 2j +
    1), so that a sample and its partner in mixing are never on two ranks.
    """
    batches = np.array_split(order, num_batches(len(order), batch_size))[first_step:]
    return [batch[_cut(len(batch), rank, world_size) : _cut(len(batch), rank + 1, world_size)] for batch in batches]


def largest_share(size: int, world_size: int) -> int:
    """Return how many samples of a global batch the rank with most of them has."""
    return max(_cut(size, rank + 1, world_size) - _cut(size, rank, world_size) for rank in range(world_size))


def _cut(size: Any, part: Any, parts: int) -> Any:
    """Return where a part of a batch begins, between two pairs of samples; integers or arrays of them."""
    return np.minimum(size, 2 * ((size + 1) // 2 * part // parts))


def rank_shard(indices: Indices, batch_size: int, rank: int, world_size: int) -> list[Indices]:
    """Return a rank's evaluation batches: over all ranks every index comes exactly once.

    Shares are contiguous and differ by one sample at most, so ranks may differ in their number of batches. A batch
    has ``batch_size / world_size`` samples (at least one), the last of a rank possibly fewer.
    """
    share = np.array_split(indices, world_size)[rank]
    size = max(1, batch_size // world_size)
    return [share[start : start + size] for start in range(0, len(share), size)]
