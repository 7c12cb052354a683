"""Targets as probabilities, on the device and without a look at any value."""

import torch
from torch import Tensor


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return (B, K) float32 of (B,) int64 class indices."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def smoothed(targets: Tensor, share: float, num_classes: int) -> Tensor:
    """Return (1 − share)·y + share/K (Szegedy et al. 2016, arXiv 1512.00567, section 7), or what was given for 0.

    Args:
        targets: (B,) int64 class indices, or (B, K) probabilities.
        share: In [0, 1).
        num_classes: K.

    Returns:
        (B, K) float32 or wider whose rows sum to 1.
    """
    if share == 0:
        return targets
    soft = targets if targets.is_floating_point() else one_hot(targets, num_classes)
    return (1 - share) * soft + share / num_classes
