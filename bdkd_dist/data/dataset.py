"""From settings to the three subsets that a run uses."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bdkd_dist.config import Data
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.order import Indices
from bdkd_dist.data.prepare import Progress, prepare
from bdkd_dist.data.prepared import Prepared, is_prepared, read_manifest, verify
from bdkd_dist.data.remote import find_remote, with_tables_only
from bdkd_dist.data.sources.storage import Place
from bdkd_dist.data.splits import limit, stratified, with_test
from bdkd_dist.data.stage import stage
from bdkd_dist.errors import UnfitNode, UserError
from bdkd_dist.uris import is_uri, shown


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
    test_fingerprint: str
    """The same of the test images' files alone."""


def load_dataset(data: Data, progress: Progress | None = None) -> Dataset:
    """Find or make the prepared files, see that they are whole, copy them near if asked, and open them.

    Raises:
        UnfitNode: The files are not here, not whole, or there is no room for them; see :func:`find_prepared`,
            :func:`~bdkd_dist.data.prepared.verify` and :func:`~bdkd_dist.data.stage.stage`.
        UserError: See :func:`open_dataset`.
    """
    try:
        prepared = find_prepared(data, progress)
        if data.stage == "shared":
            verify(prepared)
        else:
            prepared = stage(prepared, data.stage, Path(data.stage_folder).expanduser() if data.stage_folder else None)
    except UserError as error:
        raise UnfitNode(str(error)) from None
    return open_dataset(prepared, data)


def find_prepared(data: Data, progress: Progress | None = None) -> Prepared:
    """Return the prepared files that ``data.root`` is, or those made from the source that it is.

    Raises:
        UserError: See :func:`~bdkd_dist.data.prepare.prepare`; or prepared files of other classes or without the
            splits that a run needs.
    """
    prepared = _prepared_before(data)
    if prepared is None:
        return prepare(data, progress)
    splits = with_test(prepared.splits)
    root = shown(str(data.root))
    for name in ("train", "test"):
        if name not in splits:
            raise UserError(f"data.root={root} holds no {name} images (it holds: {', '.join(prepared.splits)})")
    if data.num_classes != (K := len(prepared.class_names)):
        raise UserError(f"data.num_classes={data.num_classes}: data.root={root} has {K} classes")
    return replace(prepared, splits=splits)


def _prepared_before(data: Data) -> Prepared | None:
    """Return the prepared files that ``data.root`` is; None where it is something else."""
    if data.root is None:
        return None
    place = Place.of(data.root) if is_uri(data.root) else None
    if place and not place.is_local:
        found = find_remote(place)
        if found and data.stage == "shared":
            raise UserError(
                f"data.root={shown(data.root)} cannot be read in place: set data.stage=local, or memory, and each node "
                "copies it"
            )
        return found
    folder = place.folder if place else Path(data.root).expanduser()
    return read_manifest(folder) if is_prepared(folder) or any(folder.glob("*.beton")) else None


def open_dataset(prepared: Prepared, data: Data) -> Dataset:
    """Open prepared files, hold out validation images where no split of them is, and limit the training ones.

    Of files that lie elsewhere only the tables are read: their images are not there.

    Raises:
        UserError: A file is missing or no whole beton; or ``data.train_limit`` exceeds the training images.
    """
    if prepared.place:
        with tempfile.TemporaryDirectory() as folder:  # what is mapped stays
            try:
                return open_dataset(with_tables_only(prepared, Path(folder)), data)
            except UserError as error:
                raise UserError(str(error).replace(folder, prepared.where())) from None
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
    fingerprints = prepared.content, prepared.content_of("test")
    return Dataset(subset("train", kept), validation, test, prepared.class_names, *fingerprints)
