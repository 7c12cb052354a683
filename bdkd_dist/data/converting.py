"""One piece of a source becomes one beton file, with a record beside it that says what it must be.

A file without its record was not finished. Both get their names when they are whole and on the disk, so a process may
be killed at any moment, or two may convert the same piece at once: the bytes that they write are the same.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Literal
from uuid import uuid4

from bdkd_dist.data.beton import BetonWriter
from bdkd_dist.data.prepared import Part
from bdkd_dist.data.sources import Piece, Sample
from bdkd_dist.data.storing import UNDECODABLE, Check, Stored, num_bytes, store
from bdkd_dist.errors import UserError, first_line
from bdkd_dist.files import atomic_write, json_text

Undecodable = Literal["stop", "leave-out"]
Tell = Callable[[str, int], None]
"""Called with (split, images that are done now); from several threads."""

BATCH_BYTES = 2**22
BATCH_IMAGES = 64
"""What a thread is given at once is not more than these, but at least one image."""


class BrokenImage(UserError):
    """An image that cannot be decoded."""


class Stopped(Exception):
    """Another piece failed, or Ctrl-C was pressed."""


@dataclass(frozen=True)
class Rules:
    """How images are stored."""

    max_side_px: int = 512
    jpeg_quality: int = 90
    check: Check = "full"
    undecodable: Undecodable = "stop"

    def store(self, sample: Sample) -> Stored:
        """See :func:`~bdkd_dist.data.storing.store`."""
        return store(sample.image, self.max_side_px, self.jpeg_quality, self.check)


@dataclass(frozen=True)
class LeftOut:
    """An image that could not be decoded."""

    split: str
    piece: str
    position: int
    """In the split, as its source has it."""
    origin: str
    label: int
    reason: str


Outcome = tuple[Stored, int] | LeftOut
"""A stored image and its label, or the image that is left out."""


@dataclass(frozen=True)
class Converted:
    """What became of a piece."""

    part: Part | None
    """None where no image of it could be decoded."""
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return (self.part.samples if self.part else 0) + len(self.left_out)


@dataclass(frozen=True)
class Task:
    """All that another process or node needs to convert a piece."""

    split: str
    first: int
    """The position of the piece's first image in the split."""
    piece: Piece
    path: Path
    fingerprint: str
    rules: Rules

    @property
    def record(self) -> Path:
        """The file that says what became of the piece."""
        return self.path.with_name(f"{self.path.name}.json")


def finished(task: Task) -> Converted | None:
    """Return what became of a piece before, if it is whole and of the same source and rules."""
    try:
        record = json.loads(task.record.read_text())
        part = Part(**record["part"]) if record["part"] else None
        converted = Converted(part, tuple(LeftOut(**one) for one in record["left_out"]))
        whole = part is None or task.path.stat().st_size == part.bytes
        checked = record["check"] in (task.rules.check, "full")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    may_miss = not converted.left_out or task.rules.undecodable == "leave-out"
    same = record["fingerprint"] == task.fingerprint and len(converted) == len(task.piece)
    return converted if whole and checked and may_miss and same else None


