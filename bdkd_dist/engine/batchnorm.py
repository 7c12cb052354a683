"""Batch normalisation over the whole batch of all ranks.

torch's ``SyncBatchNorm`` runs on accelerators only, and what it computes depends on how many ranks hold no image: the
host waits for that number in every layer, and a compiled graph ends there. On the CPU, and compiled,
:class:`CrossRankBatchNorm` does the same, so that a run gives the same result however many workers share its batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdkd_dist.distributed import world_size


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: each rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad


class CrossRankBatchNorm(_BatchNorm):
    """Batch norm with statistics over all ranks' images, however many each holds."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, …) per channel."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = x.float()
        # Both moments and the count travel in one message. Each rank's variance is taken about its own mean and joined
        # in float64: E[x²] - E[x]² in float32 would cancel.
        others = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = (part.double() for part in torch.var_mean(wide, others, correction=0))
        sums = x.numel() // x.shape[1] * torch.stack((mean, variance + mean.square(), torch.ones_like(mean)))
        total, total_square, count = _SumOverRanks.apply(sums)
        mean = total / count
        variance = total_square / count - mean.square()
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.float(), rate)
                self.running_var.lerp_((variance * count / (count - 1)).float(), rate)
        scale = torch.rsqrt(variance + self.eps).float() * (1.0 if self.weight is None else self.weight)
        shift = (0.0 if self.bias is None else self.bias) - mean.float() * scale
        of_channel = (-1, *[1] * (x.dim() - 2))
        return (wide * scale.view(of_channel) + shift.view(of_channel)).to(x.dtype)


class CrossRankBatchNorm1d(CrossRankBatchNorm, nn.BatchNorm1d):
    """Of (B, C) or (B, C, L)."""


class CrossRankBatchNorm2d(CrossRankBatchNorm, nn.BatchNorm2d):
    """Of (B, C, H, W)."""


class CrossRankBatchNorm3d(CrossRankBatchNorm, nn.BatchNorm3d):
    """Of (B, C, D, H, W)."""


CROSS_RANK: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: CrossRankBatchNorm1d,
    nn.BatchNorm2d: CrossRankBatchNorm2d,
    nn.BatchNorm3d: CrossRankBatchNorm3d,
}


def synchronise(module: nn.Module, device: torch.device, compiled: bool) -> nn.Module:
    """Return the module with every batch norm taking its statistics over all ranks; names and state stay.

    Args:
        module: Holds batch norms.
        device: Where it runs.
        compiled: Whether it is compiled there.
    """
    if device.type != "cpu" and not compiled:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if (kind := CROSS_RANK.get(type(child))) is not None:
            child.__class__ = kind  # same parameters and buffers, another forward
    return module
