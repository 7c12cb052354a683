"""Ranks go on from one checkpoint, rank 0's, whatever each of them sees."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bdkd_dist.engine.checkpoint import Checkpoints

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("damage", "step"), [("none", 2), ("cut", 1), ("absent", None)])
def test_all_ranks_load_what_rank_0_finds(tmp_path: Path, damage: str, step: int | None) -> None:
    if damage != "absent":
        for number in (1, 2):
            newest = Checkpoints(tmp_path / "0").save(number, {"w": torch.full((1000,), float(number))})
        if damage == "cut":
            os.truncate(newest, newest.stat().st_size // 2)
    Checkpoints(tmp_path / "1").save(7, {"w": torch.full((1000,), 7.0)})  # what rank 1 alone sees
    mp.spawn(_load, (str(tmp_path),), nprocs=2)
    loaded = [torch.load(tmp_path / f"loaded-{rank}.pt", weights_only=True) for rank in range(2)]
    if step is None:
        assert loaded == [None, None]
    else:
        for state in loaded:
            assert state["step"] == step
            assert torch.equal(state["w"], torch.full((1000,), float(step)))
    said = (tmp_path / "said").read_text() if damage == "cut" else ""
    assert said.count("falling back") == (damage == "cut")


def _load(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def say(line: str) -> None:
        with (Path(folder) / "said").open("a") as file:
            file.write(line + "\n")

    state = Checkpoints(Path(folder) / str(rank), say).load_newest(torch.device("cpu"))
    torch.save(state, Path(folder) / f"loaded-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
