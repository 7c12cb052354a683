"""From settings to the three subsets that a run uses."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdkd_dist.config import Data
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.prepare import Progress, prepare, verify
from bdkd_dist.data.splits import Indices, limit, stratified
from bdkd_dist.errors import UserError


@dataclass(frozen=True)
class Subset:
    """Some samples of a beton file."""

    beton: Path
    indices: Indices
    """(N,) int64, rising: positions in the file."""
    labels: Indices
    """(N,) int64: the label of each."""

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test images that share no sample."""

    train: Subset
    validation: Subset
    test: Subset
    class_names: tuple[str, ...]
    fingerprint: str
    """SHA-256 over the contents of the files, whatever machine they were prepared on."""


def load_dataset(data: Data, progress: Progress | None = None) -> Dataset:
    """Prepare the data set if needed, verify its files, hold out validation images and limit the training ones.

    Raises:
        UserError: See :func:`~bdkd_dist.data.prepare.prepare` and :func:`~bdkd_dist.data.prepare.verify`;
            or ``data.train_limit`` exceeds the training images.
    """
    prepared = prepare(data, progress)
    verify(prepared)
    labels = {name: Beton(prepared.path(name)).labels for name in prepared.splits}

    def subset(split: str, indices: Iterable[int]) -> Subset:
        chosen = np.asarray(indices, np.int64)
        return Subset(prepared.path(split), chosen, labels[split][chosen])

    if "validation" in labels:
        kept = np.arange(len(labels["train"]))
        validation = subset("validation", range(len(labels["validation"])))
    else:
        kept, held_out = stratified(labels["train"], data.validation_fraction)
        validation = subset("train", held_out)
        if not len(validation):
            raise UserError(f"data.validation_fraction={data.validation_fraction}: no class has two training images")
    if data.train_limit is not None:
        kept = limit(kept, labels["train"][kept], data.train_limit)
    test = subset("test", range(len(labels["test"])))
    return Dataset(subset("train", kept), validation, test, prepared.class_names, prepared.content)
