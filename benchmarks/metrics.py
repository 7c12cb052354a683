"""Seconds and bytes of all calibration figures, beside torchmetrics computing ECE and accuracy alone.

    .venv/bin/python benchmarks/metrics.py [--samples 50000] [--classes 1000] [--batch-size 256] [--rounds 5]

Float32 logits in memory are streamed through each state, from the first batch to the figures; rounds alternate, medians
count. Then, once each: bootstrap intervals of 10,000 of the samples on one thread, and both post-hoc scalings of 10,000
samples of 100 classes.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from machine import header, rounds, timed
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from bdkd_dist.metrics import CalibrationState, fit_temperature, fit_vector_scaling

QUICK_SAMPLES, QUICK_CLASSES, RESAMPLES = 10_000, 100, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logits, targets = drawn(arguments.samples, arguments.classes)
    batches = list(zip(logits.split(arguments.batch_size), targets.split(arguments.batch_size), strict=True))
    contestants: dict[str, Callable[[], int]] = {
        "all figures (ours)": partial(ours, batches, arguments.classes),
        "ECE, top-1 (torchmetrics)": partial(theirs, batches, arguments.classes),
    }
    sizes = {name: run() for name, run in contestants.items()}  # the uncounted round, which allocates
    times = rounds(contestants, arguments.rounds, warm_up=0)
    print(header(threads=True, packages=["torchmetrics"]))
    print(f"{arguments.samples} x {arguments.classes} float32 logits, batches of {arguments.batch_size}")
    for name, taken in times.items():
        print(
            f"{name:<26} {statistics.median(taken):7.2f} s ({min(taken):.2f} to {max(taken):.2f}), "
            f"state {sizes[name] / 1e6:.2f} MB"
        )
    mine, peer = (statistics.median(taken) for taken in times.values())
    print(f"ours/torchmetrics = {mine / peer:.2f}")
    quick()


def drawn(samples: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from softmax(logits / 1.5)."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    return logits, torch.multinomial((logits / 1.5).softmax(1), 1, generator=generator)[:, 0]


def ours(batches: list[tuple[Tensor, Tensor]], classes: int) -> int:
    """Compute, and return the bytes of the state."""
    state = CalibrationState(classes)
    for logits, targets in batches:
        state.update(logits, targets)
    state.compute()
    return sum(values.nbytes for values in [*state._sums.values(), *state._samples])


def theirs(batches: list[tuple[Tensor, Tensor]], classes: int) -> int:
    """Compute, and return the bytes of the state."""
    ece, accuracy = MulticlassCalibrationError(classes), MulticlassAccuracy(classes, average="micro")
    metrics = MetricCollection([ece, accuracy])
    for logits, targets in batches:
        metrics.update(logits, targets)
    metrics.compute()
    counts = (getattr(accuracy, name) for name in ("tp", "fp", "tn", "fn"))
    return sum(values.nbytes for values in [*ece.confidences, *ece.accuracies, *counts])


def quick() -> None:
    """Time the intervals and the two fits."""
    logits, targets = drawn(QUICK_SAMPLES, QUICK_CLASSES)
    state = CalibrationState(QUICK_CLASSES)
    state.update(logits, targets)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = timed(partial(state.intervals, resamples=RESAMPLES))
    print(f"intervals, {QUICK_SAMPLES} samples x {RESAMPLES} resamples, 1 thread: {seconds:.2f} s")
    torch.set_num_threads(threads)
    for name, fit in (("temperature", fit_temperature), ("vector scaling", fit_vector_scaling)):
        seconds = timed(partial(fit, logits, targets))
        print(f"{name}, {QUICK_SAMPLES} x {QUICK_CLASSES} logits: {seconds:.2f} s")


if __name__ == "__main__":
    main()
