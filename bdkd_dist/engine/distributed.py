"""The few things the engine asks of torch.distributed; with one process, without a group, all are no-ops."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean_(values: torch.Tensor) -> torch.Tensor:
    """Average ``values`` over ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank; every rank gets the same answer."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def broadcast_(tensors: Iterable[torch.Tensor]) -> None:
    """Copy rank 0's tensors to all ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather(value: Any) -> list[Any]:
    """Return every rank's picklable value, in rank order, on rank 0; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, gathered or None, dst=0)
    return gathered
