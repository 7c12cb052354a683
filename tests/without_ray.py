"""Runs that no Ray started and nobody interrupted: what runs on clusters must equal."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import SMALL

from bdkd_dist import config
from bdkd_dist.engine.control import Control
from bdkd_dist.engine.observer import Observers
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.worker import work


def train(cache: Path, storage: Path, *overrides: str, name: str = "run") -> Path:
    """Train in this process, with one thread, and return the run folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _work(cache, storage, name, overrides)
    finally:
        torch.set_num_threads(threads)
    return storage / name


def train_two_ranks(cache: Path, storage: Path, *overrides: str) -> Path:
    """Train two gloo ranks and return the run folder."""
    mp.spawn(_rank_main, (cache, storage, overrides), nprocs=2)
    return storage / "run"


def _rank_main(rank: int, cache: Path, storage: Path, overrides: tuple[str, ...]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{storage}/meeting", rank=rank, world_size=2)
    _work(cache, storage, "run", overrides)
    dist.barrier()  # a rank that leaves while another still talks to it can crash that one
    dist.destroy_process_group()


def _work(cache: Path, storage: Path, name: str, overrides: tuple[str, ...]) -> None:
    places = (f"data.prepared={cache}", f"run.storage={storage}", f"run.name={name}")
    recipe = config.load("digits", [*SMALL, *places, *overrides])
    work(recipe, RunFolder.of(recipe), torch.device("cpu"), Observers(), Control(), print)
