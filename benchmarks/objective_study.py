"""BD-KD beside its rivals at equal budget: accuracy and calibration after the last epoch, five seeds.

    .venv/bin/python benchmarks/objective_study.py --cifar100 FOLDER                    # ten classes, for a CPU
    .venv/bin/python benchmarks/objective_study.py --cifar100 FOLDER --scale hundred    # all classes, few images
    .venv/bin/python benchmarks/objective_study.py --cifar100 FOLDER --scale full       # 240 epochs, for a GPU
    .venv/bin/python benchmarks/objective_study.py --report > benchmarks/results/objective_study_small.txt

FOLDER holds CIFAR-100 as Parquet shards. Every row is trained with `bdkd train`, ``kd`` with the teacher of the run of
``ce`` of its seed. A finished run leaves a record in benchmarks/results/objective_study/SCALE/ROW-SEED, which `bdkd
compare` reads, too. What is recorded is not repeated: cut off, or after `--minutes`, the same command goes on, on
another machine as well. The text printed belongs into benchmarks/results/, from where benchmarks/tables.py puts it into
README.md and docs/.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import header_of
from objective_report import NUM_SEEDS, Measured, read_record, report, starts_of
from recorded_trainings import ROOT, Subset, Training, command_line, finished, train_all

from bdkd_dist.errors import UserError, unknown
from bdkd_dist.objectives import OBJECTIVES

RECORDS = ROOT / "benchmarks/results/objective_study"
SEEDS = tuple(range(NUM_SEEDS))
AT_16_PX = (
    *("cifar100_r56_r20", "data.dataset=files", "data.image_px=16", "data.augment.pad_px=2"),
    *("models.teacher=resnet32", "models.student=resnet20", "train.epochs=80"),
    *("schedule.kind=cosine", "schedule.milestones=[]", "schedule.warmup_epochs=2"),
    *("train.evaluate_every_epochs=10", "data.threads=1"),
)
ON_A_GPU = (
    *("data.loader=resident", "train.precision=bf16", "train.compile=true"),
    *("train.evaluate_every_epochs=20", "train.log_every_steps=100"),
)


@dataclass(frozen=True)
class Scale:
    """How much is trained, and on what."""

    title: str
    settings: tuple[str, ...]
    """Recipe and overrides."""
    subset: Subset | None
    """None: the images as they lie."""
    rows: tuple[str, ...] = ("objectives",)
    """Names and groups, unless others are asked for."""
    side_by_side: int = 2
    published: str = ""

    def images(self, source: Path, folder: Path) -> Path:
        """Return where the images lie, once they are there; raises UserError.

        Args:
            source: CIFAR-100's Parquet shards.
            folder: For the subset.
        """
        if self.subset is None:
            return source
        self.subset.write(source, folder)
        return folder


def _whole(recipe: str, published: str) -> Scale:
    title = f"CIFAR-100 (45,000 training, 5,000 validation, 10,000 test images), {recipe}, 240 epochs"
    # CRD's and mdistiller's tables and SHAKE's paper.
    said = (
        f"Published top-1 %: {published}; ours are last-epoch, published ones often of the best epoch on test images."
    )
    return Scale(title, (recipe, *ON_A_GPU), None, side_by_side=1, published=said)


SCALES = {
    "small": Scale(
        "CIFAR-100's first ten classes at 16 px (2,500 training, 500 validation, 3,000 test images), resnet32 → "
        "resnet20, 80 epochs",
        (*AT_16_PX, "data.num_classes=10"),
        Subset(classes=10, train=250, validation=50, test_of_train=200, test_of_test=100),
    ),
    "hundred": Scale(
        "CIFAR-100 at 16 px, few images of every class (5,000 training, 1,000 validation, 5,000 test images), "
        "resnet32 → resnet20, 80 epochs",
        AT_16_PX,
        Subset(classes=100, train=50, validation=10, test_of_train=0, test_of_test=50),
        rows=("ce", "bdkd"),
    ),
    "full": _whole("cifar100_r56_r20", "student alone 69.06, KD 70.66 (teacher 72.34)"),
    "full_r32x4_r8x4": _whole(
        "cifar100_r32x4_r8x4", "student alone 72.50, KD 73.33, DML 74.30, SHAKE 77.95 (teacher 79.42)"
    ),
}


@dataclass(frozen=True)
class Row:
    """A method."""

    title: str
    overrides: tuple[str, ...]
    taught: bool = False
    """Whether it learns from the teacher of ce's run of its seed."""


