"""``bdkd prepare`` without the command line: on this machine, or on a Ray cluster."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from bdkd_dist import config
from bdkd_dist.config import Data
from bdkd_dist.data.converting import Rules, Undecodable
from bdkd_dist.data.prepare import REPORT, Progress, in_this_process, prepare_into
from bdkd_dist.data.prepared import Prepared, is_prepared, verify
from bdkd_dist.data.sources import Source, find_source, labelled
from bdkd_dist.data.storing import Check
from bdkd_dist.errors import UserError, unknown

NAMED = ("digits", "cifar10", "cifar100")
KEYS = ("data.image_px", "data.threads", "data.download")
"""What may be set for a preparation, besides the command's own options."""
PLAIN_EVERY_S = 10.0
"""Without a terminal, lines come at most this often."""


@dataclass(frozen=True)
class Outcome:
    """What a command prepared, or found prepared."""

    prepared: Prepared
    source: Source
    was_there: bool
    seconds: float

    def lines(self) -> Iterator[str]:
        """Yield what a person is told at the end."""
        folder, counts = self.prepared.folder, []
        for name, split in self.source.splits.items():
            stored = sum(part.samples for part in self.prepared.splits[name])
            counts.append(
                f"{name} {len(split):,} = {stored:,} stored + {self.prepared.left_out.get(name, 0):,} left out"
            )
        size = decimal(sum(part.bytes for part in self.prepared.parts))
        done = "is already prepared and whole" if self.was_there else f"prepared in {self.seconds:.1f} s"
        yield f"{folder} {done}: {'; '.join(counts)}; {size} in {len(self.prepared.parts)} file(s)"
        if self.prepared.left_out:
            yield f"images that could not be decoded: {folder / REPORT}"
        if self.prepared.check != "full":
            yield "of JPEGs kept as they are only the headers were checked"
        yield f"train from it: data.root={folder} data.num_classes={len(self.prepared.class_names)}"


def prepare(
    source: str,
    out: Path,
    rules: Rules,
    console: Console,
    address: str | None = None,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Prepare a data set into a folder; the same command goes on where it was cut off.

    Args:
        source: A path or URI as ``data.root`` takes, or one of :data:`NAMED`.
        out: The folder; new, empty, or prepared before.
        rules: How images are stored.
        console: Where progress goes.
        address: Convert on this Ray cluster; ``local`` starts one on this machine.
        overrides: ``key=value`` of :data:`KEYS`.

    Raises:
        UserError: Something that the user can mend.
    """
    data, out = _settings(source, rules, overrides), out.expanduser().resolve()
    found, was_there, start = labelled(_found(data)), is_prepared(out), time.monotonic()
    if address is None:
        convert = in_this_process(data)
    else:
        from bdkd_dist.launch.ray_prepare import on_ray

        convert = on_ray(address)
    try:
        with preparing(console, found) as show:
            prepared = prepare_into(found, out, rules, convert, show)
    except KeyboardInterrupt:
        console.print(f"{out}: what is whole is kept, the same command goes on", highlight=False, soft_wrap=True)
        raise
    if was_there:
        verify(prepared)
    return Outcome(prepared, found, was_there, time.monotonic() - start)


def rules_of(max_side_px: int, jpeg_quality: int, check: str, undecodable: str) -> Rules:
    """Return rules from what a user typed.

    Raises:
        UserError: A word that is not allowed.
    """
    for option, word, allowed in (("--check", check, Check), ("--undecodable", undecodable, Undecodable)):
        if word not in get_args(allowed):
            raise unknown(option, word, get_args(allowed))
    return Rules(max_side_px, jpeg_quality, check, undecodable)  # type: ignore[arg-type]  # just checked


@contextmanager
def preparing(console: Console, source: Source | None = None) -> Iterator[Progress]:
    """Yield what shows how far a preparation is: a bar on a terminal, plain lines elsewhere.

    Args:
        console: Where to.
        source: Its images' mean size turns images/s into MB/s.
    """
    mean_mb = (
        {name: split.encoded_bytes / 1e6 / max(1, len(split)) for name, split in source.splits.items()}
        if source
        else {}
    )
    if console.is_terminal and not console.is_dumb_terminal:
        with _bar(console, mean_mb) as show:
            yield show
    else:
        yield _plain(console, mean_mb)


class _Speed(TextColumn):
    """Images/s and MB/s of the last seconds."""

    def __init__(self, mean_mb: dict[str, float]):
        super().__init__("")
        self.mean_mb = mean_mb

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_speed(speed, self.mean_mb.get(task.fields["split"])) if speed else "")


@contextmanager
def _bar(console: Console, mean_mb: dict[str, float]) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,}"),
        _Speed(mean_mb),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, speed_estimate_period=10) as bar:
        tasks = {}

        def show(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = bar.add_task(f"preparing {split}", total=total, completed=done, split=split)
            bar.update(tasks[split], completed=done)

        yield show


def _plain(console: Console, mean_mb: dict[str, float]) -> Progress:
    begun: dict[str, tuple[float, int]] = {}
    due_s = 0.0

    def show(split: str, done: int, total: int) -> None:
        nonlocal due_s
        now_s = time.monotonic()
        if split not in begun:
            begun[split] = (now_s, done)
            console.print(f"preparing {split}: {total:,} images", highlight=False)
            due_s = max(due_s, now_s + PLAIN_EVERY_S)
        elif now_s >= due_s:
            due_s = now_s + PLAIN_EVERY_S
            start_s, before = begun[split]
            speed = (done - before) / max(1e-9, now_s - start_s)
            left = f", {(total - done) / speed:.0f} s left" if speed else ""
            console.print(
                f"preparing {split}: {done:,} of {total:,}, {_speed(speed, mean_mb.get(split))}{left}", highlight=False
            )

    return show


def _speed(images_per_s: float, mean_mb: float | None) -> str:
    return f"{images_per_s:,.0f} images/s" + (f", {images_per_s * mean_mb:,.0f} MB/s" if mean_mb is not None else "")


def _settings(source: str, rules: Rules, overrides: Sequence[str]) -> Data:
    for override in overrides:
        if (key := override.partition("=")[0]) not in KEYS:
            raise unknown("key of prepare", key, KEYS)
    if not source:
        raise UserError(f"SOURCE is empty: give a folder, a URI, or one of {', '.join(NAMED)}")
    named = f"data.dataset={source if source in NAMED else 'files'}"
    stored = [f"data.max_side_px={rules.max_side_px}", f"data.jpeg_quality={rules.jpeg_quality}"]
    data = config.load("digits", [named, *stored, *overrides]).data
    return data if source in NAMED else data.model_copy(update={"root": source})  # whatever it is called


def _found(data: Data) -> Source:
    try:
        return find_source(data)
    except UserError as error:
        raise UserError(str(error).removeprefix("data.root=")) from None
