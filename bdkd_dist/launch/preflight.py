"""What can be known to be wrong before any work is done."""

import importlib.util
import math
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from bdkd_dist import models
from bdkd_dist.config import Recipe, places
from bdkd_dist.data import jpeg
from bdkd_dist.data.node_folder import node_folder
from bdkd_dist.engine.checkpoint import KEPT, load_teacher
from bdkd_dist.errors import UserError
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.uris import has_secret, shown

RECORDS_BYTES = 64 * 2**20
"""Room for TensorBoard, figures and predictions of a run of usual length."""


def check(recipe: Recipe, folder: RunFolder, on_cluster: bool = False) -> None:
    """Raise UserError for what this machine lacks for the recipe, whose run is or will be in the folder.

    On a cluster this machine need not have the workers' devices.
    """
    if recipe.data.loader == "ffcv" and not jpeg.available() and importlib.util.find_spec("ffcv") is None:
        raise UserError(
            "data.loader=ffcv: the native decoder is not built here, and FFCV is not installed "
            "(`bdkd doctor` says how); data.loader=torch gives the same batches"
        )
    for key, place in places(recipe).items():
        if has_secret(place):
            raise UserError(
                f"{key}={shown(place)} holds a secret key, which the run's recipe.yaml would keep; "
                "give it by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )
    if (on_cluster or recipe.launch.max_workers > 1) and importlib.util.find_spec("ray") is None:
        asked = "--address" if on_cluster else f"launch.workers={recipe.launch.max_workers}"
        raise UserError(f"{asked}: Ray is not installed here; launch.workers=1 needs none")
    if not on_cluster:
        _check_device(recipe)
    networks = {role: _network(recipe, role) for role in recipe.models.by_role}
    if recipe.models.teacher_checkpoint is not None and not folder.begun:
        _check_teacher(networks["teacher"], recipe.models.teacher_checkpoint)
    _check_room(recipe, folder, networks)


def _check_device(recipe: Recipe) -> None:
    launch, gpus = recipe.launch, torch.cuda.device_count()
    needed = math.ceil(launch.min_workers * launch.gpus_per_worker)
    if launch.device == "cuda" and gpus < needed:
        raise UserError(
            f"launch.device=cuda: launch.workers={launch.min_workers} needs {needed} GPU(s), torch sees {gpus}; "
            "launch.device=cpu needs none"
        )


def _network(recipe: Recipe, role: str) -> nn.Module:
    """Return the network, having seen it take images of the recipe's size."""
    name, px = recipe.models.by_role[role], recipe.data.image_px
    where = f"models.{role if role in ('teacher', 'student') else 'students'}={name}"
    try:
        network = models.build(name, recipe.data.num_classes)
        where += f", data.image_px={px}"
        models.check_output(network, recipe.data.num_classes, px)
        if resize := recipe.data.resize:
            smallest = min(resize.start_px, resize.end_px)
            where = where.replace(f"data.image_px={px}", f"data.resize, {smallest} px")
            models.check_output(network, recipe.data.num_classes, smallest)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return network


def _check_teacher(network: nn.Module, where: str) -> None:
    """Raise UserError unless a finished teacher of this shape is there."""
    if (run := RunFolder(where)).begun and not run.finished:
        raise UserError(f"models.teacher_checkpoint={run}: that run is not finished")
    load_teacher(network, where)


def _check_room(recipe: Recipe, run: RunFolder, networks: dict[str, nn.Module]) -> None:
    # Weights, momentum and averages in float32; one checkpoint more than are kept while the next is written.
    copies = {role: 3 if recipe.train.ema_decay and role != "teacher" else 2 for role in networks}
    state_bytes = sum(4 * copies[role] * models.num_parameters(network) for role, network in networks.items())
    needed = state_bytes * (KEPT + 1) + RECORDS_BYTES
    folder = node_folder() if run.is_remote else Path(run.where)
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"run.storage={shown(recipe.run.storage)}: {folder} is not writable")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"run.storage={shown(recipe.run.storage)}: the run needs {needed / 2**20:,.0f} MiB, "
            f"{folder}{', where it is worked on,' if run.is_remote else ''} has {free / 2**20:,.0f} MiB free"
        )
