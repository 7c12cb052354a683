"""Learning rate, weight decay and batch size, which decide before any weighting whether networks train well.

    bdkd tune tune_spaces/optimizer.py cifar100_r56_r20 data.root=CIFAR100 --num-trials 32 --scheduler asha

The best rate grows with the batch and shrinks with the decay: the three are searched together.
"""

from typing import Any

from ray import tune


def search_space() -> dict[str, Any]:
    """Return the domains; the shipped recipes use rates 0.05 and 0.1, decays 1e-4 and 5e-4, batches 64 and 256."""
    return {
        # Factors matter, not differences; ten times less and five times more than what is usual.
        "optimizer.lr": tune.loguniform(5e-3, 0.5),
        "optimizer.weight_decay": tune.loguniform(1e-5, 5e-3),
        # Powers of two, each a doubling of the one before. Smaller ones train slowly and starve batch normalisation.
        "train.batch_size": tune.choice([32, 64, 128, 256]),
    }
