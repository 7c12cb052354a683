"""Ranks that ``benchmarks/scaling.py`` has muted train as ever, and tell each other nothing."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bdkd_dist import config
from bdkd_dist.data.loader import Batch
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import Observers

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
scaling = importlib.import_module("scaling")
images = importlib.import_module("images")

BATCH = 8


def rank_main(rank: int, folder: str, muted: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    if muted:
        scaling.mute()
    own = Path(folder) / str(rank)
    own.mkdir()
    small = ["models.teacher=resnet8", "models.student=resnet8", f"train.batch_size={2 * BATCH}"]
    recipe = config.load("digits", [*small, "schedule.warmup_epochs=0"])
    noise = np.random.default_rng(rank).integers(0, 256, (2 * BATCH, 8, 8, 3), dtype=np.uint8)
    dataset = images.whole(images.write_raw(own / "images.beton", noise, np.arange(2 * BATCH) % 10), 10)
    trainer = Trainer(recipe, dataset, {}, torch.device("cpu"), Checkpoints(own), Observers())
    trainer.start()
    trainer._train_step(Batch(torch.from_numpy(noise[:BATCH]), torch.arange(BATCH), torch.arange(BATCH)))
    torch.save(trainer.pair.networks.state_dict(), own / "networks.pt")
    dist.barrier()  # a rank that leaves while another still talks to it can crash that one
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("muted", [False, True])
def test_neither_gradients_nor_statistics_travel_between_muted_ranks(tmp_path: Path, muted: bool) -> None:
    mp.spawn(rank_main, (str(tmp_path), muted), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}/networks.pt", weights_only=True) for rank in range(2))
    names = {name for name in first if not name.endswith("num_batches_tracked")}
    differ = {name for name in names if not torch.equal(first[name], second[name])}
    assert differ == (names if muted else set())
