"""A trained network for use elsewhere, in one file."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bdkd_dist import models
from bdkd_dist.engine.deploy import exported
from bdkd_dist.errors import UserError, first_line, unknown
from bdkd_dist.files import atomic_write, json_text
from bdkd_dist.launch import named_run
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.records.results import read_results


def export(run: str, out: Path, network: str = "student") -> dict[str, Any]:
    """Write one of a run's networks, as its newest or the named checkpoint has it, as a ``.pt2`` file of torch.export.

    Args:
        run: Path or URI of a run folder or of a file in its ``checkpoints``.
        out: The file; one that is there is replaced.
        network: ``student``, ``teacher``, ``student_ema``; of several students ``student_1`` and so on.

    Returns:
        What the file says of itself: ``network``, ``architecture``, ``num_parameters``, ``step``, ``num_classes``,
        ``image_px``, ``eval_crop``; ``classes`` (their names), ``temperature`` and ``test`` (raw top-1, ECE, NLL) are
        None for a checkpoint that is not the finished run's last.

    Raises:
        UserError: There is no such network or checkpoint, it is another one than is built now, torch.export cannot
            follow it, or the file cannot be written.
    """
    if not out.absolute().parent.is_dir():
        raise UserError(f"OUT {out}: the folder {out.parent} does not exist")
    folder, name = named_run.find(run)
    recipe = folder.read_recipe()
    state, _ = named_run.checkpoints(folder, name).read_newest()
    assert state is not None  # there is one, and it is whole
    weights = state["networks"]
    if network not in weights:
        raise unknown("--network", network, weights)
    architecture = recipe.models.by_role[network.removesuffix("_ema")]
    built = models.build(architecture, recipe.data.num_classes)
    try:
        built.load_state_dict(weights[network])
    except RuntimeError:
        raise UserError(f"{folder}: its {network} is another network than {architecture} is now") from None
    said = {
        "network": network,
        "architecture": architecture,
        "num_parameters": models.num_parameters(built),
        "step": state["step"],
        "num_classes": recipe.data.num_classes,
        "image_px": recipe.data.image_px,
        "eval_crop": recipe.data.eval_crop,
        **_measured(folder, network, state["step"]),
    }
    try:
        atomic_write(out, exported(built, recipe.data, json_text(said).decode()))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror})") from None
    return said


def _measured(folder: RunFolder, network: str, step: int) -> dict[str, Any]:
    """Return what the finished run found of its network; of any other step nothing is known."""
    nothing = dict.fromkeys(("classes", "temperature", "test"))
    if not folder.finished:
        return nothing
    folder.fetch("results.json", "predictions/test.parquet")
    try:
        results = read_results(folder.results)
        if results["step"] != step:
            return nothing
        metadata = pq.read_schema(folder.predictions / "test.parquet").metadata
        found = results["test"][network]
        return {
            "classes": json.loads(metadata[b"class_names"]),
            "temperature": found["temperature"],
            "test": {key: found["raw"][key] for key in ("top1", "ece", "nll")},
        }
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{folder}: results.json or predictions/test.parquet cannot be read ({type(error).__name__}: "
            f"{first_line(error)}); bdkd evaluate writes them anew"
        ) from None
