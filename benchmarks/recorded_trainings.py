"""Trainings that are `bdkd train` commands, side by side, each of which leaves a small record in the repository.

A training whose record is there is finished and never repeated, on whatever machine the command is typed again; one
that was cut goes on from its checkpoint in its run folder.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from bdkd_dist import config
from bdkd_dist.errors import UserError
from bdkd_dist.files import atomic_write, json_text

ROOT = Path(__file__).parent.parent
STOP_S = 30.0
"""For so long before the end a run may finish its step and keep a checkpoint."""
TEACHER = "models.teacher_checkpoint"
PREDICTIONS = "predictions/test.parquet"
GRID = 2.0**-13
"""Recorded confidences and NLLs are multiples of this: what is finer would not compress."""
OF_ENVIRONMENT = ("started", "python", "packages", "code", "hardware")
"""What a record keeps of each start; the rest names the machine."""


@dataclass(frozen=True)
class Training:
    """A `bdkd train` command."""

    name: str
    arguments: tuple[str, ...]
    """Recipe and overrides, but for where it runs and its teacher."""
    teacher: "Training | None" = None
    """Whose finished teacher it learns from."""

    @cached_property
    def recipe(self) -> config.Recipe:
        """What it computes, with the teacher's name for its place; raises UserError."""
        recipe, *overrides = self.arguments
        return config.load(recipe, [*overrides, *self._taught(Path())])

    def command(self, out: Path) -> list[str]:
        """Return the command line that trains it in a folder of runs."""
        place = [f"run.storage={out}", f"run.name={self.name}"]
        return [sys.executable, "-m", "bdkd_dist", "train", *self.arguments, *self._taught(out), *place]

    def check(self, folder: Path) -> None:
        """Raise UserError where a folder's run would not be what this training computes."""
        for key, there, here in config.differences(config.load(str(folder / "recipe.yaml")), self.recipe):
            if key != TEACHER:  # checked by itself
                raise UserError(
                    f"{folder}: {key} is {there} there and {here} now; delete that folder, and the same command trains "
                    f"{self.name} again"
                )

    def _taught(self, out: Path) -> list[str]:
        return [f"{TEACHER}={out / self.teacher.name}"] if self.teacher else []


class OutOfTimeError(Exception):
    """The time is over; the runs that were going on go on from their checkpoints."""


