"""From settings to the three subsets that a run uses."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bdkd_dist.config import Data
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.prepare import Progress, prepare
from bdkd_dist.data.prepared import Prepared, is_prepared, read_manifest, verify
from bdkd_dist.data.splits import Indices, limit, stratified
from bdkd_dist.data.stage import stage
from bdkd_dist.errors import UserError


@dataclass(frozen=True)
class Subset:
    """Some samples of a beton."""

    beton: Beton
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
    """Find or make the prepared files, see that they are whole, copy them near if asked, and open them.

    Raises:
        UserError: See :func:`find_prepared`, :func:`~bdkd_dist.data.prepared.verify`,
            :func:`~bdkd_dist.data.stage.stage` and :func:`open_dataset`.
    """
    prepared = find_prepared(data, progress)
    if data.stage == "shared":
        verify(prepared)
    else:
        prepared = stage(prepared, data.stage, Path(data.stage_folder).expanduser() if data.stage_folder else None)
    return open_dataset(prepared, data)


def find_prepared(data: Data, progress: Progress | None = None) -> Prepared:
    """Return the prepared files that ``data.root`` is, or those made from the source that it is.

    Raises:
        UserError: See :func:`~bdkd_dist.data.prepare.prepare`; or prepared files of other classes or without the
            splits that a run needs.
    """
    root = Path(data.root).expanduser() if data.root is not None else None
    if root is None or not (is_prepared(root) or any(root.glob("*.beton"))):
        return prepare(data, progress)
    prepared = read_manifest(root)
    splits = dict(prepared.splits)
    if "test" not in splits and "validation" in splits:  # ImageNet as it comes
        splits["test"] = splits.pop("validation")
    for name in ("train", "test"):
        if name not in splits:
            raise UserError(f"data.root={data.root} holds no {name} images (it holds: {', '.join(prepared.splits)})")
    if data.num_classes != len(prepared.class_names):
        raise UserError(
            f"data.num_classes={data.num_classes}: data.root={data.root} has {len(prepared.class_names)} classes"
        )
    return replace(prepared, splits=splits)


def open_dataset(prepared: Prepared, data: Data) -> Dataset:
    """Open prepared files, hold out validation images where no split of them is, and limit the training ones.

    Raises:
        UserError: A file is missing or no whole beton; or ``data.train_limit`` exceeds the training images.
    """
    betons = {name: Beton(*prepared.paths(name)) for name in prepared.splits}
    labels = {name: beton.labels for name, beton in betons.items()}

    def subset(split: str, indices: Iterable[int]) -> Subset:
        chosen = np.asarray(indices, np.int64)
        return Subset(betons[split], chosen, labels[split][chosen])

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
