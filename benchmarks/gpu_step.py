"""A training step of a pair against what public distillation code does, and against the two networks alone.

    .venv/bin/python benchmarks/gpu_step.py                                     # a small pair where there is no GPU
    .venv/bin/python benchmarks/gpu_step.py --pairs resnet34:resnet18 --rounds 5

Four loops train the same pair on the same images, batch by batch:

ours        Trainer with train.compile, bf16 on a GPU, logs every 20 steps; 32 px: the resident loader's crops and flips
eager       float32; two networks with an SGD each; the loss read at every step, as mdistiller's, CRD's and DML's code
            does; 32 px: torch's DataLoader with the same crops and flips by torchvision
eager bf16  the same under autocast in channels-last memory
networks    both networks' forward and backward alone, compiled, on a GPU replayed as a CUDA graph; no data, no loss, no
            optimiser: the floor

At 224 px every loop finds its batches ready on the device: what loading costs there is benchmarks/input_bound.py's.
Rounds alternate, medians count. Memory is the peak of what a loop allocates on the GPU after its first step.
"""

import argparse
import gc
import os
import statistics
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from images import whole, write_raw
from machine import clock, header, rounds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bdkd_dist import config, models
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.loader import Batch, open_loader
from bdkd_dist.data.order import epoch_order, rank_batches
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import Observers
from bdkd_dist.engine.pair import build_pair
from bdkd_dist.engine.replay import WARM_UP, Replayed

CIFAR_IMAGES = 45_000  # a training epoch, less a tenth for validation
GPU_PAIRS = (
    *("resnet32x4:resnet8x4", "resnet56:resnet20", "wrn40_2:wrn16_2"),
    *("resnet34:resnet18", "resnet50:mobilenet_v2"),
)
CPU_PAIRS = ("resnet20:resnet8",)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """A pair and the images that it is trained on."""

    teacher: str
    student: str
    px: int
    classes: int
    batch: int
    images: int

    @classmethod
    def of(cls, pair: str, batches: int) -> "Setting":
        teacher, student = pair.split(":")
        if teacher in ("resnet34", "resnet50"):
            return cls(teacher, student, px=224, classes=1000, batch=256, images=256 * min(batches, 4))
        return cls(teacher, student, px=32, classes=100, batch=64, images=64 * batches)

    def recipe(self, *overrides: str) -> config.Recipe:
        plain = {
            "models.teacher": self.teacher,
            "models.student": self.student,
            "data.image_px": self.px,
            "data.num_classes": self.classes,
            "train.batch_size": self.batch,
            "optimizer.lr": 1e-4,  # noise is not learnt
        }
        return config.load("cifar100_r56_r20", [*(f"{key}={value}" for key, value in plain.items()), *overrides])

    def pixels(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (self.images, self.px, self.px, 3), dtype=np.uint8)

    def labels(self) -> np.ndarray:
        return np.random.default_rng(1).integers(0, self.classes, self.images)


class Loop(ABC):
    """Trains; ``step`` takes one step and may leave the GPU at work."""

    @abstractmethod
    def step(self) -> None: ...


class Ours(Loop):
    def __init__(self, setting: Setting, folder: Path):
        precision = "bf16" if CUDA else "fp32"
        self.recipe = setting.recipe("train.compile=true", f"train.precision={precision}", "data.loader=resident")
        beton = write_raw(folder / "images.beton", setting.pixels(), setting.labels())
        images = whole(beton, setting.classes)
        self.trainer = Trainer(self.recipe, images, {}, DEVICE, Checkpoints(folder / "checkpoints"), Observers())
        self.trainer.start()
        transform = Transform.training(self.recipe.data, self.recipe.train.seed)
        self.loader = open_loader("resident", beton, transform, 1, device=DEVICE)
        self.batches = self._batches() if setting.px == 32 else self._ready()

    def _batches(self) -> Iterator[Batch]:
        while True:
            trainer = self.trainer
            order = epoch_order(trainer.dataset.train.indices, 0, trainer.epoch)
            yield from self.loader.batches(trainer.epoch, rank_batches(order, self.recipe.train.batch_size, 0, 1))
            trainer.epoch, trainer.step_in_epoch = trainer.epoch + 1, 0

    def _ready(self) -> Iterator[Batch]:
        ready = [next(self._batches())]
        while True:
            yield from ready

    def step(self) -> None:
        self.trainer._train_step(next(self.batches))
        if self.trainer.step % self.recipe.train.log_every_steps == 0:
            self.trainer._log()


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images in memory behind torchvision's transforms, one by one; as many as an epoch of CIFAR-100 has."""

    def __init__(self, setting: Setting, recipe: config.Recipe):
        self.pixels, self.labels = setting.pixels(), setting.labels()
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(setting.px, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(recipe.data.mean, recipe.data.std),
            ]
        )

    def __len__(self) -> int:
        return CIFAR_IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index %= len(self.pixels)
        return self.transform(self.pixels[index]), int(self.labels[index])


