"""The scaling model and the benchmarks' reading of step times against values worked out by hand."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
model = importlib.import_module("scaling_model")
ray_overhead = importlib.import_module("ray_overhead")

# 1 s a message, 1 GB/s and 1/2 s a hop within nodes of 8, 1/2 GB/s and 1/4 s between them.
LINKS = model.Links(8, 1e9, 0.5e9, launch_s=1.0, inside_hop_s=0.5, node_hop_s=0.25)
MIB = 2**20


def wire(bytes_per_s: float, launch_s: float = 0.0) -> object:
    """Links of one node without hops."""
    return model.Links(1024, bytes_per_s, 1.0, launch_s=launch_s)


@pytest.mark.parametrize(
    ("ranks", "seconds"),
    [
        (1, 0.0),
        (2, 1 + 2 * 0.5 + 1.0),  # each rank sends half of the bytes twice
        (8, 1 + 14 * 0.5 + 1.75),
        (16, 1 + 14 * 0.5 + 2 * 0.25 + 3.75),  # the ring goes at the nodes' half speed
        (40, 1 + 14 * 0.5 + 6 * 0.25 + 3.9),  # 5 nodes: a tree of 3 levels, up and down
    ],
)
def test_an_all_reduce_is_launch_hops_and_a_rings_bytes(ranks: int, seconds: float) -> None:
    assert LINKS.all_reduce_s(1e9, ranks) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("ranks", "seconds"),
    [(1, 0.0), (4, 1 + 3 * 0.5 + 3.0), (16, 1 + 14 * 0.5 + 2 * 0.25 + 30.0)],
)
def test_an_all_gather_goes_around_the_ring_once(ranks: int, seconds: float) -> None:
    assert LINKS.all_gather_s(1e9, ranks) == pytest.approx(seconds)


@pytest.mark.parametrize(("name", "batch_norms"), [("ResNet18", 20), ("ResNet34", 36), ("ResNet50", 53)])
def test_layers_hold_the_parameters_and_multiplications_that_torchvision_states(name: str, batch_norms: int) -> None:
    stated = torchvision.models.get_model_weights(name.lower()).IMAGENET1K_V1.meta
    with torch.device("meta"):
        network = torchvision.models.get_model(name.lower())
    layers = model.layers_of(network, 224)
    assert sum(layer.parameters for layer in layers) == stated["num_params"]
    assert 1e-9 * sum(layer.macs for layer in layers) == pytest.approx(stated["_ops"], abs=0.001)
    assert sum(layer.bn_channels > 0 for layer in layers) == batch_norms


# Two layers of 1 MiB of float32; of 9 s the first computes 1 forward and 2 backward, the second 2 and 4.
TWO_LAYERS = [model.Layer(MIB // 4, macs=1), model.Layer(MIB // 4, macs=2)]


@pytest.mark.parametrize(
    ("bytes_per_s", "settings", "step_s"),
    [
        (MIB, {"bucket_mib": 1}, 10),  # 7 to 8 beside the backward pass, and 9 to 10 after it
        (MIB / 4, {"bucket_mib": 1}, 15),  # 7 to 11, and then 11 to 15
        (MIB, {"bucket_mib": 25}, 11),  # one bucket, full at 9
        (MIB, {"bucket_mib": 1, "overlap": False}, 11),
        (MIB, {"bucket_mib": 1, "gradient_bytes": 2}, 9.5),
    ],
)
def test_buckets_travel_when_full_one_after_the_other(
    bytes_per_s: float, settings: dict[str, float], step_s: float
) -> None:
    step = model.predict(TWO_LAYERS, 9.0, 2, wire(bytes_per_s), model.Settings(**settings))
    assert step.step_s == pytest.approx(step_s)
    assert step.gradients_s == pytest.approx(step_s - 9)
    assert step.batchnorm_s == 0


@pytest.mark.parametrize("bucket_mib", [None, 0.1, 1.0, 25.0, 1000.0])
def test_every_gradient_travels_once_whatever_the_buckets(bucket_mib: float | None) -> None:
    layers = [model.Layer(1000 * n, macs=1) for n in range(1, 101)]
    settings = model.Settings(overlap=False, bucket_mib=bucket_mib)
    step = model.predict(layers, 1.0, 4, wire(1e6), settings)
    assert step.gradients_s == pytest.approx(2 * 3 / 4 * 4 * 5_050_000 / 1e6)


def test_a_batch_norm_waits_for_its_own_message_and_for_the_bucket_before_it() -> None:
    layers = [model.Layer(0, macs=0, bn_channels=4), model.Layer(MIB // 4, macs=1)]
    step = model.predict(layers, 3.0, 2, wire(MIB, launch_s=0.5), model.Settings(bucket_mib=1))
    forward, backward = 9 * 4 / MIB, 8 * 4 / MIB  # bytes of 2 C + 1 and of 2 C float32
    # forward: 0.5 message, 1 computing; backward: 2 computing until 3.5, bucket until 5, message until 5.5
    assert step.step_s == pytest.approx(5.5 + forward + backward)
    assert step.batchnorm_s == pytest.approx(0.5 + 2.0 + forward + backward)
    assert step.gradients_s == 0


def test_on_the_cpu_a_batch_norm_sends_three_doubles_a_channel_each_way() -> None:
    layers = [model.Layer(0, macs=1, bn_channels=10)]
    step = model.predict(layers, 1.0, 2, wire(1.0), model.Settings(cpu=True, overlap=False))
    assert step.batchnorm_s == pytest.approx(2 * 240)


@pytest.mark.parametrize(("ranks", "largest"), [(1, 0.0), (2, 0.5642), (8, 1.4236), (100, 2.5076), (1000, 3.2414)])
def test_the_slowest_of_unequal_ranks_counts(ranks: int, largest: float) -> None:
    """The expected largest of so many standard normal numbers, from tables of order statistics."""
    step = model.predict(TWO_LAYERS, 1.0, ranks, wire(1e15), model.Settings(jitter=0.1))
    assert step.step_s == pytest.approx(1 + 0.1 * largest, abs=0.003)


def test_step_times_are_read_from_a_runs_events(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step, images_per_s, at in ((10, 100.0, 1030.0), (20, 200.0, 1032.5), (30, 400.0, 1033.75)):
            writer.add_scalar("speed/images_per_s", images_per_s, step, walltime=at)
            writer.add_scalar("train/student/loss", 1.0, step, walltime=at)
    timing = ray_overhead.read(tmp_path, began=1000.0, ended=1050.0, batch_size=50, warmup_steps=10)
    assert timing.step_s == pytest.approx((0.25 + 0.125) / 2)
    assert timing.first_step_s == pytest.approx(1030 - 10 * 0.5 - 1000)
    assert timing.end_s == pytest.approx(50)
