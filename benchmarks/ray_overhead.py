"""What Ray Train costs: step time under it and under plain torchrun, and the seconds that each takes to start.

    python benchmarks/ray_overhead.py                             # two workers, resnet20 -> resnet8, batch 128
    python benchmarks/ray_overhead.py --batch-size 64 --steps 40 --repeats 1            # a short look

The same recipe trains on the same random 32-pixel images with the same loader, one torch thread a rank, in three ways:

* ``torchrun``: two gloo ranks that ``torchrun`` starts; the engine finds them through torch.distributed.
* ``ray``: ``bdkd train ... launch.workers=2``, as a user types it.
* ``in process``: ``bdkd train ... launch.workers=1``: one rank computes the whole batch. For orientation.

Rank 0 itself times its steps, the same way in all three: they are read from ``speed/images_per_s`` of the run's
TensorBoard events, where a point is the mean over the steps since the last. The first steps of a run are left out, and
an epoch is as long as the run, so that no evaluation and no checkpoint falls between two points. The ways take turns,
every other round backwards, so that a drift of the machine meets all alike; a run counts by the median of its points.
Seconds to the first step and to the end count from the start of the command. The last line is the median over rounds of
Ray's step time by torchrun's of the same round. Run it on a machine that does nothing else.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from machine import header
from PIL import Image

from bdkd_dist import config
from bdkd_dist.engine.control import Control
from bdkd_dist.engine.observer import Observers
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.worker import work

BIN = Path(sys.executable).parent
WORKERS = 2
WAYS = ("torchrun", "ray", "in process")
LOG_EVERY_STEPS = 10
NUM_CLASSES = 10
SPEED = "speed/images_per_s"


@dataclass(frozen=True)
class Timing:
    """One run, as its rank 0 recorded it."""

    step_s: float
    """Median over the points after the warm-up."""
    first_step_s: float
    """From the start of the command to that of the first step."""
    end_s: float
    """From the start of the command to its end."""


def main() -> None:
    arguments = parse()
    if arguments.rank:
        rank_main(arguments.rank)
        return
    timings: dict[str, list[Timing]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = prepare(folder, images=arguments.batch_size * arguments.steps)
        settings = overrides(arguments, data, arguments.batch_size)
        for number in range(arguments.repeats):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                name = f"{way.replace(' ', '-')}-{number}"
                words = command(way, [*settings, f"run.storage={folder}", f"run.name={name}"])
                timings[way].append(run(words, folder / name, arguments.batch_size, arguments.warmup_steps))
    report(timings, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=128, help="over all workers")
    parser.add_argument("--repeats", type=int, default=4, help="rounds; an even number is fair to all")
    parser.add_argument("--rank", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # what torchrun starts
    return parser.parse_args()


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--steps", type=int, default=80, help="of a run")
    parser.add_argument("--warmup-steps", type=int, default=20, help="of these, not counted")


def prepare(folder: Path, images: int) -> Path:
    """Write random images as Parquet shards and have them prepared; return the prepared folder."""
    source, prepared = folder / "source", folder / "prepared"
    source.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", images), ("validation", 64), ("test", 64)):
        rows = [{"bytes": png(generator), "path": None} for _ in range(count)]
        labels = [number % NUM_CLASSES for number in range(count)]
        image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        pq.write_table(pa.table({"image": image, "label": labels}), source / f"{split}-00000.parquet")
    execute([str(BIN / "bdkd"), "prepare", str(source), str(prepared)])
    return prepared


def png(generator: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def overrides(arguments: argparse.Namespace, data: Path, batch_size: int) -> list[str]:
    """Return what makes the ``digits`` recipe one epoch of random images."""
    settings = {
        "data.dataset": "files",
        "data.root": data,
        "data.num_classes": NUM_CLASSES,
        "data.threads": 1,
        "models.teacher": arguments.teacher,
        "models.student": arguments.student,
        "data.train_limit": batch_size * arguments.steps,
        "train.batch_size": batch_size,
        "train.epochs": 1,
        "train.log_every_steps": LOG_EVERY_STEPS,
        "schedule.warmup_epochs": 0,
        "launch.device": "cpu",
    }
    return [f"{key}={value}" for key, value in settings.items()]


def command(way: str, settings: list[str]) -> list[str]:
    bdkd = [str(BIN / "bdkd"), "train", "digits", *settings]
    return {
        "torchrun": torchrun(WORKERS, [__file__, "--rank", *settings, f"launch.workers={WORKERS}"]),
        "ray": [*bdkd, f"launch.workers={WORKERS}"],
        "in process": [*bdkd, "launch.workers=1"],
    }[way]


def torchrun(ranks: int, words: list[str]) -> list[str]:
    return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), *words]


def rank_main(settings: list[str]) -> None:
    """One of torchrun's ranks: no Ray anywhere."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    recipe = config.load("digits", settings)
    work(recipe, RunFolder.of(recipe), torch.device("cpu"), Observers(), Control(), print)
    dist.barrier()
    dist.destroy_process_group()


def run(words: list[str], folder: Path, batch_size: int, warmup_steps: int) -> Timing:
    """Run a training to its end; return what its events say."""
    began = time.time()
    execute(words)
    return read(folder, began, time.time(), batch_size, warmup_steps)


def execute(words: list[str]) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(words, capture_output=True, text=True, env=environment_of_a_run())
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(words)}\nended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


def environment_of_a_run() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}


def read(folder: Path, began: float, ended: float, batch_size: int, warmup_steps: int) -> Timing:
    """Return a run's times from its points; ``began`` and ``ended`` are of the command, on the same clock."""
    points = speeds(folder)
    seconds = {step: batch_size / images_per_s for step, (images_per_s, _) in points.items()}
    first = min(points)  # its mean counts from the moment when the loop began
    return Timing(
        step_s=statistics.median(s for step, s in seconds.items() if step > warmup_steps),
        first_step_s=points[first][1] - first * seconds[first] - began,
        end_s=ended - began,
    )


def speeds(folder: Path) -> dict[int, tuple[float, float]]:
    """Return by step the images per second since the point before, and when that was written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    return {
        event.step: (float(make_ndarray(value.tensor)), event.wall_time)
        for file in folder.glob("tensorboard/*tfevents*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == SPEED
    }


def report(timings: dict[str, list[Timing]], arguments: argparse.Namespace) -> None:
    print(header())
    print(
        f"{arguments.teacher} -> {arguments.student}, batch {arguments.batch_size}, one torch thread a rank; "
        f"{arguments.repeats} rounds of {arguments.steps} steps, the first {arguments.warmup_steps} not counted"
    )
    print(f"{'':12}{'ranks':>6}{'step ms':>10}{'fastest':>9}{'slowest':>9}{'to 1st step s':>15}{'to end s':>10}")
    for way, runs in timings.items():
        steps = [1e3 * timing.step_s for timing in runs]
        print(
            f"{way:12}{1 if way == 'in process' else WORKERS:6}{statistics.median(steps):10.1f}{min(steps):9.1f}"
            f"{max(steps):9.1f}{statistics.median(timing.first_step_s for timing in runs):15.1f}"
            f"{statistics.median(timing.end_s for timing in runs):10.1f}"
        )
    ratios = [ray.step_s / plain.step_s for ray, plain in zip(timings["ray"], timings["torchrun"], strict=True)]
    print(f"rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(f"step time ray/torchrun = {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
