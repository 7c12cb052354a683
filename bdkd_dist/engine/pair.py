"""The networks as one module: uint8 images and targets in, losses out, under one DDP."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bdkd_dist import models
from bdkd_dist.config import Recipe
from bdkd_dist.engine.past_predictions import PastPredictions
from bdkd_dist.objectives import Losses, Objective

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Pair(nn.Module):
    """A teacher and its students with the objective that trains them together.

    Attributes:
        networks: ``teacher`` and ``student``, or ``student_1``, ``student_2`` and so on; each takes normalised
            (B, 3, H, W) images and gives (B, K) logits. A teacher that does not learn is frozen and stays in eval mode.
        schedules: The objective's parameters that change over training; :meth:`set_progress` says when.
        past: Where the objective uses it, what the networks said of the training samples before.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        objective: Objective,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        autocast_dtype: torch.dtype | None = None,
        gradient_shares: bool = False,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.schedules = objective.schedules
        self._scheduled = {name: torch.zeros((), dtype=torch.float64, device=device) for name in self.schedules}
        self.objective = objective.bound(self._scheduled)
        self.set_progress(0.0)
        self.past: PastPredictions | None = None
        self.gradient_shares = gradient_shares
        if not objective.teacher_learns:
            self.networks["teacher"].requires_grad_(False)
        self.autocast_dtype = autocast_dtype
        # They follow the device but are settings, not state.
        for name, values in pixel_statistics(mean, std).items():
            self.register_buffer(name, values, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor, targets: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Losses]:
        """Return the sum of the networks' losses, and its parts.

        Args:
            images: (B, H, W, 3) uint8.
            targets: (B,) int64 class indices or (B, K) soft targets.
            indices: (B,) int64 of the samples, where :attr:`past` is kept.
        """
        logits = self.logits(images)
        teacher = logits.pop("teacher")
        students = list(logits.values())
        past = self.past.of(indices) if self.past is not None and indices is not None else None
        losses = self.objective.compute(students, teacher, targets, past)
        if self.gradient_shares:
            losses.diagnostics.update(self.objective.gradient_shares(students, teacher, targets, past))
        if self.past is not None and indices is not None:
            self.past.remember(indices, torch.stack([*students, teacher]))
        return losses.student_loss + losses.teacher_loss, losses

    def set_progress(self, progress: float) -> None:
        """Give the objective the parameters it has once a share ``progress``, in [0, 1], of all steps is done.

        In place and without waiting for the device, so that compiled and recorded steps read the new values.
        """
        for name, schedule in self.schedules.items():
            self._scheduled[name].fill_(schedule.at(progress))

    def train(self, mode: bool = True) -> "Pair":
        """Set the mode of every network that learns."""
        super().train(mode)
        if not self.objective.teacher_learns:
            self.networks["teacher"].eval()
        return self

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return each network's (B, K) float32 logits for (B, H, W, 3) uint8 images."""
        pixels = self.normalise(images)
        with self.autocast(images.device):
            return {name: network(pixels).float() for name, network in self.networks.items()}

    def normalise(self, images: Tensor) -> Tensor:
        """Return (B, 3, H, W) float32 for (B, H, W, 3) uint8."""
        return normalised(images, self.mean, self.std)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which the networks run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def pixel_statistics(mean: tuple[float, float, float], std: tuple[float, float, float]) -> dict[str, Tensor]:
    """Return ``mean`` and ``std`` per RGB channel on [0, 255], (3, 1, 1), for those on [0, 1]."""
    return {"mean": 255 * torch.tensor(mean).view(3, 1, 1), "std": 255 * torch.tensor(std).view(3, 1, 1)}


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (B, 3, H, W) float32 in channels-last memory for (B, H, W, 3) uint8: the permuted view is that."""
    return (images.permute(0, 3, 1, 2).float() - mean) / std


def build_pair(recipe: Recipe, device: torch.device) -> Pair:
    """Return the recipe's pair on the device, in channels-last memory, initialised from ``train.seed`` alone."""
    torch.manual_seed(recipe.train.seed)
    pair = Pair(
        {role: models.build(name, recipe.data.num_classes) for role, name in recipe.models.by_role.items()},
        recipe.objective,
        recipe.data.mean,
        recipe.data.std,
        AUTOCAST.get(recipe.train.precision),
        recipe.train.gradient_shares,
        device,
    )
    return pair.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