class Eager(Loop):
    def __init__(self, setting: Setting, low_precision: bool):
        recipe = setting.recipe()
        self.low_precision = low_precision
        self.memory = torch.channels_last if low_precision else torch.contiguous_format
        torch.manual_seed(0)
        self.networks = [
            models.build(name, setting.classes).to(DEVICE, memory_format=self.memory)  # type: ignore[call-overload]
            for name in (setting.teacher, setting.student)
        ]
        self.optimizers = [
            torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4) for network in self.networks
        ]
        self.losses: list[float] = []
        self.batches = self._batches(setting, recipe) if setting.px == 32 else self._ready(setting)

    def _batches(self, setting: Setting, recipe: config.Recipe) -> Iterator[tuple[Tensor, Tensor]]:
        loading = DataLoader(
            Pictures(setting, recipe),
            setting.batch,
            shuffle=True,
            num_workers=min(8, os.cpu_count() or 1),
            pin_memory=CUDA,
            persistent_workers=True,
        )
        while True:
            yield from loading

    def _ready(self, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
        pixels = torch.from_numpy(setting.pixels()[: setting.batch]).to(DEVICE).permute(0, 3, 1, 2)
        ready = pixels.float().div_(255).contiguous(memory_format=self.memory)
        labels = torch.from_numpy(setting.labels()[: setting.batch]).to(DEVICE)
        while True:
            yield ready, labels

    def step(self) -> None:
        images, labels = next(self.batches)
        images = images.to(DEVICE, non_blocking=True, memory_format=self.memory)
        labels = labels.to(DEVICE, non_blocking=True)
        # As public code sets it; the other loops take cuDNN's own choice.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.low_precision):
                teacher, student = (network(images).float() for network in self.networks)
            student_loss, teacher_loss = losses(student, teacher, labels)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            (student_loss + teacher_loss).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.losses.append(student_loss.item())


def losses(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return BD-KD's losses with its defaults, as a person would write them down."""
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    entropy_s, entropy_t = (-(log_p.exp() * log_p).sum(1).detach() for log_p in (log_s, log_t))
    forward = F.kl_div(log_s, log_t.detach(), reduction="none", log_target=True).sum(1)
    reverse = F.kl_div(log_t.detach(), log_s, reduction="none", log_target=True).sum(1)
    student_loss = (
        F.nll_loss(log_s, labels)
        + (
            torch.where(entropy_t > entropy_s, 2.0, 1.0) * forward
            + torch.where(entropy_s > entropy_t, 2.0, 1.0) * reverse
        ).mean()
    )
    teacher_loss = F.nll_loss(log_t, labels) + F.kl_div(log_t, log_s.detach(), reduction="batchmean", log_target=True)
    return student_loss, teacher_loss


class Networks(Loop):
    def __init__(self, setting: Setting):
        recipe = setting.recipe(f"train.precision={'bf16' if CUDA else 'fp32'}")
        pair = build_pair(recipe, DEVICE)
        networks = list(pair.networks.values())

        def forward(pixels: Tensor) -> Tensor:
            with pair.autocast(DEVICE):
                return torch.stack([network(pixels) for network in networks])

        compiled = torch.compile(forward, dynamic=False)
        self.pixels = pair.normalise(torch.from_numpy(setting.pixels()[: setting.batch]).to(DEVICE))
        with torch.no_grad(), pair.autocast(DEVICE):
            kind = networks[0](self.pixels[:2]).dtype
        gradient = torch.randn(2, setting.batch, setting.classes, device=DEVICE, dtype=kind) / setting.batch

        def both_ways(pixels: Tensor) -> Tensor:
            logits = compiled(pixels)
            logits.backward(gradient)
            pair.zero_grad(set_to_none=True)
            return logits.detach()

        self.run = Replayed(both_ways, DEVICE, "networks") if CUDA else both_ways

    def step(self) -> None:
        self.run(self.pixels)


@dataclass
class Measured:
    """What one loop took."""

    start_s: float
    peak_mib: float
    step_s: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", default=GPU_PAIRS if CUDA else CPU_PAIRS, help="TEACHER:STUDENT")
    parser.add_argument("--rounds", type=int, default=9 if CUDA else 5)
    parser.add_argument("--steps", type=int, default=50 if CUDA else 4, help="of a round")
    arguments = parser.parse_args()
    print(header(), flush=True)
    for pair in arguments.pairs:
        with tempfile.TemporaryDirectory() as folder:
            report(pair, Setting.of(pair, arguments.steps), arguments.rounds, arguments.steps, Path(folder))


def report(pair: str, setting: Setting, count: int, steps: int, folder: Path) -> None:
    """Measure all loops and print their lines."""
    loops: dict[str, Callable[[], Loop]] = {
        "ours": lambda: Ours(setting, folder),
        "eager": lambda: Eager(setting, low_precision=False),
        "eager bf16": lambda: Eager(setting, low_precision=True),
        "networks": lambda: Networks(setting),
    }
    # Of large networks only one loop's tensors fit on the GPU.
    groups = [loops] if setting.px == 32 else [{name: make} for name, make in loops.items()]
    found = {name: measured for group in groups for name, measured in measure(group, count, steps).items()}
    print(f"\n**{pair.replace(':', ' → ')}**, {setting.px} px, batch {setting.batch}:\n")
    epoch = f" s an epoch of {CIFAR_IMAGES:,} |" if setting.px == 32 else ""
    print(f"| loop | ms a step | images/s |{epoch} peak MiB | s to start |")
    print("|---|---|---|---|---|" + ("---|" if epoch else ""))
    step_s = {name: statistics.median(measured.step_s) for name, measured in found.items()}
    for name, measured in found.items():
        cells = [f"{1e3 * step_s[name]:.2f}", f"{setting.batch / step_s[name]:,.0f}"]
        cells += [f"{CIFAR_IMAGES / setting.batch * step_s[name]:.2f}"] if epoch else []
        cells += [f"{measured.peak_mib:,.0f}" if CUDA else "–", f"{measured.start_s:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    ratios = {name: step_s[name] / step_s["ours"] for name in found}
    print(
        f"\nours is {ratios['eager']:.2f} times as fast as eager, {ratios['eager bf16']:.2f} times as fast as eager "
        f"bf16, and takes {100 * (1 / ratios['networks'] - 1):.1f} % longer than the networks alone",
        flush=True,
    )


def measure(group: dict[str, Callable[[], Loop]], count: int, steps: int) -> dict[str, Measured]:
    """Return what loops take over so many rounds of steps, and let go of them."""
    loops, found = {}, {}
    for name, make in group.items():
        loops[name], found[name] = started(make)
    turns = {name: partial(take, loop, steps) for name, loop in loops.items()}
    for name, seconds in rounds(turns, count, warm_up=0, device=DEVICE).items():
        found[name].step_s = [taken / steps for taken in seconds]
    del loops, turns
    gc.collect()  # recorded steps and workers refer to themselves
    if CUDA:
        torch.cuda.empty_cache()
    return found


def started(make: Callable[[], Loop]) -> tuple[Loop, Measured]:
    """Build a loop and take its first steps: compilation, recording, the allocator's growth."""
    baseline = torch.cuda.memory_allocated() if CUDA else 0
    began = clock()
    loop = make()
    loop.step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()  # the first step tried kernels out
    take(loop, WARM_UP + 1)
    start_s = clock(DEVICE) - began
    peak = torch.cuda.max_memory_allocated() - baseline if CUDA else 0
    return loop, Measured(start_s, peak / 2**20)


def take(loop: Loop, steps: int) -> None:
    for _ in range(steps):
        loop.step()


if __name__ == "__main__":
    main()
