"""What is asked of torch.distributed: collectives over the default group; with one process, without a group, no-ops."""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def local_world_size() -> int:
    """Return how many ranks share this machine: Ray Train and torchrun say so; else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def meet() -> None:
    """Wait until all ranks are here, on the CPU: there a rank that leaves is noticed at once, by NCCL it is not.

    The group needs a backend for the CPU, as launchers make it.

    Raises:
        RuntimeError: A rank has left.
    """
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def sum_(values: Tensor) -> Tensor:
    """Sum ``values`` over ranks, in place, and return them; shapes agree on all ranks."""
    if world_size() > 1:
        moved = values.to(_device(values))
        dist.all_reduce(moved)
        if moved is not values:
            values.copy_(moved)
    return values


def mean_(values: Tensor) -> Tensor:
    """Average ``values`` over ranks, in place, and return them; shapes agree on all ranks."""
    if world_size() > 1:
        sum_(values).div_(world_size())
    return values


def largest(value: int, device: torch.device) -> int:
    """Return the largest of all ranks' values; every rank gets the same answer."""
    if world_size() == 1:
        return value
    values = torch.tensor(float(value), device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return int(values.item())


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's tensors to all ranks, in place; shapes agree on all ranks."""
    if world_size() > 1:
        for values in tensors:
            moved = values.to(_device(values))
            dist.broadcast(moved, src=0)
            if moved is not values:
                values.copy_(moved)


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


def concatenate(values: Tensor) -> Tensor:
    """Return all ranks' (C, n) ``values`` side by side in rank order; n may differ between ranks and may be 0."""
    if world_size() == 1:
        return values
    moved = values.to(_device(values))
    size = torch.tensor([values.shape[1]], device=moved.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(s) for s in sizes]
    # Collectives want one shape everywhere: pad to the longest part, cut the padding off again.
    padded = moved.new_zeros(values.shape[0], max(lengths))
    padded[:, : values.shape[1]] = moved
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, :n] for part, n in zip(parts, lengths, strict=True)], dim=1).to(values.device)


def gather(value: Any) -> list[Any]:
    """Return every rank's picklable value, in rank order, on rank 0; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, gathered or None, dst=0)
    return gathered


def _device(values: Tensor) -> torch.device:
    """Return where the group can reduce ``values``: NCCL knows only the GPU."""
    nccl = dist.get_backend() == dist.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if nccl else values.device
