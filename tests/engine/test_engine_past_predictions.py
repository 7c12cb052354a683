"""What networks said of each training sample before: kept, exchanged between ranks, in every checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainer import SAMPLES, Noise, Recorder, final_state, trainer

from bdkd_dist.engine.endings import Interrupted
from bdkd_dist.engine.past_predictions import PastPredictions
from bdkd_dist.errors import UserError

PS_KD = ("objective.name=ps_kd", "train.epochs=3", "optimizer.lr=0.002")


def test_a_network_learns_from_what_it_said_of_the_same_sample_an_epoch_before(tmp_path: Path) -> None:
    recorder = Recorder()
    made = trainer(tmp_path, *PS_KD, "train.log_every_steps=1", observer=recorder)
    past, said = [], {}
    compute, logits_of = made.pair.objective.compute, made.pair.logits

    def logits(images: torch.Tensor) -> dict[str, torch.Tensor]:
        said["now"] = logits_of(images)
        return dict(said["now"])

    def watched(students, teacher, targets, given):
        past.append(given.clone())
        return compute(students, teacher, targets, given)

    object.__setattr__(made.pair.objective, "compute", watched)
    made.pair.logits = logits  # type: ignore[method-assign]
    spoken: dict[int, torch.Tensor] = {}
    step = made._train_step

    def checked(batch):
        before = {int(i): spoken.get(int(i)) for i in batch.indices}
        step(batch)
        for row, index in enumerate(map(int, batch.indices)):
            want = torch.zeros(2, 3) if before[index] is None else before[index]
            torch.testing.assert_close(past[-1][:, row], want)
            now = torch.stack([said["now"]["student"][row], said["now"]["teacher"][row]])
            spoken[index] = now.detach().softmax(1)

    made._train_step = checked  # type: ignore[method-assign]
    made.run()
    assert len(past) == 15
    assert len(spoken) == SAMPLES
    assert all(bool((given.sum(2) > 0.99).all()) for given in past[5:])
    shares = [log.scalars["objective/past_share"] for log in recorder.steps]
    assert shares == pytest.approx([0.8 * step / 15 for step in range(15)])


@pytest.mark.parametrize("stop_at", [3, 5, 8])
def test_stopped_after_any_step_it_goes_on_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    unbroken = trainer(tmp_path / "unbroken", *PS_KD)
    unbroken.run()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "cut", *PS_KD, stop_at=stop_at).run()
    resumed = trainer(tmp_path / "cut", *PS_KD)
    resumed.run()
    for name, network in unbroken.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(resumed.networks[name].state_dict()[key], value), f"{name}.{key}"
    assert resumed.pair.past is not None
    assert unbroken.pair.past is not None
    assert torch.equal(resumed.pair.past.probabilities, unbroken.pair.past.probabilities)


@pytest.mark.slow
def test_ranks_that_see_other_samples_each_epoch_equal_one_process(tmp_path: Path) -> None:
    one, two = (final_state(tmp_path / str(world), world, *PS_KD, "train.micro_batch_size=8") for world in (1, 2))
    torch.testing.assert_close(two["past"], one["past"], rtol=1e-3, atol=1e-4)
    assert bool((one["past"].sum(2) > 0.99).all())
    for name, network in one["networks"].items():
        for key, value in network.items():
            torch.testing.assert_close(two["networks"][name][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_run_equals_the_eager_one(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (trainer(tmp_path / c, *PS_KD, f"train.compile={c}") for c in ("false", "true"))
    for made in (eager, compiled):
        made.run()
    for name, network in eager.networks.items():
        for key, value in network.state_dict().items():
            torch.testing.assert_close(compiled.networks[name].state_dict()[key], value, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    torch._dynamo.reset()


def test_the_share_of_gradients_is_told_of_the_past_too(tmp_path: Path) -> None:
    recorder = Recorder()
    made = trainer(tmp_path, *PS_KD, "train.gradient_shares=true", "train.log_every_steps=5", observer=recorder)
    made.run()
    shares = [log.scalars["train/student/gradient_share_past"] for log in recorder.steps]
    assert shares[0] == 0
    assert shares[2] > 0


def test_more_than_fits_is_one_line() -> None:
    with pytest.raises(UserError, match=r"2 × 1,281,167 × 1,000 past predictions, 9\.5 GiB \(allowed: 4 GiB\)"):
        PastPredictions(2, 1_281_167, 1000, torch.device("meta"))


def test_rows_are_those_of_the_samples() -> None:
    past = PastPredictions(2, 5, 3, torch.device("cpu"))
    indices = torch.tensor([4, 1])
    logits = torch.arange(12.0).reshape(2, 2, 3)
    past.remember(indices, logits)
    want = np.exp(np.arange(3)) / np.exp(np.arange(3)).sum()
    np.testing.assert_allclose(past.of(indices).numpy(), np.broadcast_to(want, (2, 2, 3)), rtol=1e-6)
    assert past.probabilities[:, [0, 2, 3]].abs().sum() == 0
    assert next(iter(Noise().batches(0, [np.array([4, 1])]))).indices.tolist() == [4, 1]
