"""What can be known to be wrong before any work is done."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch

from bdkd_dist import models
from bdkd_dist.config import Recipe
from bdkd_dist.engine.checkpoint import KEPT
from bdkd_dist.errors import UserError, first_line

RECORDS_BYTES = 64 * 2**20
"""Room for TensorBoard, figures and predictions of a run of usual length."""


def check(recipe: Recipe) -> None:
    """Raise UserError for what this machine lacks for the recipe."""
    if recipe.data.loader == "ffcv" and importlib.util.find_spec("ffcv") is None:
        raise UserError(
            "data.loader=ffcv: FFCV is not installed here (`bdkd doctor` says how); "
            "data.loader=torch gives the same batches"
        )
    _check_device(recipe)
    _check_room(recipe, sum(_check_model(recipe, role) for role in ("teacher", "student")))


def _check_device(recipe: Recipe) -> None:
    workers, device = recipe.launch.workers, recipe.launch.device
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < workers:
        raise UserError(
            f"launch.device=cuda: launch.workers={workers} needs as many GPUs, torch sees {gpus}; "
            "launch.device=cpu needs none"
        )
    if workers > 1 and importlib.util.find_spec("ray") is None:
        raise UserError(f"launch.workers={workers}: Ray is not installed here; launch.workers=1 needs none")


def _check_model(recipe: Recipe, role: str) -> int:
    """Return the network's number of parameters, having seen it take images of the recipe's size."""
    name, px = getattr(recipe.models, role), recipe.data.image_px
    network = models.build(name, recipe.data.num_classes).eval()
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, px, px))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"models.{role}={name} does not take data.image_px={px} ({first_line(error)})") from None
    return models.num_parameters(network)


def _check_room(recipe: Recipe, parameters: int) -> None:
    # Weights and momentum in float32; one checkpoint more than are kept while the next is written.
    needed = parameters * 8 * (KEPT + 1) + RECORDS_BYTES
    folder = Path(recipe.run.storage).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"run.storage={recipe.run.storage}: {folder} is not writable")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"run.storage={recipe.run.storage}: the run needs {needed / 2**20:,.0f} MiB, "
            f"{folder} has {free / 2**20:,.0f} MiB free"
        )
