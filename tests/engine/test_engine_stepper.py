"""The compiled step, and the step as a CUDA graph: the eager one's values, whatever came before."""

import random
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainer import final_state, trainer
from torch import Tensor, nn

from bdkd_dist.engine.endings import Interrupted
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.optim import load_optimizer, set_learning_rate
from bdkd_dist.engine.replay import WARM_UP, Replayed
from bdkd_dist.engine.stepper import release
from bdkd_dist.errors import UserError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GENTLE = ("optimizer.lr=0.002", "train.ema_decay=0.9")
"""At a high rate sums in another order grow apart within a few steps."""


def assert_networks(got: Trainer, want: Trainer, rtol: float = 0.0, atol: float = 0.0) -> None:
    for name, network in want.networks.items():
        for key, value in network.state_dict().items():
            found = got.networks[name].state_dict()[key]
            torch.testing.assert_close(found, value, rtol=rtol, atol=atol, msg=lambda m, n=name, k=key: f"{n}.{k}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("objective", [["objective.gate=soft"], ["objective.name=switokd"]])
def test_a_compiled_run_equals_the_eager_one_within_float_tolerance(tmp_path: Path, objective: Sequence[str]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (trainer(tmp_path / c, *GENTLE, *objective, f"train.compile={c}") for c in ("false", "true"))
    eager.run()
    compiled.run()
    assert_networks(compiled, eager, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_same_bits_in_a_process_that_saw_other_batches(tmp_path: Path) -> None:
    """An epoch has batches of eight and then of seven; the one that goes on compiles for seven first."""
    torch._dynamo.reset()
    settings = [*GENTLE, "train.compile=true", "train.epochs=1"]
    unbroken = trainer(tmp_path / "unbroken", *settings)
    unbroken.run()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "cut", *settings, stop_at=4).run()
    torch._dynamo.reset()
    resumed = trainer(tmp_path / "cut", *settings)
    resumed.run()
    assert_networks(resumed, unbroken)


@pytest.mark.slow
def test_two_compiled_ranks_equal_two_eager_ones(tmp_path: Path) -> None:
    settings = ["optimizer.lr=0.002", "objective.gate=soft"]
    eager, compiled = (final_state(tmp_path / c, 2, *settings, f"train.compile={c}") for c in ("false", "true"))
    for name, network in eager["networks"].items():
        for key, value in network.items():
            torch.testing.assert_close(compiled["networks"][name][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)  # an epoch has batches of two sizes
def test_the_next_trainer_of_a_process_is_compiled_too_and_the_last_one_is_gone(tmp_path: Path) -> None:
    torch._dynamo.reset()
    for number in range(2):
        of_trial = ["train.compile=true", "train.epochs=1", f"objective.nu_forward={2 + number}"]
        made = trainer(tmp_path / str(number), *of_trial)
        made.run()
        pair = weakref.ref(made.pair)
        del made
        release()
        assert pair() is None


def test_a_rate_on_the_device_is_set_in_place_and_outlives_a_load() -> None:
    """As on a GPU, where a recorded step reads the rate from there."""
    parameter = nn.Parameter(torch.ones(3))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([parameter], lr=rate, momentum=0.9)
    optimizer.param_groups[0]["lr"] = rate
    set_learning_rate(optimizer, 0.25)
    assert rate.item() == 0.25
    other = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    other.state[other.param_groups[0]["params"][0]]["momentum_buffer"] = torch.full((3,), 2.0)
    load_optimizer(optimizer, other.state_dict())
    assert optimizer.param_groups[0]["lr"] is rate
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [2, 2, 2]
    set_learning_rate(optimizer, 0.125)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert parameter.tolist() == pytest.approx(3 * [1 - 0.125 * 0.9 * 2])


class Dropping(nn.Module):
    """A network with dropout, so that a replay must draw anew."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
        self.head = nn.LazyLinear(num_classes)
        self(torch.zeros(2, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Waiting(Dropping):
    """A network that looks at a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(x.sum()) > 0 else 1.0)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("student", ["resnet8", "test_engine_stepper:Dropping"])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_a_recorded_run_has_the_bits_of_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, student: str
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = [*GENTLE, "train.compile=true", f"train.precision={precision}", f"models.student={student}"]
    settings += ["train.epochs=4", "schedule.kind=cosine", "optimizer.clip_grad_norm=1"]
    recorded, plain = (trainer(tmp_path / name, *settings, device="cuda") for name in ("recorded", "plain"))
    assert recorded.stepper.replayed
    plain.stepper._update = plain.stepper._compute
    plain.evaluator.forward = plain.evaluator._logits
    recorded.run()
    plain.run()
    assert_networks(recorded, plain)
    with pytest.raises(Interrupted):
        trainer(tmp_path / "cut", *settings, device="cuda", stop_at=9).run()
    resumed = trainer(tmp_path / "cut", *settings, device="cuda")
    resumed.run()
    assert_networks(resumed, recorded)


@needs_gpu
def test_a_replay_reads_its_own_inputs_of_every_shape() -> None:
    total = torch.zeros((), device="cuda")

    def function(x: Tensor, y: Tensor) -> Tensor:
        total.add_(x.sum())
        return x @ y

    replayed = Replayed(function, torch.device("cuda", 0), "here")
    want = 0.0
    for call in range(4 * WARM_UP):
        x, y = torch.randn(2 + call % 2, 3, device="cuda"), torch.randn(3, 2, device="cuda")
        want += float(x.sum())
        assert torch.equal(replayed(x, y), x @ y)
    assert float(total) == pytest.approx(want, abs=1e-4)


@needs_gpu
@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_a_function_that_draws_on_the_cpu_is_not_recorded(draw: Callable[[], float]) -> None:
    replayed = Replayed(lambda x: x * (0.0 if draw() < 0.5 else 1.0), torch.device("cuda", 0), "here")
    x = torch.ones(3, device="cuda")
    for _ in range(WARM_UP):
        replayed(x)
    with pytest.raises(UserError, match="draw random numbers on the CPU"):
        replayed(x)


@needs_gpu
def test_a_recording_does_not_mind_threads_that_pin_memory() -> None:
    over = threading.Event()

    def pin() -> None:
        kept = []
        while not over.is_set():
            kept.append(torch.empty(2**20 + len(kept)).pin_memory())

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(20):
            replayed = Replayed(lambda x: x.sin() @ x, torch.device("cuda", 0), "here")
            x = torch.randn(64, 64, device="cuda")
            for _ in range(WARM_UP + 1):
                assert torch.equal(replayed(x), x.sin() @ x)
    finally:
        over.set()
        thread.join()


@needs_gpu
def test_what_a_trainer_held_of_the_gpu_is_free_for_others() -> None:
    release()
    before = torch.cuda.memory_reserved()
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() >= before + len(held)
    del held
    release()
    assert torch.cuda.memory_reserved() <= before


@needs_gpu
@pytest.mark.slow
def test_a_network_that_waits_for_the_gpu_is_said(tmp_path: Path) -> None:
    """Comes last: older versions of torch cannot record again in a process in which a recording broke off."""
    torch._dynamo.reset()
    settings = ["train.compile=true", "models.student=test_engine_stepper:Waiting", "train.epochs=4"]
    with pytest.raises(UserError, match=r"train\.compile=true: .*cannot be recorded as a CUDA graph"):
        trainer(tmp_path, *settings, device="cuda").run()
