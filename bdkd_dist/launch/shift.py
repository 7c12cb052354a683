"""How a run's networks fare on images unlike those of training: corrupted ones, and those of another data set."""

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bdkd_dist.data.loader import Batch, open_loader
from bdkd_dist.data.order import rank_shard
from bdkd_dist.data.prepare import Prepared
from bdkd_dist.engine.evaluate import Evaluator, Outputs
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.worker import loader_threads
from bdkd_dist.metrics import CalibrationState
from bdkd_dist.metrics.ranking import auroc, levels
from bdkd_dist.records import shift as records
from bdkd_dist.records.figures import save_png
from bdkd_dist.records.results import read_results
from bdkd_dist.uris import shown

CLEAN = ("clean", 0)
VARIANTS = (CLEAN, *((corruption, severity) for corruption in CORRUPTIONS for severity in SEVERITIES))
"""Corruption and severity of each pass over the images."""
SEED = 0
"""Of the noise: one for all runs, as their figures are compared."""


def record_shift(trainer: Trainer, folder: RunFolder, console: Console) -> None:
    """Measure the networks on the corrupted test images; write ``shift.json`` and ``figures/shift.png``.

    Args:
        trainer: Of the run, in one process.
        folder: Where the run's results are already: the temperatures are read there.
        console: Where progress goes.
    """
    batches = rank_shard(trainer.dataset.test.indices, trainer.recipe.train.batch_size, 0, 1)
    results = read_results(folder.results)["test"]
    temperatures = {network: results[network]["temperature"] for network in trainer.networks}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("corrupting test images", total=len(batches) * len(VARIANTS))
        images = trainer.loaders["test"].batches(0, batches)
        networks = measure_shift(trainer.precise_evaluator(), images, temperatures, lambda: bar.advance(task))
    image_px = trainer.recipe.data.image_px
    amounts = {name: corruption.amounts(image_px) for name, corruption in CORRUPTIONS.items()}
    measured = {"step": trainer.step, "seed": SEED, "amounts": amounts, "networks": networks}
    records.write(records.shift_path(folder.path), measured)
    save_png(records.shift_figure(measured), folder.figures / "shift.png")


def record_ood(trainer: Trainer, source: str, other: Prepared, folder: RunFolder) -> None:
    """Compare the networks' confidence on test images and on those of another data set; write ``ood-NAME.json``.

    Args:
        trainer: Of the run, in one process.
        source: What the user calls the other data set.
        other: Its images, a single split.
        folder: Where the file goes.
    """
    data, batch_size = trainer.recipe.data, trainer.recipe.train.batch_size
    (split,) = other.splits
    images = Beton(*other.paths(split))
    kind = "auto" if data.loader == "resident" else data.loader  # they may differ in size
    evaluator, threads = trainer.precise_evaluator(), loader_threads(trainer.recipe)
    here = rank_shard(trainer.dataset.test.indices, batch_size, 0, 1)
    inside = evaluator.outputs(trainer.loaders["test"].batches(0, here))
    with closing(open_loader(kind, images, Transform.evaluation(data), threads)) as loader:
        outside = evaluator.outputs(loader.batches(0, rank_shard(np.arange(len(images)), batch_size, 0, 1)))
    compared = {
        "step": trainer.step,
        "source": shown(source),
        "split": split,
        "images_inside": len(inside.labels),
        "images_outside": len(outside.labels),
        "networks": compare_confidence(inside, outside),
    }
    records.write(records.ood_path(folder.path, shown(source)), compared)


def measure_shift(
    evaluator: Evaluator,
    batches: Iterable[Batch],
    temperatures: dict[str, float],
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure accuracy and calibration of all networks on clean images and under each corruption and severity.

    Images are decoded once.

    Args:
        evaluator: Holds the networks.
        batches: Of the images.
        temperatures: By network, fitted on clean validation images.
        advance: Called after each of the :data:`VARIANTS` of each batch.

    Returns:
        ``{network: {"temperature": T, "clean": figures, "corruptions": {corruption: [figures of severity 1, …]}}}``
        where figures are ``{"raw": metrics, "temperature_scaled": metrics}``.
    """
    measured = {
        (network, variant): _Calibration(evaluator.num_classes, temperature)
        for network, temperature in temperatures.items()
        for variant in VARIANTS
    }
    for batch in batches:
        for variant in VARIANTS:
            images = batch.images.cpu()
            if variant != CLEAN:
                images = corrupt(images, batch.indices, *variant, seed=SEED)
            outputs = evaluator.outputs([batch._replace(images=images)])
            for network in temperatures:
                measured[network, variant].update(outputs.logits[network], outputs.labels)
            advance()
    return {
        network: {
            "temperature": temperature,
            "clean": measured[network, CLEAN].compute(),
            "corruptions": {
                corruption: [measured[network, (corruption, severity)].compute() for severity in SEVERITIES]
                for corruption in CORRUPTIONS
            },
        }
        for network, temperature in temperatures.items()
    }


def compare_confidence(inside: Outputs, outside: Outputs) -> dict[str, dict[str, float]]:
    """Measure how well each network's confidence tells the run's own images from those of another data set.

    Args:
        inside: Of the run's own images, the positive ones.
        outside: Of the other ones.

    Returns:
        For each network ``auroc`` of the largest softmax probability (Hendrycks and Gimpel, 2017), exact with ties
        counted by half; ``fpr95``, the share of ``outside`` that passes at the highest threshold which at least 95 %
        of ``inside`` pass; and the mean confidences ``confidence_inside`` and ``confidence_outside``.
    """
    figures = {}
    for network in inside.logits:
        own, other = _confidence(inside.logits[network]), _confidence(outside.logits[network])
        positive = torch.cat((torch.ones_like(own), torch.zeros_like(other)))
        size, positives, _ = levels(torch.cat((own, other)), positive)
        rejected = len(own) // 20  # at most 5 %, the least confident
        threshold = own.sort().values[rejected]
        figures[network] = {
            "auroc": float(auroc(size, positives)),
            "fpr95": float((other >= threshold).double().mean()),
            "confidence_inside": float(own.mean()),
            "confidence_outside": float(other.mean()),
        }
    return figures


class _Calibration:
    """Accuracy and calibration of one network, raw and temperature-scaled."""

    def __init__(self, num_classes: int, temperature: float):
        self._temperature = temperature
        self._raw, self._scaled = CalibrationState(num_classes), CalibrationState(num_classes)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self._raw.update(logits, labels)
        self._scaled.update(logits / self._temperature, labels)

    def compute(self) -> dict[str, dict[str, float]]:
        return {"raw": self._raw.compute(), "temperature_scaled": self._scaled.compute()}


def _confidence(logits: Tensor) -> Tensor:
    return logits.double().softmax(1).amax(1)
