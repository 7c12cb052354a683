"""What changes how gradients come together, and not what is learnt: micro-batches, buckets, compression; and wishes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainer import SAMPLES, Recorder, final_state, trainer

from bdkd_dist.engine.control import Control, Wish

PLAIN = [f"models.{role}=plain_networks:without_batch_norm" for role in ("teacher", "student")]
LARGE = (*PLAIN, "train.batch_size=32", "objective.gate=soft")  # two batches of 19


def assert_close(one: dict[str, Any], other: dict[str, Any], rtol: float, atol: float) -> None:
    for name, network in other["networks"].items():
        for key, value in network.items():
            torch.testing.assert_close(one["networks"][name][key], value, rtol=rtol, atol=atol)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole, parts = Recorder(), Recorder()
    one = trainer(tmp_path / "whole", *LARGE, "train.log_every_steps=1", observer=whole)
    one.run()
    other = trainer(tmp_path / "parts", *LARGE, "train.log_every_steps=1", "train.micro_batch_size=8", observer=parts)
    seen: list[int] = []
    forward = other.pair.forward
    other.pair.forward = lambda images, targets: (seen.append(len(images)), forward(images, targets))[1]  # type: ignore[method-assign]
    other.run()
    assert seen == 4 * [7, 6, 6]
    assert_close(other.checkpoints.load_newest() or {}, one.checkpoints.load_newest() or {}, 1e-4, 1e-6)
    for ours, theirs in zip(parts.steps, whole.steps, strict=True):
        for tag, value in theirs.scalars.items():
            if "entropy_gap" not in tag:  # a quantile of a part
                assert ours.scalars[tag] == pytest.approx(value, rel=1e-3, abs=1e-5), tag


@pytest.mark.slow
def test_ranks_with_micro_batches_equal_one_process_without(tmp_path: Path) -> None:
    one = final_state(tmp_path / "one", 1, *LARGE)
    three = final_state(tmp_path / "three", 3, *LARGE, "train.micro_batch_size=8", "launch.bucket_mib=0.001")
    assert_close(three, one, 1e-4, 1e-6)


@pytest.mark.slow
def test_compressed_gradients_are_rounded_to_bf16_and_no_further(tmp_path: Path) -> None:
    # A single step: momentum is then the gradient itself.
    shared = (*PLAIN, "train.batch_size=38", "train.epochs=1", "optimizer.weight_decay=0", "optimizer.nesterov=false")
    exact = final_state(tmp_path / "exact", 2, *shared)
    rounded = final_state(tmp_path / "rounded", 2, *shared, "train.gradient_compression=bf16")
    assert exact["step"] == rounded["step"] == 1
    differ = False
    for key, state in exact["optimizer"]["state"].items():
        ours, theirs = rounded["optimizer"]["state"][key]["momentum_buffer"], state["momentum_buffer"]
        assert torch.equal(ours, ours.bfloat16().float())
        # Each of two addends and their sum is rounded, to 8 bits.
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * float(theirs.abs().max()))
        differ |= not torch.equal(ours, theirs)
    assert differ


def test_a_wish_for_a_checkpoint_is_met_at_once_and_the_run_goes_on(tmp_path: Path) -> None:
    class Wants(Control):
        beats = 0

        def beat(self) -> None:
            self.beats += 1

        def wish(self) -> Wish:
            return Wish.CHECKPOINT if made.step == 7 else Wish.GO_ON

    made = trainer(tmp_path)
    control = Wants()
    made.control, made.evaluator.beat = control, control.beat
    saved: list[int | str] = []
    save = made.checkpoints.save
    made.checkpoints.save = lambda step, state: (saved.append(step), save(step, state))[1]  # type: ignore[method-assign]
    made.checkpoints.wait = lambda: saved.append("waited")  # type: ignore[method-assign]
    made.run()
    assert saved == [5, 7, "waited", 10]  # who wished for it hears of it at the next step
    batches_of_an_evaluation = -(-SAMPLES // 8)
    assert control.beats == 10 + 2 * batches_of_an_evaluation
