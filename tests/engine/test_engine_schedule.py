"""An objective whose numbers change over training: recorded, resumed, shared by ranks and compiled."""

from pathlib import Path

import pytest
import torch
from tiny_trainer import Recorder, final_state, trainer

from bdkd_dist.engine.endings import Interrupted
from bdkd_dist.objectives import BDKD

RAMP = (
    "objective.student_weight={start: 0, end: 4, shape: sigmoid}",
    "objective.temperature={start: 1, end: 3, until: 0.6}",
    "objective.ce_weight.end=0.25",
    "optimizer.lr=0.002",
)
"""Of ten steps; at a high rate sums in another order grow apart within a few."""


def assert_networks(got: dict[str, object], want: dict[str, object], rtol: float = 0.0, atol: float = 0.0) -> None:
    for name, network in want["networks"].items():  # type: ignore[attr-defined]
        for key, value in network.items():
            torch.testing.assert_close(got["networks"][name][key], value, rtol=rtol, atol=atol)  # type: ignore[index]


def test_each_step_computes_with_its_own_values_and_records_them(tmp_path: Path) -> None:
    recorder, seen = Recorder(), []
    made = trainer(tmp_path, *RAMP, "train.log_every_steps=1", observer=recorder)
    forward = made.pair.forward

    def watched(images: torch.Tensor, targets: torch.Tensor):
        objective = made.pair.objective
        assert isinstance(objective, BDKD)
        seen.append([float(v) for v in (objective.student_weight, objective.temperature, objective.ce_weight)])  # type: ignore[arg-type]
        return forward(images, targets)

    made.pair.forward = watched  # type: ignore[method-assign]
    made.run()
    assert len(seen) == 10
    # By hand: step 5 of 10 is half of the ramp, exp(−1.25) = 0.2865; 5/6 of the temperature's; half of the labels'.
    assert seen[5] == pytest.approx([4 * 0.2865047968601901, 1 + 2 * 5 / 6, 0.625])
    assert seen[0] == pytest.approx([4 * 0.006737946999085467, 1, 1])
    assert seen[9][1] == 3
    tags = ["objective/student_weight", "objective/temperature", "objective/ce_weight"]
    assert [[log.scalars[tag] for tag in tags] for log in recorder.steps] == seen
    assert not [tag for tag in recorder.steps[0].scalars if tag.startswith("objective/") and tag not in tags]


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_stopped_inside_a_ramp_it_goes_on_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    unbroken = trainer(tmp_path / "unbroken", *RAMP)
    unbroken.run()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "cut", *RAMP, stop_at=stop_at).run()
    resumed = trainer(tmp_path / "cut", *RAMP)
    resumed.run()
    states = [made.checkpoints.load_newest() or {} for made in (resumed, unbroken)]
    assert_networks(*states)


def test_a_schedule_that_stays_where_it_is_has_the_bits_of_the_number(tmp_path: Path) -> None:
    number = trainer(tmp_path / "number", "objective.student_weight=1.7", "objective.temperature=2.5")
    flat = trainer(
        tmp_path / "flat",
        "objective.student_weight={start: 1.7, end: 1.7, shape: cosine}",
        "objective.temperature={start: 2.5, end: 2.5}",
    )
    for made in (number, flat):
        made.run()
    assert_networks(*(made.checkpoints.load_newest() or {} for made in (flat, number)))


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    one, two = (final_state(tmp_path / str(world), world, *RAMP) for world in (1, 2))
    assert_networks(two, one, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)  # an epoch has batches of two sizes
def test_compiled_steps_equal_eager_ones_with_one_graph_a_size_of_batch(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (trainer(tmp_path / c, *RAMP, f"train.compile={c}") for c in ("false", "true"))
    for made in (eager, compiled):
        made.run()
    states = [made.checkpoints.load_newest() or {} for made in (compiled, eager)]
    assert_networks(*states, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
