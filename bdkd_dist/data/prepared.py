"""What a prepared data set is on the disk: beton files and the manifest that says what they must be.

A folder holds ``manifest.json`` and, for each split, files ``<split>-00000.beton``, ``<split>-00001.beton`` and so on,
which are read as one. The manifest is written last, so a folder with one is complete.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdkd_dist.cores import usable_cores
from bdkd_dist.data.node_folder import node_folder
from bdkd_dist.data.turns import turn_at
from bdkd_dist.errors import UserError
from bdkd_dist.files import atomic_write, json_text

if TYPE_CHECKING:
    from bdkd_dist.data.sources.storage import Place

MANIFEST = "manifest.json"
VERIFIED = ".verified.json"
FORMAT = 2
"""Counts up when prepared files would differ for the same source and settings."""


@dataclass(frozen=True)
class Part:
    """What the manifest says of one beton file."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """A prepared data set, on the disk or elsewhere."""

    folder: Path
    fingerprint: str
    """Of the source and what shapes the files; see :class:`~bdkd_dist.data.sources.Source`."""
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Part, ...]]
    left_out: dict[str, int] = field(default_factory=dict)
    """How many images of each split could not be decoded; splits without any may be absent."""
    check: str = "full"
    """How thoroughly JPEGs were looked through; see :data:`~bdkd_dist.data.storing.Check`."""
    place: "Place | None" = None
    """Where the files lie that are no files of this machine yet; ``folder`` is then but a name."""

    def where(self, file: str = "") -> str:
        """Return the full name of the folder or of a file in it, for messages."""
        return self.place.where(file) if self.place else str(self.folder / file)

    def paths(self, split: str) -> tuple[Path, ...]:
        """Return the beton files of a split, in order."""
        return tuple(self.folder / part.file for part in self.splits[split])

    @property
    def parts(self) -> list[Part]:
        """All files."""
        return [part for parts in self.splits.values() for part in parts]

    @property
    def content(self) -> str:
        """SHA-256 over the files' checksums: equal wherever the same images and labels were prepared."""
        return _sha256_of({name: self._sums(name) for name in sorted(self.splits)})

    def content_of(self, split: str) -> str:
        """SHA-256 over the checksums of a split's files."""
        return _sha256_of(self._sums(split))

    def _sums(self, split: str) -> list[str]:
        return [part.sha256 for part in self.splits[split]]


