"""Prepared data sets: one folder of beton files and a manifest per source, made once and shared by runs.

How an image is stored stands in :mod:`bdkd_dist.data.storing`, how a piece of the source becomes a file in
:mod:`bdkd_dist.data.converting`. All files are written into ``<folder>.building`` and the folder is renamed at the end:
it is complete or absent. A preparation that was broken off goes on with the pieces that it had not finished.
"""

import errno
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from threading import Lock

from bdkd_dist.config import Data
from bdkd_dist.cores import usable_cores
from bdkd_dist.data.converting import (
    BrokenImage,
    Converted,
    LeftOut,
    Rules,
    Task,
    Tell,
    broken,
    convert_all,
    finished,
    store_batch,
)
from bdkd_dist.data.prepared import Prepared, is_prepared, read_manifest, write_manifest
from bdkd_dist.data.sources import Source, listed_source, open_source
from bdkd_dist.data.storing import num_bytes
from bdkd_dist.data.turns import turn_at
from bdkd_dist.errors import UserError, first_line

Progress = Callable[[str, int, int], None]
"""Called with (split, images done, images in all); the first call may tell of images that were done before."""
ConvertAll = Callable[[Sequence[Task], Tell], Sequence[Converted]]
"""Converts pieces somewhere and tells how far it is; see :func:`~bdkd_dist.data.converting.convert_all`."""

REPORT = "left_out.parquet"
ESTIMATE_IMAGES = 16


def prepare(data: Data, progress: Progress | None = None) -> Prepared:
    """Return the prepared data set, made now if it is not in ``data.prepared`` yet.

    Processes that prepare the same source at once wait for the first of them. A killed one leaves nothing that is used,
    apart from the pieces that it had finished.

    Raises:
        UserError: The source is wrong, an image cannot be decoded, or the disk is too small.
    """
    if before := _made_before(data):
        return before
    return prepare_source(open_source(data), data, progress)


def _made_before(data: Data) -> Prepared | None:
    """Return what was made of shards or tars that did not change since, of which then nothing is read."""
    if not (listed := listed_source(data)) or not is_prepared(folder := _folder(data, *listed)):
        return None
    prepared = read_manifest(folder)
    return prepared if len(prepared.class_names) == data.num_classes else None  # the source says it better


def _folder(data: Data, name: str, fingerprint: str) -> Path:
    return Path(data.prepared).expanduser() / f"{name}-{fingerprint[:12]}"


def prepare_source(source: Source, data: Data, progress: Progress | None = None) -> Prepared:
    """Return the prepared files of a source; see :func:`prepare`."""
    folder = _folder(data, source.name, source.fingerprint)
    if not is_prepared(folder):
        with _alone(folder, f"data.prepared={data.prepared}"):
            if not is_prepared(folder):
                shutil.rmtree(folder, ignore_errors=True)  # one that lost its manifest
                rules = Rules(data.max_side_px, data.jpeg_quality)
                try:
                    _build(source, folder, rules, in_this_process(data), f"data.prepared={data.prepared}", progress)
                except BrokenImage:  # mended, it will be another source
                    shutil.rmtree(_building(folder), ignore_errors=True)
                    raise
    return read_manifest(folder)


def prepare_into(
    source: Source, folder: Path, rules: Rules, convert: ConvertAll, progress: Progress | None = None
) -> Prepared:
    """Prepare a source into a folder, going on where the same was broken off; what is there already is left.

    Raises:
        UserError: The folder holds something else, or :func:`prepare`'s reasons.
    """
    with _alone(folder, str(folder)):
        if is_prepared(folder):
            return _same(read_manifest(folder), source, rules)
        if folder.is_mount():
            raise UserError(f"{folder} is a disk of its own: give a folder in it")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is no prepared data set: give a new folder, or delete it")
        return _build(source, folder, rules, convert, str(folder), progress)


def in_this_process(data: Data) -> ConvertAll:
    """Return what converts pieces in this process, with ``data.threads`` threads or one for each core."""
    threads = data.threads or usable_cores()
    return lambda tasks, tell: convert_all(tasks, threads, tell)


def _same(prepared: Prepared, source: Source, rules: Rules) -> Prepared:
    """Return what is there if it is what is wanted."""
    if prepared.fingerprint != source.fingerprint:
        why = "was prepared from another source, or with another --max-side or --quality"
    elif rules.check == "full" and prepared.check != "full":
        why = f"was prepared with --check {prepared.check}"
    elif rules.undecodable == "stop" and prepared.left_out:
        why = f"was prepared without the images that could not be decoded ({REPORT} names them)"
    else:
        return prepared
    raise UserError(f"{prepared.folder} {why}: give another folder, or delete it to prepare it again")


