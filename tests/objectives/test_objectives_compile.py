"""torch.compile takes each objective as one graph, and gives the same losses, gradients and diagnostics."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from objective_cases import EVERY, VARIANTS, scalars, several, torch_batch
from torch import Tensor, nn
from torch.nn import functional as F

from bdkd_dist.objectives import BDKD, Losses, Objective


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    # All objectives share one compute(): without this each counts as a recompilation of the first.
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outcome(
    function: Callable[..., Losses], soft: bool, samples: int = 12, students: int = 1
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    own, teacher, targets = torch_batch(samples, students=students)
    losses = function(
        own if students > 1 else own[0], teacher, F.one_hot(targets, 6).float() * 0.9 + 0.1 / 6 if soft else targets
    )
    total = losses.student_loss + losses.teacher_loss
    return scalars(losses), torch.autograd.grad(total, (*own, teacher), materialize_grads=True)


def check(objective: Objective, backend: str, softs: tuple[bool, ...] = (False, True), students: int = 1) -> None:
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    for soft in softs:
        torch.testing.assert_close(
            outcome(compiled, soft, students=students),
            outcome(objective, soft, students=students),
            rtol=1e-5,
            atol=1e-6,
        )


def test_bdkd_is_one_graph_and_gives_the_same() -> None:
    check(BDKD(), "eager", softs=(False,))


@pytest.mark.slow
def test_every_objective_gives_the_same_compiled_by_inductor() -> None:
    # All in one graph: a compilation of each takes a quarter of a minute.
    def together(own: Tensor, teacher: Tensor, targets: Tensor) -> list[Losses]:
        return [objective(own, teacher, targets) for objective in EVERY.values()]

    found: list[tuple[list[dict[str, Tensor]], tuple[Tensor, ...]]] = []
    for function in (torch.compile(together, fullgraph=True), together):
        (own,), teacher, targets = torch_batch()
        every = function(own, teacher, targets)
        total = torch.stack([losses.student_loss + 2 * losses.teacher_loss for losses in every]).sum()
        found.append(([scalars(losses) for losses in every], torch.autograd.grad(total, (own, teacher))))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


BRANCHES = ("bdkd_one_temperature", "bdkd_balanced", "bdkd_alone", "bdkd_soft", "skew_none", "abkd_limit_beta")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EVERY, *BRANCHES])
def test_every_branch_is_one_graph_for_soft_targets_and_two_students(name: str) -> None:
    objective = VARIANTS[name]
    check(objective, "aot_eager", softs=(True,), students=2 if several(objective) else 1)


@pytest.mark.slow
def test_batches_of_other_sizes_need_no_graph_each() -> None:
    objective, graphs = BDKD(), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(objective, fullgraph=True, backend=count)
    for samples in (12, 8, 10, 9, 20):
        torch.testing.assert_close(outcome(compiled, False, samples), outcome(objective, False, samples))
    assert len(graphs) == 2  # one for the first size, one for any size


class Pair(nn.Module):
    """Both networks and their objective in one module, as a training step holds them."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = nn.Linear(5, 6), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))
        self.objective = objective

    def forward(self, x: Tensor, targets: Tensor) -> Losses:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.objective.compute(self.student(x), self.teacher(x), targets)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bdkd", "kd", "kdcl_min_logit", "switokd", "competitive", "focal", "mdca", "akl"])
def test_an_objective_compiles_inside_a_module_with_both_networks(name: str) -> None:
    pair = Pair(EVERY[name])
    x, targets = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch_batch()[2]
    found, expected = torch.compile(pair, fullgraph=True, backend="aot_eager")(x, targets), pair(x, targets)
    assert found.student_loss.dtype == torch.float32
    torch.testing.assert_close(scalars(found), scalars(expected), rtol=1e-2, atol=1e-2)
    parameters = list(pair.parameters())
    for losses in (found, expected):
        total = losses.student_loss + losses.teacher_loss
        grads = torch.autograd.grad(total, parameters, materialize_grads=True)
        assert all(g.isfinite().all() for g in grads)
        assert sum(g.norm() for g in grads[:2]) > 0
