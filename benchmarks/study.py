"""What studies share: trainings that are `bdkd train` commands, side by side, and the tables of what came out.

A run that is finished is not repeated and one that was cut goes on, so a study's command may be typed again anywhere.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

STOP_S = 30.0
"""For so long before the end a run may finish its step and keep a checkpoint."""
COLUMNS = ("student top-1 %", "student ECE %", "ECE % T-scaled", "student NLL", "teacher top-1 %")


@dataclass(frozen=True)
class Run:
    """A training in the folder ``out/name``."""

    name: str
    arguments: tuple[str, ...]
    """Of `bdkd train`."""
    after: str | None = None
    """The run that must be finished before."""


class OutOfTimeError(Exception):
    """The time is over; the runs that were going on go on from their checkpoints."""


def end_with_children() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that what it started is asked to end, too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def bdkd(*arguments: str) -> list[str]:
    """Return a command line."""
    return [sys.executable, "-m", "bdkd_dist", *arguments]


def over(end: float | None) -> bool:
    """Whether what is left until the end, by :func:`time.monotonic`, is for stopping."""
    return end is not None and time.monotonic() > end - STOP_S


def train_all(
    out: Path,
    runs: Iterable[Run],
    side_by_side: int,
    end: float | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Train what is not finished yet, so many at a time; on a CPU with one thread each.

    Args:
        out: Folder of the runs.
        runs: To train, in this order.
        side_by_side: How many at a time: small networks gain nothing from more threads.
        end: By when all has stopped, by :func:`time.monotonic`. Runs are asked to stop :data:`STOP_S` before; one that
            has not is killed then, and goes on from its last checkpoint.
        after_each: Called after each run that is finished.

    Raises:
        OutOfTimeError: The end came first.
        SystemExit: A run failed; the others were stopped with checkpoints.
    """
    waiting = [run for run in runs if not finished(out, run.name)]
    going: dict[str, subprocess.Popen[str]] = {}
    try:
        while waiting or going:
            if over(end):
                raise OutOfTimeError
            for run in [run for run in waiting if run.after is None or finished(out, run.after)]:
                if len(going) < side_by_side:
                    waiting.remove(run)
                    going[run.name] = _start(out, run)
            time.sleep(0.2)
            for name, process in list(going.items()):
                if process.poll() is None:
                    continue
                del going[name]
                if not finished(out, name):
                    raise SystemExit(f"{name} failed:\n{(out / f'{name}.log').read_text()[-2000:]}")
                print(f"{name} done, {len(waiting) + len(going)} to go", file=sys.stderr, flush=True)
                after_each()
    finally:
        for process in going.values():
            process.send_signal(signal.SIGTERM)  # finishes the step and keeps a checkpoint
        for process in going.values():
            _wait_or_kill(process, end)


def _wait_or_kill(process: "subprocess.Popen[str]", end: float | None) -> None:
    try:
        process.wait(None if end is None else end - time.monotonic())
    except subprocess.TimeoutExpired:  # a step that is being compiled takes a minute
        process.kill()
        process.wait()


def _start(out: Path, run: Run) -> "subprocess.Popen[str]":
    out.mkdir(parents=True, exist_ok=True)
    command = bdkd("train", *run.arguments, f"run.storage={out}", f"run.name={run.name}")
    with (out / f"{run.name}.log").open("w") as log:
        return subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT, text=True
        )


def finished(out: Path, name: str) -> bool:
    """Whether a run has come to its end."""
    return (out / name / "results.json").is_file()


def row(out: Path, title: str, names: Sequence[str], network: str = "student") -> str:
    """Return a line of a table: the test split of runs that differ in seed, mean ± standard deviation."""
    tests = [json.loads((out / name / "results.json").read_text())["test"] for name in names]
    student = [test[network] for test in tests]
    raw, scaled = [s["raw"] for s in student], [s["temperature_scaled"] for s in student]
    cells = [
        spread([100 * s["top1"] for s in raw], 2),
        spread([100 * s["ece"] for s in raw], 2),
        spread([100 * s["ece"] for s in scaled], 2),
        spread([s["nll"] for s in raw], 3),
        spread([100 * test["teacher"]["raw"]["top1"] for test in tests], 2),
    ]
    return f"| {title} | {' | '.join(cells)} |"


def table(rows: Sequence[str]) -> str:
    """Return the rows under the columns' names."""
    return "\n".join([f"| objective | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}", *rows])


def spread(values: Sequence[float], decimals: int) -> str:
    """Return mean ± standard deviation (n − 1); of one value, itself."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def write_subset(source: Path, target: Path, classes: int) -> None:
    """Keep CIFAR-100's images of the first classes, in the source's order and layout."""
    for split in ("train", "test"):
        path = target / f"{split}-00000-of-00001.parquet"
        if path.is_file():
            continue
        target.mkdir(parents=True, exist_ok=True)
        whole = pa.concat_tables([pq.read_table(shard) for shard in sorted(source.glob(f"{split}-*.parquet"))])
        names: list[Any] = json.loads(whole.schema.metadata[b"class_names"])[:classes]
        kept = whole.filter(pc.less(whole["label"], classes))
        pq.write_table(kept.replace_schema_metadata({"class_names": json.dumps(names)}), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
