"""Random numbers as a function of what they are for: (seed, epoch, sample index, draw).

No state is kept, so a draw does not depend on the worker, thread or loader that asks for it, on what was drawn
before, or on any library's generator.
"""

import numpy as np
import numpy.typing as npt

ORDER_DRAW = 0
"""The draw that places a sample in its epoch's order; augmentation uses draws from 1."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def bits(seed: int, epoch: int, indices: npt.ArrayLike, draws: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return 64 random bits for each (index, draw), which broadcast against each other.

    Seed, epoch, index and draw are absorbed one after the other into SplitMix64's finaliser (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014; constants of Stafford's variant 13). For a fixed seed,
    epoch and draw it is one-to-one in the index: no two samples get the same bits.
    """
    state: npt.NDArray[np.uint64] = np.zeros((), np.uint64)
    for value in (seed, epoch, indices, draws):
        state = _mix(state ^ np.asarray(value).astype(np.uint64))
    return np.asarray(state)


def uniform(seed: int, epoch: int, indices: npt.ArrayLike, draws: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return a multiple of 2^-53 in [0, 1) for each (index, draw)."""
    return (bits(seed, epoch, indices, draws) >> np.uint64(11)) * np.float64(2.0**-53)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic is meant modulo 2^64; NumPy warns where the operands are scalars
        value = value + _GAMMA
        value = (value ^ (value >> np.uint64(30))) * _MULTIPLIER_1
        value = (value ^ (value >> np.uint64(27))) * _MULTIPLIER_2
        return value ^ (value >> np.uint64(31))