def number(value: Any) -> str:
    """Return a parameter, a number or the fields of a schedule, as an override has it."""
    return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}" if isinstance(value, dict) else str(value)


def times(value: Any, factor: float) -> Any:
    """Return a number or a schedule so many times as large."""
    if isinstance(value, dict):
        return value | {end: factor * value[end] for end in ("start", "end")}
    return factor * value


def _gate_rows(defaults: dict[str, Any]) -> dict[str, Row]:
    """Return other gates of bdkd at its own total weight.

    A gate with ν = ν_f = ν_r multiplies one direction by ν and the other by 1: together 1 + ν, which the student's
    weight makes up for. (Hard or soft, at any entropy temperature, the sum is the same.)
    """
    boost = defaults["nu_forward"]

    def boosted(nu: float) -> tuple[tuple[str, ...], str]:
        factor = (1 + boost) / (1 + nu)
        weight = number(times(defaults["student_weight"], factor))
        overrides = f"objective.nu_forward={nu:g}", f"objective.nu_reverse={nu:g}", f"objective.student_weight={weight}"
        total = f"at equal total weight: factors {nu:g} and 1 add up to {1 + nu:g}, bdkd's to {1 + boost:g}, so the"
        return overrides, f"{total} student's weight is {factor:.3g} times as large"

    (no_gate, no_gate_weight), (swapped, swapped_weight) = boosted(1), boosted(1 / boost)
    own_weight = f"at equal total weight: the two factors add up to {1 + boost:g} here, too"
    return {
        "bdkd_no_gate": Row(f"no gate, ν = 1, {no_gate_weight}", no_gate),
        "bdkd_soft": Row(f"soft gate, {own_weight}", ("objective.gate=soft",)),
        "bdkd_swapped": Row(f"the gate boosts the other direction, {swapped_weight}", swapped),
        "bdkd_entropy_4": Row(f"entropies at temperature 4, {own_weight}", ("objective.entropy_temperature=4",)),
    }


def rows_of(defaults: dict[str, Any]) -> dict[str, dict[str, Row]]:
    """Return the rows by group and name.

    Args:
        defaults: The parameters of bdkd, numbers or the fields of schedules, from which other rows take their ramp.
    """
    ramp = number(defaults["student_weight"])
    as_bdkd = "weight on bdkd's ramp"
    constant = (
        *("objective.nu_forward=2", "objective.nu_reverse=2", "objective.temperature=1"),
        *("objective.entropy_temperature=1", "objective.ce_weight=1", "objective.student_weight=1"),
        *("objective.teacher_weight=1", "objective.gate=hard", "objective.teacher_term=student_to_teacher"),
    )
    mixup, cutmix = "data.augment.mixup_alpha=0.2", "data.augment.cutmix_alpha=1"
    groups = {
        "objectives": {
            "ce": Row("each network alone", ("objective.name=ce",)),
            "ce_smooth": Row("ce, label smoothing 0.1", ("objective.name=ce", "train.label_smoothing=0.1")),
            "focal": Row("focal loss", ("objective.name=focal",)),
            "mdca": Row("multi-class difference in confidence and accuracy", ("objective.name=mdca",)),
            "ce_mixup": Row("ce, mixup", ("objective.name=ce", mixup)),
            "ps_kd": Row("progressive self-distillation", ("objective.name=ps_kd",)),
            "kd": Row("a finished teacher, ce's of the seed", ("objective.name=kd",), taught=True),
            "dml": Row("deep mutual learning", ("objective.name=dml",)),
            "kdcl": Row("collaborative learning", ("objective.name=kdcl",)),
            "switokd": Row("switchable online distillation", ("objective.name=switokd",)),
            "competitive": Row("competitive distillation", ("objective.name=competitive",)),
            "jeffreys": Row("both directions at equal weight", ("objective.name=jeffreys",)),
            "bdkd_constant": Row("bdkd, weights constant, temperature 1", ("objective.name=bdkd", *constant)),
            "bdkd": Row("bdkd as it is by default", ("objective.name=bdkd",)),
        },
        "ramped": {
            "dml_ramped": Row(f"dml, {as_bdkd}", ("objective.name=dml", f"objective.weight={ramp}")),
            "kdcl_ramped": Row(
                f"kdcl, {as_bdkd}, temperature 4",
                ("objective.name=kdcl", f"objective.weight={ramp}", "objective.temperature=4"),
            ),
            "jeffreys_ramped": Row(
                f"jeffreys, both {as_bdkd}, temperature 4",
                (
                    *("objective.name=jeffreys", "objective.temperature=4"),
                    *(f"objective.student_weight={ramp}", f"objective.teacher_weight={ramp}"),
                ),
            ),
        },
        "augmented": {
            "ce_cutmix": Row("ce, cutmix", ("objective.name=ce", cutmix)),
            "bdkd_mixup": Row("bdkd, mixup", ("objective.name=bdkd", mixup)),
            "bdkd_cutmix": Row("bdkd, cutmix", ("objective.name=bdkd", cutmix)),
        },
        "gate": {
            name: dataclasses.replace(row, overrides=("objective.name=bdkd", *row.overrides))
            for name, row in _gate_rows(defaults).items()
        },
    }
    return {
        group: {name: dataclasses.replace(row, title=titled(row)) for name, row in rows.items()}
        for group, rows in groups.items()
    }


