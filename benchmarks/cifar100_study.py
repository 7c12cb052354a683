"""BD-KD beside its rivals on CIFAR-100 at equal budget, three seeds: accuracy and calibration after the last epoch.

    .venv/bin/python benchmarks/cifar100_study.py --cifar100 FOLDER                  # ten classes, for a CPU
    .venv/bin/python benchmarks/cifar100_study.py --cifar100 FOLDER --scale longer   # ce and bdkd, for longer
    .venv/bin/python benchmarks/cifar100_study.py --cifar100 FOLDER --scale full     # 240 epochs, for a GPU
    .venv/bin/python benchmarks/cifar100_study.py --cifar100 FOLDER --scale full --beyond

1. `bdkd tune tune_spaces/bdkd_weighting.py` looks for BD-KD's best weighting on the validation split (without Ray,
   `--weighting FILE` takes the best.yaml of an earlier search; what is carried holds it, too);
2. `bdkd train` trains every method with every seed; kd learns from the teacher of ce's run of its seed;
3. `bdkd compare` lays them side by side, and the table is printed.

The student of the tuned BD-KD has a moving average beside it, which costs next to nothing: a row of its own.
`--beyond` trains the tuned BD-KD once more under stronger augmentation, and once more for twice as long.

What is finished is not repeated: cut off, or after `--minutes`, the same command goes on; with `--carry FOLDER` on
another machine too, for after each run, and at its end, it leaves all that is needed there in parts of at most 15 MiB.
`--minutes` cuts trainings alone: no search begins when they are over, but one that has begun goes on to its end. The
text printed belongs into benchmarks/results/, from where benchmarks/tables.py puts it into the README.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import yaml
from carry import pack, unpack
from machine import header
from study import OutOfTimeError, Run, bdkd, end_with_children, finished, over, row, table, train_all, write_subset

from bdkd_dist import config

SEEDS = (0, 1, 2)
TUNED = "bdkd tuned"
METHODS = ("ce", "kd", "dml", "kdcl", "switokd", "jeffreys", "bdkd", TUNED)
AVERAGED = f"{TUNED}, averaged"
SPACE = Path(__file__).parent.parent / "tune_spaces/bdkd_weighting.py"
PUBLISHED = "ours are last-epoch; published figures are often of the best epoch on the test split"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained."""

    title: str
    pairs: tuple[str, ...]
    """Recipes."""
    settings: tuple[str, ...]
    methods: tuple[str, ...]
    num_trials: int
    side_by_side: int
    ema_decay: float
    beyond: dict[str, tuple[str, ...]]
    """Settings of what may lift the tuned BD-KD further, by the method's name."""
    classes: int = 100
    anchors: dict[str, str] = dataclasses.field(default_factory=dict)
    """By pair, what others published."""


def _ten_classes(epochs: int, milestones: tuple[int, ...], methods: tuple[str, ...]) -> Scale:
    """Return a scale for a CPU: what is beyond takes twice as long."""
    return Scale(
        "the first ten classes of CIFAR-100 (4,500 training, 500 validation, 1,000 test images), resnet20 → resnet8, "
        f"{epochs} epochs",
        ("cifar100_r56_r20",),
        (
            *("data.dataset=files", "data.num_classes=10", "models.teacher=resnet20", "models.student=resnet8"),
            *(*_length(epochs, milestones), "train.evaluate_every_epochs=4", "data.threads=1"),
        ),
        methods,
        num_trials=12,
        side_by_side=2,
        ema_decay=0.99,
        beyond={
            f"{TUNED} augmented": STRONGER,
            f"{TUNED} longer": _length(2 * epochs, tuple(2 * milestone for milestone in milestones)),
        },
        classes=10,
    )


def _length(epochs: int, milestones: tuple[int, ...]) -> tuple[str, ...]:
    return f"train.epochs={epochs}", f"schedule.milestones=[{','.join(map(str, milestones))}]"


