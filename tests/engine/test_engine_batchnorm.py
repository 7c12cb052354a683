"""Batch norm over ranks equals torch's own over the whole batch: values, gradients, running statistics."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bdkd_dist.engine.batchnorm import CrossRankBatchNorm2d, synchronise


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(12, 5, 4, 4, generator=generator)
    return x, torch.randn(12, 5, 4, 4, generator=generator)


def norm() -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(5)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


SHARES = {2: [7, 5], 3: [6, 4, 2]}
"""Images of each rank: unequal, as at the end of a data set."""


def rank_main(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    x, grad = whole_batch()
    mine = x.split(SHARES[world])[rank].clone().requires_grad_()
    layer = synchronise(nn.Sequential(norm()), torch.device("cpu"))
    y = layer(mine)
    (y * grad.split(SHARES[world])[rank]).sum().backward()
    weight_grad = layer[0].weight.grad.clone()
    dist.all_reduce(weight_grad)
    torch.save(
        {"y": y.detach(), "x_grad": mine.grad, "weight_grad": weight_grad, "state": layer[0].state_dict()},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_and_three_ranks_equal_the_whole_batch(tmp_path: Path) -> None:
    for world in (2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        mp.spawn(rank_main, (world, str(folder)), nprocs=world)
        parts = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
        x, grad = whole_batch()
        x.requires_grad_()
        layer = norm()
        y = layer(x)
        (y * grad).sum().backward()
        close = {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([part["x_grad"] for part in parts]), x.grad, **close)
        for part in parts:
            torch.testing.assert_close(part["weight_grad"], layer.weight.grad, **close)
            for name, value in layer.state_dict().items():
                torch.testing.assert_close(part["state"][name], value, rtol=1e-6, atol=1e-6)


def test_alone_it_is_torchs_own() -> None:
    x, _ = whole_batch()
    ours = synchronise(nn.Sequential(norm()), torch.device("cpu"))
    assert isinstance(ours[0], CrossRankBatchNorm2d)
    assert torch.equal(ours(x), norm()(x))
