"""Batch norm over ranks equals torch's own over the whole batch: values, gradients, running statistics."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bdkd_dist.engine.batchnorm import CrossRankBatchNorm, synchronise

KINDS = {
    "of rows": (nn.BatchNorm1d, (), True),
    "of lines": (nn.BatchNorm1d, (4,), True),
    "of images": (nn.BatchNorm2d, (4, 4), True),
    "of images, without parameters": (nn.BatchNorm2d, (4, 4), False),
    "of volumes": (nn.BatchNorm3d, (2, 3, 2), True),
}
"""The layer, a sample's shape behind its channels, and whether there are weights and biases."""


def whole_batch(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (12, 5, *KINDS[kind][1])
    x = 3 + 2 * torch.randn(shape, generator=generator)
    return x, torch.randn(shape, generator=generator)


def norm(kind: str) -> nn.Module:
    torch.manual_seed(1)
    layer, _, affine = KINDS[kind]
    made = layer(5, affine=affine)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


SHARES = {2: [7, 5], 3: [6, 4, 2]}
"""Images of each rank: unequal, as at the end of a data set."""


def rank_main(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    found = {}
    for kind in KINDS:
        x, grad = whole_batch(kind)
        mine = x.split(SHARES[world])[rank].clone().requires_grad_()
        layer = synchronise(nn.Sequential(norm(kind)), torch.device("cpu"), compiled=False)
        y = layer(mine)
        (y * grad.split(SHARES[world])[rank]).sum().backward()
        grads = {name: parameter.grad for name, parameter in layer[0].named_parameters()}
        for weight_grad in grads.values():
            dist.all_reduce(weight_grad)
        found[kind] = {"y": y.detach(), "x_grad": mine.grad, "grads": grads, "state": layer[0].state_dict()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_and_three_ranks_equal_the_whole_batch(tmp_path: Path) -> None:
    for world in (2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        mp.spawn(rank_main, (world, str(folder)), nprocs=world)
        parts = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
        for kind in KINDS:
            x, grad = whole_batch(kind)
            x.requires_grad_()
            layer = norm(kind)
            y = layer(x)
            (y * grad).sum().backward()
            close = {"rtol": 2e-5, "atol": 2e-5}
            torch.testing.assert_close(torch.cat([part[kind]["y"] for part in parts]), y.detach(), **close)
            torch.testing.assert_close(torch.cat([part[kind]["x_grad"] for part in parts]), x.grad, **close)
            for part in parts:
                for name, parameter in layer.named_parameters():
                    torch.testing.assert_close(part[kind]["grads"][name], parameter.grad, **close)
                for name, value in layer.state_dict().items():
                    torch.testing.assert_close(part[kind]["state"][name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_is_torchs_own(kind: str) -> None:
    x, _ = whole_batch(kind)
    ours = synchronise(nn.Sequential(norm(kind)), torch.device("cpu"), compiled=False)
    assert isinstance(ours[0], CrossRankBatchNorm)
    assert torch.equal(ours(x), norm(kind)(x))


def test_torchs_own_is_for_eager_gpus_alone() -> None:
    """Its forward pass looks at a value, where a compiled graph would end."""
    gpu = torch.device("cuda")
    eager, compiled = (synchronise(nn.Sequential(nn.BatchNorm2d(5)), gpu, compiled=c)[0] for c in (False, True))
    assert type(eager) is nn.SyncBatchNorm
    assert isinstance(compiled, CrossRankBatchNorm)
