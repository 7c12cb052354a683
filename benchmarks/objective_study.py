"""All objectives at equal budget: digits and ten classes of CIFAR-100, three seeds, mean ± standard deviation.

    .venv/bin/python benchmarks/objective_study.py --cifar100 FOLDER [--out runs/objective_study]

``kd`` learns from the teacher of the ``ce`` run of its seed. Two runs go side by side, one thread each.
"""

import argparse
from pathlib import Path

from machine import header
from study import Run, end_with_children, row, table, train_all, write_subset

from bdkd_dist.objectives import OBJECTIVES

SEEDS = (0, 1, 2)
CLASSES = 10
DIGITS = ["digits", "train.epochs=10", "train.evaluate_every_epochs=5", "data.threads=1"]
CIFAR = [
    *("cifar100_r56_r20", "data.dataset=files", f"data.num_classes={CLASSES}"),
    *("models.teacher=resnet20", "models.student=resnet8", "data.threads=1"),
    *("schedule.kind=cosine", "schedule.warmup_epochs=1", "train.epochs=8", "train.evaluate_every_epochs=4"),
]
TITLES = {
    "digits": "digits (1,293 training images), resnet20 → resnet8, 10 epochs",
    "cifar": f"the first {CLASSES} classes of CIFAR-100 (4,500 training images), resnet20 → resnet8, 8 epochs",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar100", type=Path, required=True, help="folder of CIFAR-100's Parquet shards")
    parser.add_argument("--out", type=Path, default=Path("runs/objective_study"))
    arguments = parser.parse_args()
    end_with_children()
    out = arguments.out.absolute()
    write_subset(arguments.cifar100, out / "ten_classes", CLASSES)
    settings = {"digits": DIGITS, "cifar": [*CIFAR, f"data.root={out / 'ten_classes'}"]}
    names = ["ce", *(name for name in OBJECTIVES if name != "ce")]  # kd needs the teachers of ce
    runs = [run(out, settings[data], data, name, seed) for name in names for seed in SEEDS for data in settings]
    train_all(out, runs, side_by_side=2)
    print(header(".venv/bin/python benchmarks/objective_study.py --cifar100 FOLDER"))
    for data, title in TITLES.items():
        rows = [row(out, f"`{name}`", [f"{data}-{name}-{seed}" for seed in SEEDS]) for name in OBJECTIVES]
        print(f"\n**{title}**, test split, {len(SEEDS)} seeds:\n\n{table(rows)}")


def run(out: Path, settings: list[str], data: str, objective: str, seed: int) -> Run:
    arguments = [*settings, f"objective.name={objective}", f"train.seed={seed}"]
    teacher = f"{data}-ce-{seed}" if objective == "kd" else None
    if teacher:
        arguments.append(f"models.teacher_checkpoint={out / teacher}")
    return Run(f"{data}-{objective}-{seed}", tuple(arguments), after=teacher)


if __name__ == "__main__":
    main()