STRONGER = ("data.augment.rand_ops=1", "data.augment.cutout_px=8")
SCALES = {
    "small": _ten_classes(16, (10, 12, 14), METHODS),
    "longer": _ten_classes(48, (30, 36, 42), ("ce", "bdkd")),
    "full": Scale(
        "CIFAR-100 (45,000 training, 5,000 validation, 10,000 test images), 240 epochs",
        ("cifar100_r32x4_r8x4", "cifar100_r56_r20"),
        (
            *("data.loader=resident", "train.precision=bf16", "train.compile=true"),
            *("train.evaluate_every_epochs=20", "train.log_every_steps=100"),
        ),
        METHODS,
        num_trials=24,
        side_by_side=1,
        ema_decay=0.999,
        beyond={
            f"{TUNED} augmented": STRONGER,
            f"{TUNED} longer": _length(480, (300, 360, 420)),
        },
        # CRD's and mdistiller's tables and SHAKE's paper.
        anchors={
            "cifar100_r32x4_r8x4": "student alone 72.50, KD 73.33, DML 74.30, SHAKE 77.95 (teacher 79.42)",
            "cifar100_r56_r20": "student alone 69.06, KD 70.66 (teacher 72.34)",
        },
    ),
}


def main() -> None:
    arguments = parse()
    end_with_children()
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    scale = SCALES[arguments.scale]
    out = arguments.out.absolute() / arguments.scale
    carried = arguments.carry
    if carried:
        unpack(carried, out)

    def keep() -> None:
        if carried:
            pack(out, carried, teacher_wanted)

    data = arguments.cifar100.absolute()
    if scale.classes < 100:
        write_subset(data, out / "data", scale.classes)
        data = out / "data"
    command = f".venv/bin/python benchmarks/cifar100_study.py --cifar100 FOLDER --scale {arguments.scale}"
    command += f" --weighting {arguments.weighting.name}" if arguments.weighting else ""
    reports = [header(command + " --beyond" * arguments.beyond)]
    for pair in arguments.pairs or scale.pairs:
        common = [pair, *scale.settings, f"data.root={data}"]
        try:
            trained: dict[str, tuple[str, ...]] = dict.fromkeys(scale.methods, ())
            if TUNED in trained:
                trained[TUNED] = (f"train.ema_decay={scale.ema_decay}",)
            trained |= scale.beyond if arguments.beyond else {}
            tuned: list[str] = []
            if any(method.startswith(TUNED) for method in trained):
                tuned = parameters(arguments.weighting or search(out / pair, common, scale, end))
            train_all(out / pair, runs(out / pair, common, tuned, trained), scale.side_by_side, end, keep)
        except OutOfTimeError:
            raise SystemExit("the time is over; the same command goes on") from None
        finally:
            keep()
        reports.append(report(out / pair, pair, scale, tuned, list(trained), searched=not arguments.weighting))
    print("\n".join(reports))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar100", type=Path, required=True, help="folder of CIFAR-100's Parquet shards")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--pairs", nargs="*", help="recipes, in place of the scale's own")
    parser.add_argument("--beyond", action="store_true", help="train the tuned BD-KD augmented and for longer, too")
    parser.add_argument("--weighting", type=Path, help="best.yaml of a search of the weighting")
    parser.add_argument("--minutes", type=float, help="end after so long, the last half of one for checkpoints")
    parser.add_argument("--carry", type=Path, help="folder for what another machine needs to go on")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar100_study"))
    return parser.parse_args()


def run(command: list[str]) -> None:
    """Run a command to its end, what it prints to stderr; asked to end, ask it."""
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            if process.wait():
                raise SystemExit(f"failed: {' '.join(command)}")
        except KeyboardInterrupt:
            process.terminate()
            raise


def search(out: Path, common: list[str], scale: Scale, end: float | None) -> Path:
    """Find BD-KD's weighting on validation images, and return the recipe that holds it.

    A search that has begun goes on to its end, or until a signal stops it, from where the same command goes on here; on
    another machine only its result counts.

    Raises:
        OutOfTimeError: It is not found yet, and the time is over.
    """
    best = out / "weighting/best.yaml"
    if not best.is_file():
        if over(end):
            raise OutOfTimeError
        # A seed of its own: among the seeds of the table, the one that chose would be flattered.
        own = ["train.evaluate_every_epochs=1", f"train.seed={max(SEEDS) + 1}"]
        settings = [*common, *own, f"run.storage={out}", "run.name=weighting"]
        options = ["--num-trials", str(scale.num_trials), "--goal", "nll"]
        run(bdkd("tune", str(SPACE), *settings, *options))
    return best


