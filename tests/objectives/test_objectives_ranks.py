"""SwitOKD over gloo processes: the decision is that of the whole batch, whatever each rank's part says."""

import json
from pathlib import Path

import numpy as np
import numpy_reference as reference
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray
from numpy_reference import Networks
from objective_cases import leaves

from bdkd_dist.objectives import SwitOKD

pytestmark = pytest.mark.slow
WORLD = 2
SAMPLES = 7
"""The first rank has one more."""


def whole(seed: int) -> tuple[Networks, NDArray[np.int64]]:
    """A batch whose first half has a teacher far ahead of its student, and whose second half has one that is not."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(SAMPLES, 4)), rng.normal(size=(SAMPLES, 4))
    y = rng.integers(4, size=SAMPLES)
    ahead = np.arange(SAMPLES // 2)
    student[ahead, (y[ahead] + 1) % 4] += 3
    teacher[ahead, (y[ahead] + 2) % 4] += 2.5
    teacher[ahead, y[ahead]] += rng.uniform(1, 3)
    return Networks([student], teacher), y


def part(z: Networks, y: NDArray[np.int64], rank: int) -> tuple[Networks, NDArray[np.int64]]:
    rows = np.array_split(np.arange(SAMPLES), WORLD)[rank]
    return Networks([z.students[0][rows]], z.teacher[rows]), y[rows]


def decides(z: Networks, y: NDArray[np.int64]) -> bool:
    return reference.switokd_teacher_waits(z.students[0], z.teacher, y)


def decides_by_ranks(z: Networks, y: NDArray[np.int64]) -> bool:
    """What a mean of the ranks' means decides: each rank's samples count as often as the other has some."""
    sizes = [len(part(z, y, rank)[1]) for rank in range(WORLD)]
    rows = np.repeat(np.arange(SAMPLES), np.repeat(sizes[::-1], sizes))
    return decides(Networks([z.students[0][rows]], z.teacher[rows]), y[rows])


def chosen() -> list[int]:
    """Seeds whose whole batch decides one way and the other, against one of the parts and against the parts' mean."""
    found: dict[bool, int] = {}
    for seed in range(5000):
        decision = decides(*whole(seed))
        others = [decides(*part(*whole(seed), rank)) for rank in range(WORLD)]
        if not all(other == decision for other in others) and decides_by_ranks(*whole(seed)) != decision:
            found.setdefault(decision, seed)
    assert found.keys() == {False, True}
    return [found[False], found[True]]


def rank_main(rank: int, world_size: int, folder: str, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results = []
    for seed in seeds:
        z, y = part(*whole(seed), rank)
        (student,), teacher = leaves(z)
        losses = SwitOKD()(student, teacher, torch.tensor(y))
        grads = torch.autograd.grad(losses.student_loss + losses.teacher_loss, (student, teacher))
        results.append(
            {
                "paused": losses.diagnostics["teacher/paused"].item(),
                "losses": [losses.student_loss.item(), losses.teacher_loss.item()],
                "gradients": [g.tolist() for g in grads],
                "shares": {
                    k: v.item() for k, v in SwitOKD().gradient_shares(student, teacher, torch.tensor(y)).items()
                },
            }
        )
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_ranks_decide_as_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    seeds = chosen()
    mp.spawn(rank_main, (WORLD, str(tmp_path), seeds), nprocs=WORLD)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    for seed, results in zip(seeds, zip(*ranks, strict=True), strict=True):
        z, y = whole(seed)
        (student,), teacher = leaves(z)
        alone = SwitOKD()(student, teacher, torch.tensor(y))
        expected = reference.figures(SwitOKD(), z, y)
        assert [result["paused"] for result in results] == [float(decides(z, y))] * WORLD
        sizes = np.array([len(result["gradients"][0]) for result in results])
        found = np.average([result["losses"] for result in results], axis=0, weights=sizes)
        assert found == pytest.approx([alone.student_loss.item(), alone.teacher_loss.item()], rel=1e-14)
        assert found == pytest.approx([expected.student_loss, expected.teacher_loss], rel=1e-12)
        for network, gradient in enumerate(reference.gradients(SwitOKD(), z, y)):
            # A rank's gradient is that of its mean over fewer samples.
            shares = np.repeat(sizes / SAMPLES, sizes)[:, None]
            found_gradient = np.concatenate([result["gradients"][network] for result in results]) * shares
            np.testing.assert_allclose(found_gradient, gradient, atol=1e-14)
        waits = {name: share for result in results for name, share in result["shares"].items() if "teacher/" in name}
        assert all((share == 0) == decides(z, y) for share in waits.values())
