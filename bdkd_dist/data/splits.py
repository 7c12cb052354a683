"""Which split is the test's; held-out splits and limited subsets as functions of the labels alone.

Which samples are chosen follows from a hash of (salt, position): no generator's state, no training seed and no
NumPy version has a part in it.
"""

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bdkd_dist.data.order import Indices
from bdkd_dist.data.randomness import bits
from bdkd_dist.errors import UserError

T = TypeVar("T")


def with_test(splits: Mapping[str, T]) -> dict[str, T]:
    """Return splits by name; where none is called ``test``, that of validation becomes it (ImageNet as it comes)."""
    named = dict(splits)
    if "test" not in named and "validation" in named:
        named["test"] = named.pop("validation")
    return named


def stratified(labels: Indices, fraction: float, salt: str = "validation") -> tuple[Indices, Indices]:
    """Split positions class by class.

    Of a class of n samples, ``fraction``·n are held out (rounded half up), but at least one and at most n - 1;
    a class of a single sample keeps it. The held-out ones have the smallest hashes of their class, so that a larger
    fraction holds out a superset.

    Args:
        labels: (N,) integers.
        fraction: Share to hold out, in (0, 1).
        salt: Names the split; other salts choose independently.

    Returns:
        The kept and the held-out positions, both rising.
    """
    assert 0 < fraction < 1
    rank, size = _ranks(labels, _hashes(np.arange(len(labels)), salt))
    held = rank < np.minimum(np.floor(fraction * size + 0.5).clip(1), size - 1)
    return np.flatnonzero(~held), np.flatnonzero(held)


def limit(indices: Indices, labels: Indices, count: int) -> Indices:
    """Choose exactly ``count`` of ``indices``, each class in proportion to its size.

    Seats go by Webster's method (the next one to the class with the smallest (chosen + 1/2) / size), after one for
    each class; a larger count chooses a superset.

    Args:
        indices: (N,) positions in the data set, which the choice hashes.
        labels: (N,) their labels.
        count: How many to choose.

    Returns:
        The chosen indices, rising.

    Raises:
        UserError: ``count`` exceeds N.
    """
    if count > len(indices):
        raise UserError(f"data.train_limit={count}: there are only {len(indices)} training images")
    hashes = _hashes(indices, "train_limit")
    rank, size = _ranks(labels, hashes)
    priority = np.where(rank == 0, 0, (rank + 0.5) / size)
    return np.sort(indices[np.lexsort((hashes, priority))[:count]])


def _ranks(labels: Indices, hashes: npt.NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """Return each sample's place in its class by rising hash, and the size of its class."""
    _, group, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((hashes, group))
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts[group[order]]
    return rank, sizes[group]


def _hashes(positions: Indices, salt: str) -> npt.NDArray[np.uint64]:
    """Return random bits of (salt, position); all differ."""
    key = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little")
    return bits(key, 0, positions, 0)