def _sha256_of(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a prepared data set, or what is left of one; others may have a manifest of their own."""
    return (folder / MANIFEST).is_file() and (_holds_ours(folder / MANIFEST) or any(folder.glob("*.beton")))


def _holds_ours(path: Path) -> bool:
    try:
        return is_ours(path.read_bytes())
    except OSError:
        return False


def is_ours(content: bytes) -> bool:
    """Whether a file called :data:`MANIFEST` is a prepared data set's."""
    try:
        manifest = json.loads(content)
    except ValueError:
        return False
    return isinstance(manifest, dict) and {"format", "fingerprint", "splits"} <= manifest.keys()


def write_manifest(prepared: Prepared) -> None:
    """Write the manifest of a folder whose files are all complete, and bring it to the disk."""
    manifest = {
        "format": FORMAT,
        "fingerprint": prepared.fingerprint,
        "class_names": prepared.class_names,
        "splits": {name: [asdict(part) for part in parts] for name, parts in prepared.splits.items()},
        "left_out": prepared.left_out,
        "check": prepared.check,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    atomic_write(prepared.folder / MANIFEST, json_text(manifest, indent=1))


def read_manifest(folder: Path) -> Prepared:
    """Return what a folder holds.

    Raises:
        UserError: The manifest is missing, damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise missing(str(folder))
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    return parsed(content, folder, str(folder))


def missing(where: str) -> UserError:
    """Return the line for a folder without a manifest."""
    return UserError(f"{where}/{MANIFEST} is missing: {where} is no prepared data set, or was not prepared to its end")


def parsed(content: bytes, folder: Path, where: str) -> Prepared:
    """Return what a manifest says of a folder.

    Args:
        content: The manifest.
        folder: Its folder.
        where: The folder's name, for messages.

    Raises:
        UserError: The manifest is damaged or of another format.
    """
    again = f"delete the folder {where} to prepare it again"
    try:
        manifest = json.loads(content)
        if (found := manifest["format"]) == FORMAT:
            splits = {name: tuple(map(_part, parts)) for name, parts in manifest["splits"].items()}
            names = tuple(manifest["class_names"])
            left_out, check = dict(manifest.get("left_out", {})), manifest.get("check", "full")
            return Prepared(folder, manifest["fingerprint"], names, splits, left_out, check)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}/{MANIFEST} cannot be read; {again}") from None
    raise UserError(f"{where}/{MANIFEST} has format {found}, this version reads {FORMAT}; {again}")


def _part(entry: dict[str, Any]) -> Part:
    """Return an entry of a manifest, which may come from a store: it names a file of its own folder and no other."""
    part = Part(str(entry["file"]), int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]))
    if (
        not part.file
        or Path(part.file).name != part.file
        or part.file.startswith(".")
        or entry.keys() != Part.__annotations__.keys()
    ):
        raise ValueError(part.file)
    return part


def verify(prepared: Prepared) -> None:
    """Compare all files with the manifest's sizes and checksums.

    A file that was found whole is not read again while its size and time of change stay what they were. That is noted
    in the folder, so that all workers of all runs together read a large data set once; where nothing can be written
    there, on the node, for its workers.

    Raises:
        UserError: Names the file, what is wrong with it and the way to mend it.
    """
    if not unverified(prepared, prepared.folder):
        return
    notes = _notes_folder(prepared.folder)
    if not unverified(prepared, notes):
        return
    with ExitStack() as stack:
        with suppress(OSError):  # where nothing can be written at all, every worker reads the files
            turn = turn_at(notes / VERIFIED, f"another process that compares {prepared.folder} with its manifest")
            stack.enter_context(turn)
        new = unverified(prepared, notes)
        with ThreadPoolExecutor(usable_cores()) as pool:
            for complaint in pool.map(lambda part: complaint_about(prepared.folder / part.file, part), new):
                if complaint:
                    raise UserError(f"{complaint}; delete the folder {prepared.folder} to prepare it again")
        if new:
            with suppress(OSError):
                write_verified(prepared, prepared.parts, notes)


def _notes_folder(folder: Path) -> Path:
    """Return where it is noted which of a folder's files were found whole."""
    if os.access(folder, os.W_OK):
        return folder
    own = node_folder() / "verified" / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with suppress(OSError):
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
    return own


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complaint_about(path: Path, expected: Part) -> str | None:
    """Return what is wrong with a file, which is read whole for that."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected.bytes:
        return f"{path} is truncated or grown: {size} bytes instead of {expected.bytes}"
    try:
        sha256 = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return None if sha256 == expected.sha256 else f"{path} was altered: its SHA-256 is not the manifest's"


def unverified(prepared: Prepared, notes: Path) -> list[Part]:
    """Return the files that are not there, or were not found whole since they changed.

    Args:
        prepared: Files of this machine.
        notes: The folder in which :func:`write_verified` notes them down.
    """
    known = _read_verified(notes)
    stamps = {part.file: _stamp_of(prepared, part) for part in prepared.parts}
    return [part for part in prepared.parts if stamps[part.file] is None or known.get(part.file) != stamps[part.file]]


def write_verified(prepared: Prepared, whole: Sequence[Part], notes: Path) -> None:
    """Note down which files were found whole, so that nobody reads them again for that; see :func:`unverified`."""
    stamps = {part.file: _stamp_of(prepared, part) for part in whole}
    atomic_write(notes / VERIFIED, json_text(stamps, indent=1))


def _stamp_of(prepared: Prepared, part: Part) -> list[Any] | None:
    """Return what tells that a file did not change since it was read."""
    try:
        stat = (prepared.folder / part.file).stat()
    except OSError:
        return None
    return [part.sha256, stat.st_size, stat.st_mtime_ns]


def _read_verified(notes: Path) -> dict[str, list[Any]]:
    try:
        stamps = json.loads((notes / VERIFIED).read_text())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}
