"""A model of one data-parallel training step: what computes when, what travels when, who waits for whom.

A step is played through layer by layer. The forward pass takes a third of the computing time, the backward pass the
rest, each layer the share of its multiplications. Gradients become ready from the last layer to the first and fill
DDP's buckets of ``launch.bucket_mib``; a full bucket is all-reduced while the backward pass goes on. Synchronised
batch norm sends a message a layer in each direction and computes on when it is there. All messages of a rank take one
line, one after the other: a batch norm's waits for a bucket that is under way, as in one NCCL communicator. The step
ends with the backward pass or with the last bucket, whichever is later.

A message of ``b`` bytes over ``N`` ranks takes

* all-reduce: ``launch + hops + 2 (N-1)/N b/B`` (a ring's bytes; B is the slower of the two links)
* all-gather of ``b`` from each rank: ``launch + hops + (N-1) b/B``

where hops are latencies in a row: within a node ``2 (G-1)`` for an all-reduce on a ring of G ranks; between M nodes
``2 ceil(log2 M)``, as NCCL's trees and halving-doubling go; an all-gather goes around the ring of all N, ``N-M`` hops
within nodes and ``M`` between them where there are several.

Not in it: the loader, the optimiser, contention with other jobs on the network, the time that communication kernels
take from computing ones. Ranks that are not equally fast: of N ranks whose computing time is normal with a deviation
``jitter``, the slowest counts.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
FLOPS_PER_MAC = 6
"""Forward, and backward for inputs and weights: a multiplication and an addition each."""


@dataclass(frozen=True)
class Layer:
    """A convolution, a linear map or a batch norm."""

    parameters: int
    macs: int
    """Multiply-adds per image, forward."""
    bn_channels: int = 0


@dataclass(frozen=True)
class Links:
    """What connects ranks; times in seconds, bandwidths in bytes per second."""

    gpus_per_node: int
    inside_bandwidth: float
    """What a rank sends (and receives at once) within its node."""
    node_bandwidth: float
    """What all ranks of a node together send to other nodes, which in one ring is what the ring carries."""
    launch_s: float = 0.0
    """Of every message, however few the ranks."""
    inside_hop_s: float = 0.0
    node_hop_s: float = 0.0

    def nodes(self, ranks: int) -> int:
        """Return how many nodes the ranks fill."""
        return -(-ranks // self.gpus_per_node)

    def bandwidth(self, ranks: int) -> float:
        """Return the bandwidth of the slowest link of a ring."""
        return min(self.inside_bandwidth, self.node_bandwidth) if self.nodes(ranks) > 1 else self.inside_bandwidth

    def all_reduce_s(self, num_bytes: float, ranks: int) -> float:
        """Return the time of an all-reduce."""
        if ranks == 1:
            return 0.0
        within = 2 * (min(ranks, self.gpus_per_node) - 1) * self.inside_hop_s
        between = 2 * math.ceil(math.log2(self.nodes(ranks))) * self.node_hop_s
        return self.launch_s + within + between + 2 * (ranks - 1) / ranks * num_bytes / self.bandwidth(ranks)

    def all_gather_s(self, num_bytes: float, ranks: int) -> float:
        """Return the time in which each rank gets ``num_bytes`` of each other one."""
        if ranks == 1:
            return 0.0
        nodes = self.nodes(ranks)
        crossings = nodes if nodes > 1 else 0
        hops_s = (ranks - 1 if nodes == 1 else ranks - nodes) * self.inside_hop_s + crossings * self.node_hop_s
        return self.launch_s + hops_s + (ranks - 1) * num_bytes / self.bandwidth(ranks)


@dataclass(frozen=True)
class Settings:
    """How a run exchanges what."""

    sync_batchnorm: bool = True
    cpu: bool = False
    """Batch norm as on the CPU: an all-reduce of 3 C float64 in each direction; else torch's ``SyncBatchNorm``: an
    all-gather of 2 C + 1 float32 forward, an all-reduce of 2 C float32 backward."""
    gradient_bytes: int = 4
    """Per parameter: 4, or 2 with ``train.gradient_compression=bf16``."""
    bucket_mib: float | None = None
    """None is DDP's own: a first bucket of 1 MiB, then 25."""
    overlap: bool = True
    """Without it buckets travel after the backward pass, as where ranks compute on all cores of the machine."""
    jitter: float = 0.0
    """Standard deviation of a rank's computing time, as a share of it."""


@dataclass(frozen=True)
class Step:
    """A predicted step of one rank."""

    step_s: float
    compute_s: float
    """Of the slowest rank."""
    batchnorm_s: float
    """Waiting for batch norm's messages."""
    gradients_s: float
    """Waiting for gradients after the backward pass."""


