"""Copies of prepared files near the workers: on the node's own disk or in its memory (``data.stage=local|memory``).

The first worker of a node copies, under a lock, and the others wait for it. (Tasks that a cluster pins to nodes before
the run would miss nodes that join later; a worker knows which node it is on.) Later runs find the copy by its contents.
Nothing deletes it, not in memory either: it is the user's to remove, and a line says where it lies.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, Literal

from bdkd_dist.data.node_folder import node_folder
from bdkd_dist.data.prepared import (
    Part,
    Prepared,
    complaint_about,
    is_prepared,
    unverified,
    write_manifest,
    write_verified,
)
from bdkd_dist.data.sources.storage import THREADS, File
from bdkd_dist.data.turns import turn_at
from bdkd_dist.errors import UserError, first_line

Near = Literal["local", "memory"]

COPY_THREADS = 4
"""Files copied at once from a disk; from other file systems it is as many as requests may be under way."""
PIECE_BYTES = 2**22

logger = logging.getLogger(__name__)


def stage(prepared: Prepared, near: Near, folder: Path | None = None) -> Prepared:
    """Return the copy of prepared files on this node, made or completed now where that is needed.

    Every file is compared with the manifest while it is copied and gets its name when it is whole and on the disk.
    Whole files of a copy that was cut off are kept; those that were damaged later are copied again. A file that was
    found whole is not read again while its size and time of change stay what they were.

    Args:
        prepared: The files as they lie, on this machine or elsewhere; they are not verified before.
        near: ``data.stage`` of the recipe: the node's ``local`` disk, or its ``memory``.
        folder: ``data.stage_folder`` of the recipe: where copies are kept, each in a folder of its own. By default the
            user's own in the temporary folder or in ``/dev/shm``.

    Raises:
        UserError: There is no room, the copy cannot be written, or a file cannot be read or is not what the manifest
            says.
    """
    root = folder or node_folder("/dev/shm" if near == "memory" else None)
    staged = replace(prepared, folder=root / prepared.content[:16], place=None)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder is None and root.stat().st_uid != os.getuid():
            raise UserError(f"data.stage={near}: {root} is another user's; set data.stage_folder")
        with turn_at(staged.folder, f"another process of this node that copies the images to {staged.folder}"):
            missing = _missing(staged)
            if missing or not is_prepared(staged.folder):
                _copy_all(prepared, staged, missing, near)
    except OSError as error:
        raise UserError(f"data.stage={near}: {error.filename or root}: {error.strerror or first_line(error)}") from None
    return staged


def _missing(staged: Prepared) -> list[Part]:
    """Return the files that are not there whole; those that changed since they were read are read again."""
    unknown = unverified(staged, staged.folder)
    if not unknown:
        return []
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        complaints = list(pool.map(lambda part: complaint_about(staged.folder / part.file, part), unknown))
    missing = [part for part, complaint in zip(unknown, complaints, strict=True) if complaint]
    if len(missing) < len(unknown):
        write_verified(staged, [part for part in staged.parts if part not in missing], staged.folder)
    return missing


def _copy_all(source: Prepared, staged: Prepared, missing: Sequence[Part], near: Near) -> None:
    staged.folder.mkdir(exist_ok=True)
    for leftover in staged.folder.glob("*.partial"):
        leftover.unlink()
    _check_space(staged.folder, missing, near)
    size_gb = sum(part.bytes for part in missing) / 1e9
    logger.warning("copying %.3g GB of images from %s to %s, where they stay", size_gb, source.where(), staged.folder)
    whole = [part for part in staged.parts if part not in missing]
    stop = Event()
    with ThreadPoolExecutor(THREADS if source.place else COPY_THREADS) as pool:
        copying = {pool.submit(_copy, source, staged.folder, part, stop): part for part in missing}
        try:
            for copied in as_completed(copying):
                copied.result()
                whole.append(copying[copied])
                write_verified(staged, whole, staged.folder)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_manifest(staged)


def _check_space(folder: Path, missing: Sequence[Part], near: Near) -> None:
    needed_bytes, free_bytes = sum(part.bytes for part in missing), shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"data.stage={near}: {folder} needs {needed_bytes / 1e9:.3g} GB more, {free_bytes / 1e9:.3g} GB are free "
            "(data.stage_folder chooses another place)"
        )


def _copy(source: Prepared, folder: Path, part: Part, stop: Event) -> None:
    """Copy a file and compare it with its manifest's entry on the way."""
    partial, where = folder / f"{part.file}.partial", source.where(part.file)
    sha256, copied_bytes = hashlib.sha256(), 0
    try:
        with partial.open("wb") as target:
            for piece in _pieces(source, part):
                sha256.update(piece)
                target.write(piece)
                copied_bytes += len(piece)
                if stop.is_set() or copied_bytes > part.bytes:
                    break
            target.flush()
            os.fsync(target.fileno())
        if copied_bytes != part.bytes:
            raise UserError(f"{where} is truncated or grown: {copied_bytes} bytes came instead of {part.bytes}")
        if sha256.hexdigest() != part.sha256:
            raise UserError(f"{where} was altered: its SHA-256 is not the manifest's")
        partial.replace(folder / part.file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _pieces(source: Prepared, part: Part) -> Iterator[memoryview]:
    """Yield a file's bytes; a piece is written over by the next."""
    buffer = memoryview(bytearray(source.place.buffer_bytes if source.place else PIECE_BYTES))
    try:
        with _opened(source, part) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
    except OSError as error:
        raise UserError(f"{source.where(part.file)} cannot be read: {error.strerror}") from None


def _opened(source: Prepared, part: Part) -> Any:
    if source.place:
        return source.place.open(File(part.file, part.bytes, 0))
    return (source.folder / part.file).open("rb", buffering=0)
