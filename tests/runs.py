"""Runs of the real command line on the handwritten digits, small enough for tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

BDKD = Path(sys.executable).with_name("bdkd")
SMALL = [
    "models.teacher=resnet14",
    "models.student=resnet8",
    "data.train_limit=311",  # 5 steps an epoch, of 63 or 62 images
    "train.batch_size=64",
    "train.epochs=2",
    "schedule.warmup_epochs=0.5",
    "train.log_every_steps=2",
    "train.checkpoint_every_steps=3",
]
# On clusters: the torch loader compiles nothing, and small images take little.
LIGHT = ("data.loader=torch", "data.threads=1", "data.image_px=16")
TWO = ("launch.workers=2", *LIGHT)


def command(cache: Path, storage: Path, *overrides: str, name: str = "run", recipe: str = "digits") -> list[str]:
    """Return a training command whose run folder is ``storage/name``."""
    places = [f"data.prepared={cache}", f"run.storage={storage}", f"run.name={name}"]
    return [str(BDKD), "train", recipe, *(SMALL if recipe == "digits" else []), *places, *overrides]


def execute(arguments: list[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run to the end and check the exit status."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def break_off(arguments: list[str], when: Callable[[], bool], by: signal.Signals) -> tuple[int, str]:
    """Start, wait for a moment inside the run, send the signal to the process (SIGKILL: to all it started)."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(),
    )
    deadline = time.monotonic() + 300
    try:
        while not when():
            assert process.poll() is None, f"ended by itself with {process.returncode}\n{process.communicate()[0]}"
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.005)
        os.killpg(process.pid, by)
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def environment() -> dict[str, str]:
    """The tests' environment with a terminal wide enough for one-line messages, and threads that share the cores.

    Without GPUs: what runs are compared with is computed on the CPU.
    """
    return os.environ | {
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
    }


def reached(folder: Path, step: int) -> Callable[[], bool]:
    """Return a question whether the run has a checkpoint of this step or a later one."""
    return lambda: any(int(path.stem[5:]) >= step for path in folder.glob("checkpoints/step-*.pt"))


def final_state(folder: Path) -> dict[str, Any]:
    """Return the newest checkpoint."""
    return torch.load(max(folder.glob("checkpoints/step-*.pt")), weights_only=True)


def assert_same_weights(one: Path, other: Path) -> None:
    """Check networks and momentum for equality, bit for bit."""
    first, second = final_state(one), final_state(other)
    assert first["step"] == second["step"]
    for name, network in first["networks"].items():
        for key, value in network.items():
            assert torch.equal(value, second["networks"][name][key]), f"{name}.{key} differs"
    for key, momentum in first["optimizer"]["state"].items():
        assert torch.equal(momentum["momentum_buffer"], second["optimizer"]["state"][key]["momentum_buffer"])


def assert_equal_runs(one: Path, other: Path) -> None:
    """Check weights, momentum, metrics and TensorBoard's points for equality, bit for bit."""
    assert_same_weights(one, other)
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert event_points(one) == event_points(other)


def event_points(folder: Path) -> Counter[tuple[str, int]]:
    """Return how often each (tag, step) stands in the run's event files, read raw."""
    points: Counter[tuple[str, int]] = Counter()
    for file in sorted(folder.glob("tensorboard/*tfevents*")):
        for event in EventFileLoader(str(file)).Load():
            points.update((value.tag, event.step) for value in event.summary.value)
    return points


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the run's metric lines."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