def convert_all(tasks: Sequence[Task], threads: int, tell: Tell) -> list[Converted]:
    """Convert pieces in this process, several at once.

    Raises:
        BrokenImage: An image cannot be decoded, and the rules say stop.
        UserError: The source cannot be read.
        OSError: The files cannot be written.
    """
    at_once = max(1, min(len(tasks), threads + 2))  # some wait for the source, or for the disk to take a file
    ahead = 2 + 2 * threads // at_once
    stop = Event()
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(at_once) as writers:
        futures = [writers.submit(convert, task, decoders, ahead, tell, stop) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            writers.shutdown(wait=False, cancel_futures=True)
    errors = [error for future in futures if future in done and (error := future.exception())]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def convert(task: Task, decoders: Executor, ahead: int, tell: Tell, stop: Event) -> Converted:
    """Write a piece's file and its record.

    Args:
        task: The piece.
        decoders: Where images are looked through.
        ahead: So many batches of images are read before they are written.
        tell: Told of each batch.
        stop: Asked before each batch.

    Raises:
        Stopped: ``stop`` is set.
        BrokenImage: An image cannot be decoded, and the rules say stop.
        UserError: The source cannot be read, or has other images than it said.
        OSError: The file cannot be written.
    """
    if stop.is_set():
        raise Stopped
    scratch = task.path.with_name(f".{task.path.name}-{uuid4().hex}")
    left_out: list[LeftOut] = []
    try:
        with suppress(_Nothing), BetonWriter(scratch, len(task.piece)) as writer:
            for batch in _stored(task, decoders, ahead):
                if stop.is_set():
                    raise Stopped
                _append(batch, writer, left_out)
                tell(task.split, len(batch))
            if len(left_out) == len(task.piece):
                raise _Nothing
        part = None
        if scratch.exists():
            part = Part(task.path.name, len(task.piece) - len(left_out), scratch.stat().st_size, writer.sha256)
            scratch.replace(task.path)
        converted = Converted(part, tuple(left_out))
        record = {"fingerprint": task.fingerprint, "check": task.rules.check} | asdict(converted)
        atomic_write(task.record, json_text(record, indent=1))
    finally:
        for leftover in scratch.parent.glob(f"{scratch.name}*"):
            leftover.unlink(missing_ok=True)
    return converted


class _Nothing(Exception):
    """No image was stored: the writer's file is not wanted."""


def _append(batch: list[Outcome], writer: BetonWriter, left_out: list[LeftOut]) -> None:
    for one in batch:
        if isinstance(one, LeftOut):
            left_out.append(one)
            continue
        stored, label = one
        if isinstance(stored.content, bytes):
            writer.append_jpeg(stored.content, stored.height, stored.width, label)
        else:
            writer.append_raw(stored.content, label)


def _stored(task: Task, decoders: Executor, ahead: int) -> Iterator[list[Outcome]]:
    """Yield batches of stored images, in order; threads work some batches ahead."""
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        for first, samples in _batches(task):
            waiting.append(decoders.submit(store_batch, task, first, samples))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def store_batch(task: Task, first: int, samples: Sequence[Sample]) -> list[Outcome]:
    """Return what becomes of some images of a piece, of which the first is at this position of the split.

    Raises:
        BrokenImage: An image cannot be decoded, and the rules say stop.
    """
    batch: list[Outcome] = []
    for position, sample in enumerate(samples, start=first):
        try:
            batch.append((task.rules.store(sample), sample.label))
        except UNDECODABLE as error:
            left_out = LeftOut(
                task.split, task.piece.name, position, sample.origin, int(sample.label), first_line(error)
            )
            if task.rules.undecodable == "stop":
                raise BrokenImage(broken(left_out)) from None
            batch.append(left_out)
    return batch


def broken(image: LeftOut) -> str:
    """Return the line that names an image which cannot be decoded."""
    where = image.origin if image.origin.startswith(image.piece) else f"{image.origin}, piece {image.piece}"
    return f"{image.split} image {image.position} ({where}) cannot be decoded: {image.reason}"


def _batches(task: Task) -> Iterator[tuple[int, list[Sample]]]:
    """Yield the position of a batch's first image in the split, and its images."""
    samples, first, end = task.piece.iterate(), task.first, task.first + len(task.piece)
    while first <= end and (batch := _batch(samples)):
        if first + len(batch) <= end:
            yield first, batch
        first += len(batch)
    if first != end:
        raise UserError(
            f"{task.split}, piece {task.piece.name}: {first - task.first} images came instead of {len(task.piece)}: "
            "the source has changed"
        )


def _batch(samples: Iterator[Sample]) -> list[Sample]:
    batch, total_bytes = [], 0
    for sample in islice(samples, BATCH_IMAGES):
        batch.append(sample)
        total_bytes += num_bytes(sample.image)
        if total_bytes >= BATCH_BYTES:
            break
    return batch