def layers_of(network: nn.Module, image_px: int) -> list[Layer]:
    """Return a network's layers in the order in which they compute; the network lies on the meta device."""
    found: list[Layer] = []

    def note(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        parameters = sum(parameter.numel() for parameter in module.parameters())
        places = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        weight = 0 if isinstance(module, nn.BatchNorm2d) else module.get_parameter("weight").numel()
        found.append(Layer(parameters, weight * places, getattr(module, "num_features", 0)))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(torch.empty(2, 3, image_px, image_px, device="meta"))
    return found


def predict(layers: Sequence[Layer], compute_s: float, ranks: int, links: Links, settings: Settings) -> Step:
    """Return the time of a step.

    Args:
        layers: Of all networks, in the order in which they compute.
        compute_s: Of one rank alone on its share of the batch: forward and backward.
        ranks: How many there are.
        links: What connects them.
        settings: What they exchange.
    """
    compute_s *= 1 + settings.jitter * _slowest_of(ranks)
    total = sum(layer.macs for layer in layers)
    clock = free = waited = 0.0  # of this rank, of the line, for batch norm
    pending: list[float] = []  # buckets that wait for the end of the backward pass
    for layer in layers:
        clock += compute_s / 3 * layer.macs / total
        if settings.sync_batchnorm and layer.bn_channels:
            message_s = _batchnorm_s(layer.bn_channels, ranks, links, settings, forward=True)
            clock, waited = clock + message_s, waited + message_s
    for layer, bucket_bytes in _backward(layers, settings):
        clock += compute_s * 2 / 3 * layer.macs / total
        if settings.sync_batchnorm and layer.bn_channels and ranks > 1:
            begins = max(clock, free)
            free = begins + _batchnorm_s(layer.bn_channels, ranks, links, settings, forward=False)
            clock, waited = free, waited + free - clock
        if bucket_bytes and settings.overlap:
            free = max(clock, free) + links.all_reduce_s(bucket_bytes, ranks)
        elif bucket_bytes:
            pending.append(bucket_bytes)
    end = max(clock, free) + sum(links.all_reduce_s(num_bytes, ranks) for num_bytes in pending)
    return Step(end, compute_s, waited, end - clock)


def _backward(layers: Sequence[Layer], settings: Settings) -> Iterator[tuple[Layer, float]]:
    """Yield the layers as gradients come, each with the bytes of the bucket that it fills, or 0.

    DDP measures a bucket in the parameters' own type (float32) and closes it with the gradient that reaches its size.
    Told a size, it gives the first bucket that size too.
    """
    own = settings.bucket_mib
    sizes_mib = itertools.chain([1.0 if own is None else own], itertools.repeat(25.0 if own is None else own))
    held, size_mib = 0, next(sizes_mib)
    for number, layer in enumerate(reversed(layers), 1):
        held += layer.parameters
        full = held * FLOAT32_BYTES >= size_mib * 2**20
        if full or (number == len(layers) and held):
            yield layer, float(held * settings.gradient_bytes)
            held, size_mib = 0, next(sizes_mib)
        else:
            yield layer, 0.0


def _batchnorm_s(channels: int, ranks: int, links: Links, settings: Settings, forward: bool) -> float:
    if settings.cpu:
        return links.all_reduce_s(3 * channels * FLOAT64_BYTES, ranks)
    if forward:
        return links.all_gather_s((2 * channels + 1) * FLOAT32_BYTES, ranks)
    return links.all_reduce_s(2 * channels * FLOAT32_BYTES, ranks)


def _slowest_of(ranks: int) -> float:
    """Return the expected largest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


@dataclass(frozen=True)
class Published:
    """ResNet throughput that somebody else measured; docs/scaling.md cites where."""

    what: str
    network: str
    compute_s: float
    """Of one GPU alone, or of the backward pass times 3/2."""
    inside_gbyte_s: float
    """Assumed; it hardly matters."""
    node_gbit_s: float
    base: int
    efficiency: dict[int, float]
    """By the number of GPUs: images/s a GPU, by that of ``base``."""


PUBLISHED = (
    Published("PyTorch's DDP benchmark, V100", "resnet50", 0.100, 120, 400, 1, {8: 0.100 / 0.104, 16: 0.100 / 0.104}),
    Published("PyTorch's DDP benchmark, V100", "resnet101", 0.171, 120, 400, 1, {8: 0.171 / 0.179, 16: 0.171 / 0.179}),
    Published("DLPerf, V100", "resnet50", 128 / 367.29, 120, 100, 1, {8: 7.86 / 8, 16: 15.56 / 16, 32: 29.72 / 32}),
    Published("Goyal et al. 2017, P100", "resnet50", 0.120 * 3 / 2, 60, 50, 8, {256: 0.90, 352: 1 / 1.12}),
)