def command_line(parser: argparse.ArgumentParser, out: str, study: Callable[[argparse.Namespace], str]) -> None:
    """Add the options that all studies have, and print what a study says.

    Args:
        parser: With the study's own options.
        out: Its folder of runs, by default.
        study: Trains what has no record, unless ``report`` is set, and returns what the records say.

    Raises:
        SystemExit: A mistake (status 2), or the time is over.
    """
    parser.add_argument("--cifar100", type=Path, help="folder of CIFAR-100's Parquet shards")
    parser.add_argument("--minutes", type=float, help="end after so long, the last half of one for checkpoints")
    parser.add_argument("--side-by-side", type=int, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="train nothing, print what the records say")
    arguments = parser.parse_args()
    if arguments.cifar100 is None and not arguments.report:
        parser.error("--cifar100 FOLDER is needed, unless --report is given")
    arguments.end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    _end_with_children()
    try:
        print(study(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except OutOfTimeError:
        raise SystemExit("the time is over; the same command goes on") from None


def _end_with_children() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that what it started is asked to end, too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def finished(folder: Path) -> bool:
    """Whether a run folder's run has come to its end, or a record is there."""
    return (folder / "results.json").is_file()


def train_all(
    trainings: Sequence[Training],
    records: Path,
    out: Path,
    side_by_side: int,
    end: float | None = None,
    validation_only: bool = False,
) -> None:
    """Train what has no record yet, so many at a time; on a CPU with one thread each.

    A teacher whose run folder is gone is trained again, where one has yet to learn from it.

    Args:
        trainings: In this order.
        records: Folder of the records.
        out: Folder of the runs. It is a part of what a taught run is: give it by the same path where one goes on.
        side_by_side: How many at a time: small networks gain nothing from more threads.
        end: By when all has stopped, by :func:`time.monotonic`. Runs are asked to stop :data:`STOP_S` before; one that
            has not is killed then, and goes on from its last checkpoint.
        validation_only: What :func:`keep` keeps.

    Raises:
        OutOfTimeError: The end came first.
        UserError: What would be trained is no recipe, or a run or a record is of another one.
        SystemExit: A run failed; the others were stopped with checkpoints.
    """
    waiting = _to_train(trainings, records, out, validation_only)
    going: dict[str, tuple[Training, subprocess.Popen[str]]] = {}
    try:
        while waiting or going:
            if end is not None and time.monotonic() > end - STOP_S:
                raise OutOfTimeError
            for training in [t for t in waiting if t.teacher is None or finished(out / t.teacher.name)]:
                if len(going) < side_by_side:
                    waiting.remove(training)
                    going[training.name] = training, _start(out, training)
            time.sleep(0.2)
            for name, (training, process) in list(going.items()):
                if process.poll() is None:
                    continue
                del going[name]
                if not finished(out / name):
                    raise SystemExit(f"{name} failed:\n{(out / f'{name}.log').read_text()[-2000:]}")
                keep(training, out / name, records / name, validation_only)
                print(f"{name} done, {len(waiting) + len(going)} to go", file=sys.stderr, flush=True)
    finally:
        for _, process in going.values():
            process.send_signal(signal.SIGTERM)  # finishes the step and keeps a checkpoint
        for _, process in going.values():
            _wait_or_kill(process, end)


def _to_train(trainings: Iterable[Training], records: Path, out: Path, validation_only: bool) -> list[Training]:
    """Return what has to run, teachers first; what is finished but was not recorded any more is recorded."""
    found: dict[str, Training] = {}
    for training in trainings:
        if finished(records / training.name):
            training.check(records / training.name)
            continue
        for needed in (training.teacher, training):
            if needed is None:
                continue
            if finished(run := out / needed.name):
                needed.check(run)
                keep(needed, run, records / needed.name, validation_only)
            else:
                _ = needed.recipe  # raises for a mistake now, not hours later
                found[needed.name] = needed
    return list(found.values())


def _wait_or_kill(process: "subprocess.Popen[str]", end: float | None) -> None:
    try:
        process.wait(None if end is None else end - time.monotonic())
    except subprocess.TimeoutExpired:  # a step that is being compiled takes a minute
        process.kill()
        process.wait()


def _start(out: Path, training: Training) -> "subprocess.Popen[str]":
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{training.name}.log").open("w") as log:
        return subprocess.Popen(
            training.command(out),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def keep(training: Training, run: Path, record: Path, validation_only: bool = False) -> None:
    """Record a finished run, unless it is recorded: what `bdkd compare` needs of it, without paths of this machine.

    Of the predictions it has the most probable class, its confidence and the NLL, these to :data:`GRID`; results stay
    as they are.

    Args:
        training: What was run.
        run: Its folder.
        record: The record's.
        validation_only: Leave out the test images, for who chooses by these runs must not have seen them.
    """
    if finished(record):
        return
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["run"]["storage"] = "runs"
    recipe["data"] |= {"root": None, "prepared": config.Data.model_fields["prepared"].default, "stage_folder": None}
    if training.teacher:
        teacher = record.parent / training.teacher.name
        recipe["models"]["teacher_checkpoint"] = teacher.relative_to(ROOT).as_posix()
    starts = json.loads((run / "environment.json").read_text())
    kept = [{key: start[key] for key in OF_ENVIRONMENT} for start in starts]
    results = json.loads((run / "results.json").read_text())
    record.mkdir(parents=True, exist_ok=True)
    if validation_only:
        del results["test"]
    else:
        (record / PREDICTIONS).parent.mkdir(exist_ok=True)
        atomic_write(record / PREDICTIONS, _slim(run / PREDICTIONS))
    atomic_write(record / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())
    atomic_write(record / "environment.json", json_text(kept))
    atomic_write(record / "results.json", json_text(results))  # last: finished


def _slim(predictions: Path) -> bytes:
    """Return a run's predictions with what :meth:`bdkd_dist.records.comparison.Run.read` reads, in few bytes."""
    table = pq.read_table(predictions)
    networks = [name.removesuffix("_nll") for name in table.column_names if name.endswith("_nll")]
    columns: dict[str, Any] = {"index": table["index"], "label": table["label"]}
    encodings = {"index": "DELTA_BINARY_PACKED"}
    for network in networks:
        first = pc.list_element(table[f"{network}_top5"].combine_chunks(), 0)
        columns[f"{network}_top5"] = pa.ListArray.from_arrays(
            pa.array(np.arange(len(table) + 1, dtype=np.int32)), first
        )
        for column in (f"{network}_confidence", f"{network}_nll"):
            columns[column] = (np.round(table[column].to_numpy() / GRID) * GRID).astype(np.float32)
            encodings[column] = "BYTE_STREAM_SPLIT"  # exponents beside exponents: those repeat
    content = io.BytesIO()
    pq.write_table(
        pa.table(columns).replace_schema_metadata({b"class_names": table.schema.metadata[b"class_names"]}),
        content,
        compression="zstd",
        compression_level=19,
        use_dictionary=["label", *(f"{network}_top5.list.element" for network in networks)],
        column_encoding=encodings,
        write_statistics=False,
    )
    return content.getvalue()


@dataclass(frozen=True)
class Subset:
    """How many images of each class, in the official order, are for what.

    Attributes:
        classes: The first ones.
        train: The first of the official training images.
        validation: Those after them.
        test_of_train: Those after these, to test on.
        test_of_test: The first of the official test images, to test on too.
    """

    classes: int
    train: int
    validation: int
    test_of_train: int
    test_of_test: int

    def write(self, source: Path, target: Path) -> None:
        """Write Parquet shards of the splits, in the source's order and layout, unless they are there.

        Args:
            source: Folder of CIFAR-100's Parquet shards.
            target: Folder of the new ones.

        Raises:
            UserError: The source has no such images.
        """
        paths = {split: target / f"{split}-00000-of-00001.parquet" for split in ("train", "val", "test")}
        if all(path.is_file() for path in paths.values()):
            return
        target.mkdir(parents=True, exist_ok=True)
        train, test = _ranked(source, "train"), _ranked(source, "test")
        validation_end = self.train + self.validation
        splits = {
            "train": self._between(train, 0, self.train),
            "val": self._between(train, self.train, validation_end),
            "test": pa.concat_tables(
                [
                    self._between(train, validation_end, validation_end + self.test_of_train),
                    self._between(test, 0, self.test_of_test),
                ]
            ),
        }
        names = json.loads(train.schema.metadata[b"class_names"])[: self.classes]
        for split, table in splits.items():
            content = io.BytesIO()
            pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(names)}), content)
            atomic_write(paths[split], content.getbuffer())

    def _between(self, table: pa.Table, first: int, end: int) -> pa.Table:
        """Return the images whose place in their class is in [first, end)."""
        place = table["place"]
        wanted = pc.and_(pc.greater_equal(place, first), pc.less(place, end))
        kept = table.filter(pc.and_(wanted, pc.less(table["label"], self.classes)))
        if len(kept) < self.classes * (end - first):
            raise UserError(f"--cifar100: {len(kept)} of {self.classes * (end - first)} images are there")
        return kept.drop_columns("place")


def _ranked(source: Path, split: str) -> pa.Table:
    """Return a split of CIFAR-100 with each image's place in its class."""
    shards = sorted(source.glob(f"{split}-*.parquet"))
    if not shards:
        raise UserError(f"--cifar100 {source}: no {split}-*.parquet is there; give a folder of CIFAR-100's shards")
    table = pa.concat_tables([pq.read_table(shard) for shard in shards])
    label = table["label"].to_numpy()
    order = np.argsort(label, kind="stable")
    place = np.empty(len(label), np.int64)
    place[order] = np.arange(len(label)) - np.searchsorted(label[order], label[order])
    return table.append_column("place", pa.array(place))
