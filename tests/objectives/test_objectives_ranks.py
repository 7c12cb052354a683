"""What is decided over all ranks, over gloo processes: by the whole batch, whatever each rank's part says."""

import json
from collections.abc import Callable, Hashable
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

from bdkd_dist.objectives import MDCA, Competitive, Objective, SwitOKD

pytestmark = pytest.mark.slow
WORLD = 2
SAMPLES = 7
"""The first rank has one more."""

Targets = NDArray[np.int64]


def waits(z: Networks, y: Targets) -> Hashable:
    return reference.switokd_teacher_waits(z.students[0], z.teacher, y)


def wins(z: Networks, y: Targets) -> Hashable:
    return reference.competition_winner(z.all, y)


def signs(z: Networks, y: Targets) -> Hashable:
    gaps = [(reference.softmax(own) - reference.one_hot(y, 4)).mean(axis=0) for own in z.all]
    return tuple(bool(gap > 0) for gap in np.concatenate(gaps))


CASES: list[tuple[Objective, Callable[[Networks, Targets], Hashable], tuple[str, ...]]] = [
    (SwitOKD(), waits, ("teacher/paused",)),
    (Competitive(temperature=2), wins, ("student/teaches", "teacher/teaches")),
    (MDCA(weight=3), signs, ("student/mdca", "teacher/mdca")),
]
"""Each objective, its decision, and the diagnostics that tell of it, the same on all ranks."""


def whole(seed: int) -> tuple[Networks, Targets]:
    """A batch whose first half has a teacher far ahead of its student, and whose second half has one that is not."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(SAMPLES, 4)), rng.normal(size=(SAMPLES, 4))
    y = rng.integers(4, size=SAMPLES)
    ahead = np.arange(SAMPLES // 2)
    student[ahead, (y[ahead] + 1) % 4] += 3
    teacher[ahead, (y[ahead] + 2) % 4] += 2.5
    teacher[ahead, y[ahead]] += rng.uniform(1, 3)
    return Networks([student], teacher), y


def part(z: Networks, y: Targets, rank: int) -> tuple[Networks, Targets]:
    rows = np.array_split(np.arange(SAMPLES), WORLD)[rank]
    return Networks([z.students[0][rows]], z.teacher[rows]), y[rows]


def evened(z: Networks, y: Targets) -> tuple[Networks, Targets]:
    """What a mean of the ranks' means sees: each rank's samples count as often as the other has some."""
    sizes = [len(part(z, y, rank)[1]) for rank in range(WORLD)]
    rows = np.repeat(np.arange(SAMPLES), np.repeat(sizes[::-1], sizes))
    return Networks([z.students[0][rows]], z.teacher[rows]), y[rows]


def chosen(decide: Callable[[Networks, Targets], Hashable]) -> list[int]:
    """Two seeds whose whole batches decide one way and another, against one of the parts and the parts' mean."""
    found: dict[Hashable, int] = {}
    for seed in range(5000):
        decision = decide(*whole(seed))
        others = [decide(*part(*whole(seed), rank)) for rank in range(WORLD)]
        if any(other != decision for other in others) and decide(*evened(*whole(seed))) != decision:
            found.setdefault(decision, seed)
        if len(found) == 2:
            return list(found.values())
    raise AssertionError("no two batches differ")


def rank_main(rank: int, world_size: int, folder: str, objective: Objective, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results = []
    for seed in seeds:
        z, y = part(*whole(seed), rank)
        (student,), teacher = leaves(z)
        losses = objective(student, teacher, torch.tensor(y))
        grads = torch.autograd.grad(losses.student_loss + losses.teacher_loss, (student, teacher))
        results.append(
            {
                "diagnostics": {name: value.item() for name, value in losses.diagnostics.items()},
                "losses": [losses.student_loss.item(), losses.teacher_loss.item()],
                "gradients": [g.tolist() for g in grads],
                "shares": {
                    k: v.item() for k, v in objective.gradient_shares(student, teacher, torch.tensor(y)).items()
                },
            }
        )
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.parametrize(("objective", "decide", "watched"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_ranks_decide_as_one_process_with_the_whole_batch(
    tmp_path: Path,
    objective: Objective,
    decide: Callable[[Networks, Targets], Hashable],
    watched: tuple[str, ...],
) -> None:
    seeds = chosen(decide)
    mp.spawn(rank_main, (WORLD, str(tmp_path), objective, seeds), nprocs=WORLD)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    for seed, results in zip(seeds, zip(*ranks, strict=True), strict=True):
        z, y = whole(seed)
        (student,), teacher = leaves(z)
        alone = objective(student, teacher, torch.tensor(y))
        expected = reference.figures(objective, z, y)
        for name in watched:
            for result in results:
                assert result["diagnostics"][name] == pytest.approx(expected.diagnostics[name], rel=1e-14), name
        sizes = np.array([len(result["gradients"][0]) for result in results])
        found = np.average([result["losses"] for result in results], axis=0, weights=sizes)
        assert found == pytest.approx([alone.student_loss.item(), alone.teacher_loss.item()], rel=1e-14)
        assert found == pytest.approx([expected.student_loss, expected.teacher_loss], rel=1e-12)
        for network, gradient in enumerate(reference.gradients(objective, z, y)):
            # A rank's gradient is that of its mean over fewer samples.
            shares = np.repeat(sizes / SAMPLES, sizes)[:, None]
            found_gradient = np.concatenate([result["gradients"][network] for result in results]) * shares
            np.testing.assert_allclose(found_gradient, gradient, atol=1e-14)
        if objective.name == "switokd":
            pulls = {
                name: share for result in results for name, share in result["shares"].items() if "teacher/" in name
            }
            assert all((share == 0) == decide(z, y) for share in pulls.values())
