"""One optimiser step of a rank: images and targets in, changed networks and the step's values out.

Nothing here waits for the device, apart from torch's ``SyncBatchNorm`` on several GPUs. Under ``train.compile``
normalisation, networks and objective are one compiled graph; on a single GPU the whole step, with its backward pass and
the optimiser, is one CUDA graph.
"""

import copy
import gc
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from bdkd_dist import distributed
from bdkd_dist.config import Recipe
from bdkd_dist.data.order import largest_share
from bdkd_dist.engine.optim import build_optimizer, load_optimizer, set_learning_rate
from bdkd_dist.engine.pair import Pair
from bdkd_dist.engine.replay import Replayed

# torch 2.14 gave it another name.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


def release() -> None:
    """Free what a trainer leaves behind that is no longer used, before the next one of this process.

    It refers to itself, and holds the memory of what it recorded until Python looks for such; torch keeps what it
    compiled of a function, of a few trainers at most: whatever follows would not be compiled; and it keeps memory of
    the device that neighbours there, and whoever asks how much is free, would miss.
    """
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Stepper:
    """Trains a pair batch by batch; :meth:`join` comes before the first.

    Args:
        pair: On the device.
        recipe: Says how to train it.
        device: Where this rank computes.

    Attributes:
        averages: Moving averages of the students, by name.
        optimizer: Of the networks that learn.
        names: Of a step's values; empty before the first step.
        replayed: Whether steps are CUDA graphs.
    """

    def __init__(self, pair: Pair, recipe: Recipe, device: torch.device):
        self.pair, self.recipe, self.device = pair, recipe, device
        self.world = distributed.world_size()
        self.averages = {
            f"{name}_ema": copy.deepcopy(network)
            for name, network in pair.networks.items()
            if recipe.train.ema_decay and name != "teacher"
        }
        self.optimizer = build_optimizer(pair, recipe.optimizer, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.train.precision == "fp16")
        self.names: list[str] = []
        # DDP sends gradients from the host, images that grow would leave the memory of a graph behind at every size, a
        # recorded scaler has not been shown to equal one that is not.
        fixed = self.world == 1 and not self.scaler.is_enabled() and not recipe.data.resize
        self.replayed = recipe.train.compile and device.type == "cuda" and fixed

    def join(self) -> None:
        """Bring the ranks together, and compile, once the networks hold the weights to begin with."""
        recipe = self.recipe
        self._module: nn.Module = self.pair
        self._ddp: DistributedDataParallel | None = None
        if self.world > 1:
            # DDP makes the networks equal on all ranks; a user's own may have begun with other numbers on each.
            distributed.broadcast_(t for average in self.averages.values() for t in average.state_dict().values())
            options: dict[str, Any] = {SYNC_BUFFERS: False}
            self._module = self._ddp = DistributedDataParallel(
                self.pair,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                bucket_cap_mb=recipe.launch.bucket_mib,
                **options,
            )
            if recipe.train.gradient_compression == "bf16":
                self._ddp.register_comm_hook(None, bf16_compress_hook)
        if recipe.train.compile:
            # Every size of batch is compiled on its own: which kernels a step runs must not depend on what sizes came
            # before it, or a run that goes on from a checkpoint could round otherwise. Images that grow are compiled
            # once, for any size; inductor fixes it unless all of a convolution's tensors are channels-last.
            resized = bool(recipe.data.resize)
            self._module = torch.compile(  # type: ignore[assignment]
                self._module,
                dynamic=None if resized else False,
                options={"force_layout_optimization": True} if resized else None,
            )
        self._update = Replayed(self._compute, self.device, "train.compile=true") if self.replayed else self._compute

    def __call__(
        self, images: Tensor, targets: Tensor, indices: Tensor, lr: float, progress: float, global_batch: int
    ) -> Tensor:
        """Take one step.

        Args:
            images: (B, H, W, 3) uint8, this rank's.
            targets: (B,) int64 class indices or (B, K) soft targets.
            indices: (B,) int64 of the samples.
            lr: Learning rate of all networks.
            progress: Share of all steps that is done, in [0, 1], for the objective's schedules.
            global_batch: Samples of all ranks together.

        Returns:
            (n,) float64 by :attr:`names`: this rank's part of their means over the global batch, to be averaged over
            ranks. It may be written to by the next step.
        """
        set_learning_rate(self.optimizer, lr)
        self.pair.set_progress(progress)
        self._global_batch = global_batch  # on one rank it is the batch's own size, which a CUDA graph has fixed
        if self.pair.past is None:
            return self._update(images, targets)
        return self._update(images, targets, indices.to(self.device, non_blocking=True))

    def _compute(self, *inputs: Tensor) -> Tensor:
        """Take the step for images, targets and, where past predictions are kept, indices."""
        rows: list[Tensor] = []
        sizes = self._micro_batches(len(inputs[0]))
        parts = zip(*(values.split(sizes) for values in inputs), strict=True)
        for number, (some_images, some_targets, *some_indices) in enumerate(parts, 1):
            if self.recipe.data.resize:  # a mark is a tensor's own, not that of what it is a view of
                torch._dynamo.maybe_mark_dynamic(some_images, (0, 1, 2))
                torch._dynamo.maybe_mark_dynamic(some_targets, 0)
            with nullcontext() if number == len(sizes) else self._without_exchange():
                loss, losses = self._module(some_images, some_targets, *some_indices)
                # Makes the sum of micro-batches' means, averaged over ranks, the mean over the global batch.
                weight = len(some_targets) * self.world / self._global_batch
                self.scaler.scale(loss if weight == 1 else loss * weight).backward()
            self.names = self.names or list(losses.diagnostics)
            rows.append(weight * torch.stack([value.double() for value in losses.diagnostics.values()]))
        if (norm := self.recipe.optimizer.clip_grad_norm) is not None:
            self.scaler.unscale_(self.optimizer)
            for group in self.optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return sum(rows[1:], start=rows[0])

    def _micro_batches(self, samples: int) -> list[int]:
        """Return the sizes in which this rank takes its samples: as many on every rank, for they exchange in each."""
        if (limit := self.recipe.train.micro_batch_size) is None:
            return [samples]
        count = -(-largest_share(self._global_batch, self.world) // limit)
        return [samples // count + (number < samples % count) for number in range(count)]

    def _without_exchange(self) -> AbstractContextManager[Any]:
        """Return the context in which gradients only add up on this rank."""
        return self._ddp.no_sync() if self._ddp is not None else nullcontext()

    @torch.no_grad()
    def _average(self) -> None:
        """Let the moving averages follow the students."""
        for name, average in self.averages.items():
            student = self.pair.networks[name.removesuffix("_ema")]
            decay = self.recipe.train.ema_decay or 0.0
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
            # Running statistics follow the student's: they are averages already.
            for mean, value in zip(average.buffers(), student.buffers(), strict=True):
                mean.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what going on needs beside the networks' own states."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stat_names": self.names,
        }
        return state if self.pair.past is None else state | {"past": self.pair.past.probabilities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, maybe on another kind of device."""
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.names = state["stat_names"]
        if self.pair.past is not None:
            self.pair.past.load(state["past"])