def titled(row: Row) -> str:
    """Return a row's title with its overrides."""
    return f"{row.title} (`{' '.join(row.overrides)}`)"


GROUPS = rows_of(dataclasses.asdict(OBJECTIVES["bdkd"]()))  # type: ignore[call-overload]
ROWS = {name: row for rows in GROUPS.values() for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--rows", nargs="+", help=f"of {', '.join(ROWS)}; or groups: {', '.join(GROUPS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    command_line(parser, "runs/objective_study", study)


def study(arguments: argparse.Namespace) -> str:
    """Train what has no record, and return what the records say; raises UserError and OutOfTimeError."""
    scale, records = SCALES[arguments.scale], RECORDS / arguments.scale
    names = chosen(arguments.rows or scale.rows)
    common = scale.settings
    if not arguments.report:
        images = scale.images(arguments.cifar100, arguments.out / "images" / arguments.scale)
        common = (*common, f"data.root={images.absolute()}")
    trainings = {name: [training(common, name, seed) for seed in arguments.seeds] for name in names}
    if not arguments.report:
        # Seed by seed, so that a study that is cut has whole seeds.
        in_order = [one for of_seed in zip(*trainings.values(), strict=True) for one in of_seed]
        side_by_side = arguments.side_by_side or scale.side_by_side
        train_all(in_order, records, arguments.out / arguments.scale, side_by_side, arguments.end)
    return text(scale, trainings, records, command_of(arguments))


def chosen(asked: list[str] | tuple[str, ...]) -> list[str]:
    """Return the rows of names and groups, each once; raises UserError."""
    found: dict[str, None] = {}
    for name in asked:
        if name not in ROWS and name not in GROUPS:
            raise unknown("row", name, [*ROWS, *GROUPS])
        found |= dict.fromkeys(GROUPS.get(name, [name]))
    return list(found)


def training(common: tuple[str, ...], name: str, seed: int) -> Training:
    """Return a row's training with a seed."""
    row = ROWS[name]
    teacher = training(common, "ce", seed) if row.taught else None
    return Training(f"{name}-{seed}", (*common, *row.overrides, f"train.seed={seed}"), teacher)


def text(scale: Scale, trainings: dict[str, list[Training]], records: Path, command: str) -> str:
    """Return what the records of trainings, by row, say; raises UserError."""
    measured, folders = [], []
    for name, of_row in trainings.items():
        recorded = [one for one in of_row if finished(records / one.name)]
        for one in recorded:
            one.check(records / one.name)
            folders.append(records / one.name)
        if recorded:
            runs = tuple(read_record(records / one.name) for one in recorded)
            measured.append(Measured(name, ROWS[name].title, runs))
    if not measured:
        raise UserError(f"{records} holds no record of these rows")
    missing = [name for name in trainings if name not in {row.name for row in measured}]
    head = header_of(starts_of(folders), command)
    return f"{head}\n\n{report(measured, scale.title, missing, scale.published)}"


def command_of(arguments: argparse.Namespace) -> str:
    """Return the command by which the trainings are made, as a person would type it."""
    command = f".venv/bin/python benchmarks/objective_study.py --cifar100 FOLDER --scale {arguments.scale}"
    if arguments.rows:
        command += f" --rows {' '.join(arguments.rows)}"
    if arguments.seeds != list(SEEDS):
        command += f" --seeds {' '.join(map(str, arguments.seeds))}"
    return command


if __name__ == "__main__":
    main()
