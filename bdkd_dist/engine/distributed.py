"""The few things the engine asks of torch.distributed; with one process, without a group, all are no-ops."""

import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# torch 2.14 gave it another name.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_world_size() -> int:
    """Return how many ranks share this machine: Ray Train and torchrun say so; else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def mean_(values: torch.Tensor) -> torch.Tensor:
    """Average ``values`` over ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def largest(value: int, device: torch.device) -> int:
    """Return the largest of all ranks' values; every rank gets the same answer."""
    if world_size() == 1:
        return value
    values = torch.tensor(float(value), device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return int(values.item())


def broadcast_(tensors: Iterable[torch.Tensor]) -> None:
    """Copy rank 0's tensors to all ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def broadcast_bytes(content: bytes, device: torch.device | None = None) -> bytes:
    """Return rank 0's bytes on every rank; tensors carry them, so nothing is unpickled."""
    if world_size() == 1:
        return content
    size = torch.tensor([len(content)], device=device)
    dist.broadcast(size, src=0)
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    data = data.to(device) if rank() == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    if len(data):
        dist.broadcast(data, src=0)
    return content if rank() == 0 else data.cpu().numpy().tobytes()


def gather(value: Any) -> list[Any]:
    """Return every rank's picklable value, in rank order, on rank 0; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, gathered or None, dst=0)
    return gathered