def runs(out: Path, common: list[str], tuned: list[str], trained: dict[str, tuple[str, ...]]) -> list[Run]:
    """Return all trainings, seed by seed, so that a study that is cut has whole seeds; ce's come before kd's.

    Args:
        out: Where the runs lie.
        common: Arguments of all.
        tuned: The tuned objective's parameters, as overrides.
        trained: Further settings of each method.
    """
    found = []
    for seed in SEEDS:
        for method, settings in trained.items():
            arguments = [*common, *settings, f"train.seed={seed}", f"objective.name={method.split()[0]}"]
            teacher = name_of("ce", seed) if method == "kd" else None
            if teacher:
                arguments.append(f"models.teacher_checkpoint={out / teacher}")
            if method.startswith(TUNED):
                arguments += tuned
            found.append(Run(name_of(method, seed), tuple(arguments), after=teacher))
    return found


def teacher_wanted(run: Path) -> bool:
    """Whether the run's teacher is one from which kd has yet to learn."""
    method, _, seed = run.name.rpartition("-")
    return method == "ce" and not finished(run.parent, name_of("kd", int(seed)))


def name_of(method: str, seed: int) -> str:
    return f"{method.replace(' ', '_')}-{seed}"


def parameters(weighting: Path) -> list[str]:
    """Return the objective's parameters in a recipe as overrides."""
    objective = yaml.safe_load(weighting.read_text())["objective"]
    return [f"objective.{key}={value}" for key, value in objective.items() if key != "name"]


def report(out: Path, pair: str, scale: Scale, tuned: list[str], methods: list[str], *, searched: bool) -> str:
    """Compare the runs, and return the table with what it needs to be read.

    Args:
        out: Where the runs lie.
        pair: Recipe.
        scale: How much was trained.
        tuned: The tuned objective's parameters, as overrides.
        methods: Of the runs, in the table's order.
        searched: Whether they were found at this scale, and not given.
    """
    names = {method: [name_of(method, seed) for seed in SEEDS] for method in methods}
    for of_method in names.values():
        check_one_method(out, of_method)
    folders = [str(out / name) for of_method in names.values() for name in of_method]
    run(bdkd("compare", *folders, "--out", str(out / "comparison")))
    rows = [row(out, f"`{method}`", of_method) for method, of_method in names.items()]
    heading = f"\n**{pair}**: {scale.title}; test split, {len(SEEDS)} seeds, mean ± standard deviation:\n"
    said = []
    if TUNED in methods:
        rows.insert(methods.index(TUNED) + 1, row(out, f"`{AVERAGED}`", names[TUNED], "student_ema"))
        values = ", ".join(argument.removeprefix("objective.") for argument in tuned)
        best = f"is the best of {scale.num_trials} trials by validation NLL, with a further seed"
        said = [
            f"\n`{TUNED}` {best if searched else 'has the weighting of an earlier search'}: {values}.",
            f"`{AVERAGED}` is the moving average of its student's weights over training "
            f"(decay {scale.ema_decay} a step).",
        ]
    lines = [heading, table(rows), *said]
    lines += [f"`{method}`: {' '.join(scale.beyond[method])}." for method in methods if method in scale.beyond]
    if pair in scale.anchors:
        lines.append(f"Published top-1 %: {scale.anchors[pair]}; {PUBLISHED}.")
    return "\n".join(lines)


def check_one_method(out: Path, names: list[str]) -> None:
    """Raise SystemExit where recipes of runs differ in what is computed, but for the seed and that seed's teacher."""
    first, *others = (config.load(str(out / name / "recipe.yaml")) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        for key, there, here in config.differences(first, other):
            if key not in ("train.seed", "models.teacher_checkpoint"):
                raise SystemExit(
                    f"{out}: {key} is {there} in {names[0]} and {here} in {name}: no one method; delete what is not "
                    "wanted (a carried ce's teacher is there no more: with a kd delete its ce), and the same command "
                    "trains it again"
                )


if __name__ == "__main__":
    main()