@contextmanager
def _alone(folder: Path, where: str) -> Iterator[None]:
    """Wait until no other process prepares this folder; say in one line what the disk does not do."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with turn_at(folder, f"another process that prepares {folder}"):
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{where}: the disk is full; what is whole is kept: make room, and the same command goes on"
            ) from None
        raise UserError(f"{where}: {first_line(error)}") from None


def _building(folder: Path) -> Path:
    return folder.with_name(folder.name + ".building")


def _build(
    source: Source, folder: Path, rules: Rules, convert: ConvertAll, where: str, progress: Progress | None
) -> Prepared:
    """Convert the pieces that are not finished yet, then write report and manifest and give the folder its name."""
    building = _building(folder)
    building.mkdir(exist_ok=True)
    if strange := [
        path.name for path in building.iterdir() if not re.search(r"\.(beton|json|parquet|partial)", path.name)
    ]:
        raise UserError(f"{building} holds other files ({strange[0]}): give another folder, or remove them")
    tasks = list(_tasks(source, building, rules))
    known = {task.path.name: before for task in tasks if (before := finished(task))}
    _clean(building, [task for task in tasks if task.path.name in known])
    left = [task for task in tasks if task.path.name not in known]
    _check_space(left, building, where)
    count = _Count(source, progress)
    for task in tasks:
        if task.path.name in known:
            count(task.split, len(task.piece))
    known |= {task.path.name: new for task, new in zip(left, convert(left, count), strict=True)}
    _clean(building, tasks)
    prepared = _joined(source, building, rules, [(task, known[task.path.name]) for task in tasks])
    write_manifest(prepared)
    building.rename(folder)
    for task in tasks:
        (folder / task.record.name).unlink(missing_ok=True)
    return replace(prepared, folder=folder)


def _tasks(source: Source, building: Path, rules: Rules) -> Iterator[Task]:
    for name, split in source.splits.items():
        first = 0
        for number, piece in enumerate(split.pieces):
            if len(piece):
                yield Task(name, first, piece, building / f"{name}-{number:05d}.beton", source.fingerprint, rules)
            first += len(piece)


def _clean(building: Path, kept: Sequence[Task]) -> None:
    """Remove all but these pieces' files: what killed processes left, and what is of another source or other rules."""
    names = {path.name for task in kept for path in (task.path, task.record)}
    for path in building.iterdir():
        if path.name not in names:
            path.unlink(missing_ok=True)  # a worker that died slowly may remove its own


def _check_space(tasks: Sequence[Task], building: Path, where: str) -> None:
    """Estimate the files' size from how the first images of each split shrink or grow."""
    needed_bytes = 0.0
    for split in dict.fromkeys(task.split for task in tasks):
        of_split = [task for task in tasks if task.split == split]
        first = list(islice(of_split[0].piece.iterate(), ESTIMATE_IMAGES))
        outcomes = store_batch(of_split[0], of_split[0].first, first)
        stored_bytes = sum(outcome[0].num_bytes for outcome in outcomes if not isinstance(outcome, LeftOut))
        source_bytes = sum(num_bytes(sample.image) for sample in first)
        needed_bytes += stored_bytes / max(1, source_bytes) * sum(task.piece.encoded_bytes for task in of_split)
    free_bytes = shutil.disk_usage(building).free
    if needed_bytes > free_bytes:
        raise UserError(f"{where}: needs {needed_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB free")


class _Count:
    """Counts the images of each split that are done, whichever thread tells of them."""

    def __init__(self, source: Source, progress: Progress | None):
        self._totals = {name: len(split) for name, split in source.splits.items()}
        self._progress = progress
        self._done: Counter[str] = Counter()
        self._lock = Lock()

    def __call__(self, split: str, images: int) -> None:
        with self._lock:
            self._done[split] += images
            if self._progress:
                self._progress(split, self._done[split], self._totals[split])


def _joined(source: Source, building: Path, rules: Rules, pieces: Sequence[tuple[Task, Converted]]) -> Prepared:
    """Put the pieces' files together, see that each image of the source is accounted for, and write the report."""
    splits, left_out = {}, {}
    for name, split in source.splits.items():
        of_split = [converted for task, converted in pieces if task.split == name]
        splits[name] = tuple(converted.part for converted in of_split if converted.part)
        missing = [image for converted in of_split for image in converted.left_out]
        assert len(split) == sum(part.samples for part in splits[name]) + len(missing)
        if not splits[name]:
            raise UserError(f"no {name} image can be decoded: {broken(missing[0])}")
        if missing:
            left_out[name] = missing
    if left_out:
        _report([image for images in left_out.values() for image in images], building / REPORT)
    counts = {name: len(images) for name, images in left_out.items()}
    return Prepared(building, source.fingerprint, source.class_names, splits, counts, rules.check)


def _report(images: Sequence[LeftOut], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([asdict(image) for image in images]), path)
