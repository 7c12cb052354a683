"""Which samples come in which batch: the epoch's order, and each rank's share of it."""

import numpy as np
import numpy.typing as npt

from bdkd_dist.data.randomness import ORDER_DRAW, bits

Indices = npt.NDArray[np.int64]


def epoch_order(indices: Indices, seed: int, epoch: int) -> Indices:
    """Return the (N,) distinct indices in the epoch's order, by rising random bits of (seed, epoch, index).

    The order depends only on which indices there are, not on how they were listed.
    """
    return indices[np.argsort(bits(seed, epoch, indices, ORDER_DRAW))]


def rank_batches(order: Indices, batch_size: int, rank: int, world_size: int, first_step: int = 0) -> list[Indices]:
    """Return a rank's training batches from ``first_step`` on.

    Global batch k is ``order[k * batch_size : (k + 1) * batch_size]`` whatever the number of ranks; each rank takes
    its contiguous share of it. Samples after the last whole global batch are left out.
    """
    assert batch_size % world_size == 0
    steps = len(order) // batch_size
    shares = order[: steps * batch_size].reshape(steps, world_size, batch_size // world_size)
    return list(shares[first_step:, rank])


def rank_shard(indices: Indices, batch_size: int, rank: int, world_size: int) -> list[Indices]:
    """Return a rank's evaluation batches: over all ranks every index comes exactly once.

    Shares are contiguous and differ by one sample at most, so ranks may differ in their number of batches. A batch
    has ``batch_size / world_size`` samples (at least one), the last of a rank possibly fewer.
    """
    share = np.array_split(indices, world_size)[rank]
    size = max(1, batch_size // world_size)
    return [share[start : start + size] for start in range(0, len(share), size)]
