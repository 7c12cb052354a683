"""Parts of the loop against hand-worked values: the moving average, the losses that are not finite, the pair."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainer import SAMPLES, Noise, Recorder, final_state, trainer

from bdkd_dist.data.loader import Batch
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.endings import Diverged, Interrupted


def test_an_epoch_is_every_sample_once_and_an_evaluation_too(tmp_path: Path) -> None:
    observer = Recorder()
    trainer(tmp_path, "train.log_every_steps=1", observer=observer).run()
    assert [log.step for log in observer.steps] == list(range(1, 11))
    assert [(log.step, log.epoch) for log in observer.evaluations] == [(5, 1), (10, 2)]
    for log in observer.evaluations:
        assert log.networks["student"].metrics["count"] == SAMPLES


def test_training_sees_every_sample_once_an_epoch_in_batches_of_nearly_one_size(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    seen: list[torch.Tensor] = []
    step = made._train_step
    made._train_step = lambda batch: (seen.append(batch.indices), step(batch))  # type: ignore[method-assign]
    made.run()
    assert [len(indices) for indices in seen] == 2 * [8, 8, 8, 7, 7]
    for epoch in (seen[:5], seen[5:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(SAMPLES))
    assert not torch.equal(torch.cat(seen[:5]), torch.cat(seen[5:]))


def test_the_moving_average_follows_the_student(tmp_path: Path) -> None:
    made = trainer(tmp_path, "train.ema_decay=0.75")
    student, average = made.pair.networks["student"], made.stepper.averages["student_ema"]
    expected = {name: value.detach().double().clone() for name, value in student.named_parameters()}
    batches = list(Noise().batches(0, np.arange(24).reshape(3, 8)))
    made.pair.train()
    for batch in batches:
        made._train_step(batch)
        for name, value in student.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * value.detach().double()
    for name, value in average.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(average.buffers(), student.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_not_finite_names_the_first_such_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    made = trainer(tmp_path, "train.log_every_steps=4", "train.checkpoint_every_steps=1")
    step = made._train_step

    def poisoned(batch: Batch) -> None:
        if made.step == 2:
            with torch.no_grad():
                next(made.pair.networks["student"].parameters()).fill_(torch.nan)
        step(batch)

    made._train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(
        Diverged, match=r"not finite at step 3 \(student nan.*the checkpoint before it is .*step-00000002\.pt"
    ):
        made.run()
    kept = Checkpoints(tmp_path).load_newest()
    assert kept is not None
    assert all(value.isfinite().all() for value in kept["networks"]["student"].values())


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7])
@pytest.mark.parametrize(
    "extra",
    [[], ["train.ema_decay=0.9", "optimizer.clip_grad_norm=0.5", "train.precision=bf16"], ["train.precision=fp16"]],
)
def test_stopped_after_any_step_it_goes_on_to_the_same_bits_and_logs(
    tmp_path: Path, stop_at: int, extra: list[str]
) -> None:
    logging = ["train.log_every_steps=3", *extra]
    whole, first, second = Recorder(), Recorder(), Recorder()
    unbroken = trainer(tmp_path / "unbroken", *logging, observer=whole)
    unbroken.run()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "cut", *logging, observer=first, stop_at=stop_at).run()
    resumed = trainer(tmp_path / "cut", *logging, observer=second)
    assert resumed.step == stop_at
    resumed.run()
    for name, network in unbroken.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(resumed.networks[name].state_dict()[key], value), f"{name}.{key}"
    logs = [(log.step, log.scalars) for log in first.steps + second.steps]
    assert logs == [(log.step, log.scalars) for log in whole.steps]
    assert [log.step for log in first.evaluations + second.evaluations] == [5, 10]


def test_records_that_a_disk_refuses_at_the_start_are_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    class Refused(Recorder):
        def start(self, step: int, total_steps: int) -> None:
            begun.append(step)
            if len(begun) < 3:
                raise OSError(28, "No space left on device")

    observer = Refused()
    made = trainer(tmp_path, observer=observer)
    monkeypatch.setattr(made.checkpoints, "pause", lambda seconds: None)
    made.run()
    assert begun == [0, 0, 0]
    assert len(observer.evaluations) == 2


def test_a_weight_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    made = trainer(tmp_path, "train.checkpoint_every_steps=2")
    step = made._train_step

    def poisoned(batch: Batch) -> None:
        step(batch)
        if made.step == 4:
            with torch.no_grad():
                next(made.pair.networks["teacher"].parameters()).fill_(torch.inf)

    made._train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="a weight is not finite after step 4"):
        made.run()
    assert [path.name for path in Checkpoints(tmp_path).paths()] == ["step-00000002.pt"]


def test_momentum_starts_at_zero(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    buffers = [made.stepper.optimizer.state[p]["momentum_buffer"] for p in made.pair.parameters()]
    assert all(buffer.count_nonzero() == 0 for buffer in buffers)


def test_the_pair_normalises_uint8_pixels_per_channel(tmp_path: Path) -> None:
    made = trainer(tmp_path, "data.mean=[0.5,0.25,0.0]", "data.std=[0.5,0.25,1.0]")
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 2, 2, 3)
    pixels = made.pair.normalise(images)
    assert pixels.shape == (1, 3, 2, 2)
    assert pixels.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).tolist() == [pytest.approx([-1.0, -0.2, 1.0])]


def test_both_networks_learn_and_neither_through_the_other(tmp_path: Path) -> None:
    made = trainer(tmp_path, "objective.name=ce")
    made.pair.train()
    loss, losses = made.pair(next(iter(Noise().batches(0, [np.arange(8)]))).images, torch.arange(8) % 3)
    assert loss.item() == pytest.approx(losses.student_loss.item() + losses.teacher_loss.item())
    losses.student_loss.backward()
    assert all(p.grad is not None for p in made.pair.networks["student"].parameters())
    assert all(p.grad is None for p in made.pair.networks["teacher"].parameters())


@pytest.mark.slow
def test_two_and_four_ranks_equal_one_unless_batch_norm_is_local(tmp_path: Path) -> None:
    def weights(world: int, batchnorm: str) -> dict[str, torch.Tensor]:
        settings = ["optimizer.lr=0.002", "objective.gate=soft", f"train.batchnorm={batchnorm}"]
        state = final_state(tmp_path / f"{world}-{batchnorm}", world, *settings)
        assert state["step"] == 10
        return state["networks"]["student"] | {f"t.{k}": v for k, v in state["networks"]["teacher"].items()}

    one = weights(1, "sync")
    close = {"rtol": 1e-3, "atol": 1e-4}
    for world in (2, 4):
        several = weights(world, "sync")
        for key, value in one.items():
            torch.testing.assert_close(several[key], value, **close, msg=lambda text, k=key: f"{k}: {text}")
    local = weights(2, "local")
    assert not all(torch.allclose(local[key], value, **close) for key, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mdca", "competitive"])
def test_two_ranks_decide_over_the_whole_batch_as_one(tmp_path: Path, objective: str) -> None:
    settings = [
        "optimizer.lr=0.002",
        f"objective.name={objective}",
        "objective.weight=10",
        "train.gradient_shares=true",
    ]
    one, two = (final_state(tmp_path / str(world), world, *settings) for world in (1, 2))
    weightless = final_state(tmp_path / "ce", 1, *settings, "objective.weight=0")
    for role, weights in one["networks"].items():
        for key, value in weights.items():
            torch.testing.assert_close(two["networks"][role][key], value, rtol=1e-3, atol=1e-4)
    students = one["networks"]["student"], weightless["networks"]["student"]
    assert not all(torch.allclose(students[0][key], students[1][key], rtol=1e-3, atol=1e-4) for key in students[0])


@pytest.mark.slow
def test_two_ranks_augment_and_mix_as_one(tmp_path: Path) -> None:
    augment = ["rand_ops=1", "brightness=0.4", "hue=0.1", "cutout_px=3", "mixup_alpha=0.4", "cutmix_alpha=1"]
    settings = ["optimizer.lr=0.002", "objective.gate=soft", *(f"data.augment.{key}" for key in augment)]
    one, two = (final_state(tmp_path / str(world), world, *settings) for world in (1, 2))
    plain = final_state(tmp_path / "plain", 1, *settings[:2])
    for role, weights in one["networks"].items():
        for key, value in weights.items():
            torch.testing.assert_close(two["networks"][role][key], value, rtol=1e-3, atol=1e-4)
    students = one["networks"]["student"], plain["networks"]["student"]
    assert not all(torch.allclose(students[0][key], students[1][key], rtol=1e-3, atol=1e-4) for key in students[0])


def test_results_are_measured_in_float32_and_epochs_as_they_train(tmp_path: Path) -> None:
    made = trainer(tmp_path, "train.precision=bf16")
    batch = next(iter(Noise().batches(0, np.arange(8)[None])))
    coarse, exact = (e.outputs([batch]).logits["student"] for e in (made.evaluator, made.precise_evaluator()))
    network = made.pair.networks["student"].eval()
    with torch.no_grad():
        assert torch.equal(exact, network(made.pair.normalise(batch.images)))
    assert torch.equal(coarse, coarse.bfloat16().float())
    assert not torch.equal(coarse, exact)
