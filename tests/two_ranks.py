"""A run of two ranks that no Ray started and nobody interrupted: what runs on clusters must equal."""

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

# The torch loader compiles nothing: workers start quickly.
TWO = ("launch.workers=2", "data.loader=torch", "data.threads=1")


def train(cache: Path, storage: Path, *overrides: str) -> Path:
    """Train two gloo ranks and return the run folder."""
    mp.spawn(_rank_main, (str(cache), str(storage), overrides), nprocs=2)
    return storage / "run"


def _rank_main(rank: int, cache: str, storage: str, overrides: tuple[str, ...]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{storage}/meeting", rank=rank, world_size=2)
    places = (f"data.prepared={cache}", f"run.storage={storage}", "run.name=run")
    recipe = config.load("digits", [*SMALL, *TWO, *places, *overrides])
    work(recipe, RunFolder.of(recipe), torch.device("cpu"), Observers(), Control(), print)
    dist.barrier()  # a rank that leaves while another still talks to it can crash that one
    dist.destroy_process_group()
