"""Hand-made logs, and readers of what was recorded that share nothing with the code under test."""

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event

from bdkd_dist.engine.observer import EvalLog, NetworkDiagnosis, StepLog
from bdkd_dist.metrics import Reliability

NAN = float("nan")
RECIPE = "run:\n  name: digits\ntrain:\n  epochs: 4\n"


def step_log(step: int, total_steps: int = 40) -> StepLog:
    scalars = {"train/student/loss": 1 / step, "train/teacher/loss": 0.5 / step, "lr/student": 0.1}
    return StepLog(step, total_steps, epoch=(step - 1) // 10, scalars=scalars, images_per_s=1234.4, remaining_s=125.0)


def diagnosis(top1: float = 0.972, ece: float = 0.0125) -> NetworkDiagnosis:
    metrics = {
        "top1": top1,
        "top5": 1.0,
        "ece": ece,
        "adaece": 0.012,
        "classwise_ece": 0.004,
        "mce": 0.3,
        "gap": -0.01,
        "nll": 0.1,
        "brier": 0.05,
        "entropy": 0.2,
        "count": 100.0,
    }
    bins = Reliability((0.0, 0.25, 0.5, 1.0), (0, 2, 98), (NAN, 1.0, 0.971), (NAN, 0.4, 0.981))
    return NetworkDiagnosis(metrics, bins)


def eval_log(step: int) -> EvalLog:
    networks = {"teacher": diagnosis(0.98, 0.008), "student": diagnosis()}
    entropies = {"teacher": torch.tensor([0.1, 0.6]), "student": torch.tensor([0.5, 0.2])}
    return EvalLog(step, epoch=step // 10, networks=networks, entropies=entropies)


def raw_events(folder: Path) -> Iterator[Event]:
    """Every event of every file, in the order of names: TFRecord taken apart by hand, checksums not looked at."""
    for path in sorted(folder.iterdir()):
        if "tfevents" in path.name:
            content, at = path.read_bytes(), 0
            while at < len(content):
                (length,) = struct.unpack_from("<Q", content, at)
                assert at + 16 + length <= len(content), f"{path} ends within a record"
                yield Event.FromString(content[at + 12 : at + 12 + length])
                at += 16 + length


def points(folder: Path) -> list[tuple[str, int]]:
    """(tag, step) of every recorded value, with its repetitions."""
    return [(value.tag, event.step) for event in raw_events(folder) for value in event.summary.value]
