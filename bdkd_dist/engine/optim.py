"""SGD with one parameter group per network, and the learning rate as a pure function of the step.

On a GPU the step is one fused kernel a group, and reads the rate from the device: so that a recorded step follows it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from bdkd_dist.config import Optimizer, Schedule
from bdkd_dist.engine.pair import Pair


def build_optimizer(pair: Pair, settings: Optimizer, device: torch.device) -> torch.optim.SGD:
    """Return SGD over the networks that learn, one group each under the network's name."""
    learning = {
        name: [parameter for parameter in network.parameters() if parameter.requires_grad]
        for name, network in pair.networks.items()
    }
    groups: list[dict[str, Any]] = [{"params": ps, "name": name} for name, ps in learning.items() if ps]
    fused = device.type == "cuda"  # with a GradScaler the fused step needs no host synchronisation
    optimizer = torch.optim.SGD(
        groups,
        lr=torch.tensor(settings.lr, dtype=torch.float32, device=device) if fused else settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        fused=fused,
    )
    if settings.momentum:
        # The fused step would make it of uninitialised memory, and skip filling it where fp16 overflows at once.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups, without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that an optimiser on any kind of device returned; how this one steps stays as it is."""
    own = [{key: group[key] for key in ("lr", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)


def learning_rate(step: int, steps_per_epoch: int, epochs: int, lr: float, schedule: Schedule) -> float:
    """Return the rate for optimiser step ``step`` (from 0).

    Linear warm-up over ``warmup_epochs``; then ``cosine`` falls to 0 at the last step's end, or ``step`` multiplies
    by ``gamma`` at each milestone epoch.
    """
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule.kind == "step":
        return lr * schedule.gamma ** sum(step >= epoch * steps_per_epoch for epoch in schedule.milestones)
    progress = (step - warmup_steps) / (epochs * steps_per_epoch - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))
