"""Which of BD-KD's constants matter: a two-level fractional factorial, judged on the validation images alone.

    .venv/bin/python benchmarks/objective_design.py --cifar100 FOLDER
    .venv/bin/python benchmarks/objective_design.py --report > benchmarks/results/objective_design.txt

FOLDER holds CIFAR-100 as Parquet shards. 16 trainings at the small scale of objective_study.py, of half its length and
of seeds that it has none of, are a 2^(7-3) design of resolution IV (Box, Hunter and Hunter, "Statistics for
Experimenters", 2005, chapter 6): no main effect is mixed up with another one or with an interaction of two factors, but
these are with each other. Records are kept as the study's are, without test images; the same command goes on.
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import header_of
from objective_report import starts_of, table
from objective_study import SCALES
from recorded_trainings import ROOT, Training, command_line, finished, train_all
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from bdkd_dist.errors import UserError
from bdkd_dist.records.wording import fixed, percent

RECORDS = ROOT / "benchmarks/results/objective_design"
SCALE = SCALES["small"]
EPOCHS = 40
"""Half of the study's: the networks overfit by then, and a schedule counts in shares of training."""
SETTINGS = (*SCALE.settings, f"train.epochs={EPOCHS}")


@dataclass(frozen=True)
class Factor:
    """What has two levels."""

    title: str
    low: Any
    high: Any


FACTORS = {
    "A": Factor("ramp of the divergences' weights", "constant", "sigmoid over all of training"),
    "B": Factor("end of the divergences' weights", 3.0, 10.0),
    "C": Factor("teacher's weight, of that end", 0.33, 1.0),
    "D": Factor("temperature", 1.0, 4.0),
    "E": Factor("boost ν (at equal total weight: for ν = 1 the student's weight is 1.5 times as large)", 1.0, 2.0),
    "F": Factor("end of the label weight, from 1 on a sigmoid", 1.0, 0.5),
    "G": Factor("seed", 100, 101),
}
GENERATORS = {"E": "ABC", "F": "BCD", "G": "ACD"}
BASIC = tuple(letter for letter in FACTORS if letter not in GENERATORS)
RESPONSES = {
    "NLL": ("student", "nll"),
    "top-1 %": ("student", "top1"),
    "ECE %": ("student", "ece"),
    "teacher top-1 %": ("teacher", "top1"),
}
LEVEL = 0.95


def design() -> dict[str, np.ndarray]:
    """Return the (16,) levels of each factor, -1 or 1: all of the basic ones, the first changing fastest."""
    rows = np.array(list(itertools.product((-1, 1), repeat=len(BASIC))))
    columns = dict(zip(BASIC, rows[:, ::-1].T, strict=True))
    generated = {letter: np.prod([columns[one] for one in word], axis=0) for letter, word in GENERATORS.items()}
    return columns | generated


def trainings(settings: tuple[str, ...]) -> list[Training]:
    """Return the runs in the design's order.

    Args:
        settings: Recipe and overrides of all.
    """
    columns = design()
    runs = []
    for number in range(len(columns["A"])):
        levels = {
            letter: factor.high if columns[letter][number] > 0 else factor.low for letter, factor in FACTORS.items()
        }
        runs.append(Training(f"run{number + 1:02d}", (*settings, *overrides(levels))))
    return runs


def overrides(levels: dict[str, Any]) -> tuple[str, ...]:
    """Return what sets each factor's level, and the other parameters to what they are in all runs."""
    end, boost = levels["B"], levels["E"]

    def weight(end: float) -> str:
        return f"{end:g}" if levels["A"] == FACTORS["A"].low else f"{{start: 0, end: {end:g}, shape: sigmoid}}"

    values = {
        "name": "bdkd",
        "student_weight": weight(end * (1 + FACTORS["E"].high) / (1 + boost)),
        "teacher_weight": weight(end * levels["C"]),
        "temperature": f"{levels['D']:g}",
        "nu_forward": f"{boost:g}",
        "nu_reverse": f"{boost:g}",
        "ce_weight": "1" if levels["F"] == 1 else f"{{start: 1, end: {levels['F']:g}, shape: sigmoid}}",
        "entropy_temperature": "1",
        "gate": "hard",
        "teacher_term": "student_to_teacher",
    }
    return (*(f"objective.{key}={value}" for key, value in values.items()), f"train.seed={levels['G']}")


@dataclass(frozen=True)
class Effects:
    """Of one response."""

    effects: dict[str, float]
    """By factor: mean at its high level minus mean at its low one."""
    standard_error: float
    """Of each, from the residual of the model of main effects."""
    interactions: dict[tuple[str, ...], float]
    """By the pairs of factors whose products are one column: twice that column's coefficient."""

    def t(self, factor: str) -> float:
        """Return the effect in standard errors; nan where nothing varies."""
        return self.effects[factor] / self.standard_error if self.standard_error else math.nan


def effects_of(response: np.ndarray) -> Effects:
    """Return the effects on a (16,) response.

    The columns x are orthogonal, so a coefficient is x·y/N, and an effect twice that. With p main effects and the mean
    the residual has N - p - 1 degrees of freedom, and an effect's variance is 4·s²/N.
    """
    columns = design()
    count = len(response)
    coefficients = {letter: float(x @ response) / count for letter, x in columns.items()}
    fitted = response.mean() + sum(coefficients[letter] * x for letter, x in columns.items())
    variance = float(np.square(response - fitted).sum()) / degrees_of_freedom()
    return Effects(
        {letter: 2 * value for letter, value in coefficients.items()},
        math.sqrt(4 * variance / count),
        {pairs: 2 * float(product(pairs[0]) @ response) / count for pairs in interactions()},
    )


def degrees_of_freedom() -> int:
    """Return those of the residual of the model of main effects."""
    return 2 ** len(BASIC) - len(FACTORS) - 1


def product(letters: str) -> np.ndarray:
    """Return the (16,) product of factors' columns."""
    columns = design()
    return np.prod([columns[letter] for letter in letters], axis=0)


def interactions() -> list[tuple[str, ...]]:
    """Return the pairs of factors, those together whose products are the same column."""
    same: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for pair in map("".join, itertools.combinations(FACTORS, 2)):
        same[tuple(product(pair))].append(pair)
    return [tuple(pairs) for pairs in same.values()]


def aliases(letter: str) -> list[str]:
    """Return the pairs of factors whose interaction cannot be told from a factor's main effect."""
    column = design()[letter]
    pairs = map("".join, itertools.combinations(FACTORS, 2))
    return [pair for pair in pairs if letter not in pair and abs(int(product(pair) @ column)) == len(column)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line(parser, "runs/objective_design", study)


def study(arguments: argparse.Namespace) -> str:
    """Train what has no record, and return what the records say; raises UserError and OutOfTimeError."""
    if not arguments.report:
        images = SCALE.images(arguments.cifar100, arguments.out / "images")
        runs = trainings((*SETTINGS, f"data.root={images.absolute()}"))
        side_by_side = arguments.side_by_side or SCALE.side_by_side
        train_all(runs, RECORDS, arguments.out, side_by_side, arguments.end, validation_only=True)
    recorded = [run for run in trainings(SETTINGS) if finished(RECORDS / run.name)]
    if not recorded:
        raise UserError(f"{RECORDS} holds no record")
    for run in recorded:
        run.check(RECORDS / run.name)
    starts = starts_of(RECORDS / run.name for run in recorded)
    command = ".venv/bin/python benchmarks/objective_design.py --cifar100 FOLDER"
    return f"{header_of(starts, command)}\n\n{report({run.name: responses(RECORDS / run.name) for run in recorded})}"


def responses(record: Path) -> dict[str, float]:
    """Return what a run's validation images say."""
    validation = json.loads((record / "results.json").read_text())["validation"]
    return {name: float(validation[network]["raw"][metric]) for name, (network, metric) in RESPONSES.items()}


def report(measured: dict[str, dict[str, float]]) -> str:
    """Return the runs and the effects as Markdown.

    Args:
        measured: By run, each of :data:`RESPONSES`; of runs that are not there yet nothing.
    """
    words = ", ".join(f"{letter} = {word}" for letter, word in GENERATORS.items())
    factors = [(letter, of.title, str(of.low), str(of.high)) for letter, of in FACTORS.items()]
    said = [
        f"**BD-KD's constants on two levels**; {SCALE.title}, here {EPOCHS} of them; judged on validation images alone",
        table(("factor", "", "low", "high"), factors),
        f"2^({len(FACTORS)}-{len(GENERATORS)}) design of resolution IV; generators: {words}.",
        table(("run", *FACTORS, *RESPONSES), run_lines(measured)),
    ]
    whole = [run.name for run in trainings(SETTINGS)]
    if missing := [name for name in whole if name not in measured]:
        return "\n\n".join([*said, f"No effects yet, as runs are missing: {', '.join(missing)}."])
    found = {name: effects_of(np.array([measured[run][name] for run in whole])) for name in RESPONSES}
    beyond = student_t.ppf((1 + LEVEL) / 2, degrees_of_freedom())
    return "\n\n".join(
        [
            *said,
            "**Effects**: mean at the high level minus mean at the low one (points, where it is in %), and t:",
            table(("factor", *RESPONSES, "mixed up with"), effect_lines(found)),
            f"The standard error is from the residual of the model of main effects ({degrees_of_freedom()} degrees of "
            f"freedom), which holds the interactions too, where there are any; with none, |t| > {beyond:.2f} is "
            f"seen by chance in {100 * (1 - LEVEL):.0f} % of looks; there are {len(FACTORS) * len(RESPONSES)} here.",
            "**Interactions of two factors**, which are mixed up with each other:",
            table(("sum of", *RESPONSES), interaction_lines(found)),
        ]
    )


def run_lines(measured: dict[str, dict[str, float]]) -> list[list[str]]:
    """Return a line for each run: its levels, and its responses."""
    columns = design()
    return [
        [
            run.name,
            *("+" if column[number] > 0 else "−" for column in columns.values()),
            *(written(name, measured[run.name][name]) if run.name in measured else "" for name in RESPONSES),
        ]
        for number, run in enumerate(trainings(SETTINGS))
    ]


def effect_lines(found: dict[str, Effects]) -> list[list[str]]:
    """Return a line for each factor, and one of standard errors, which all factors share."""
    lines = [
        [
            f"{letter}, {factor.title.partition(' (')[0]}",
            *(f"{written(name, of.effects[letter], '+')} (t = {of.t(letter):+.1f})" for name, of in found.items()),
            ", ".join(aliases(letter)) or "no interaction of two factors",
        ]
        for letter, factor in FACTORS.items()
    ]
    return [*lines, ["standard error", *(written(name, of.standard_error) for name, of in found.items()), ""]]


def interaction_lines(found: dict[str, Effects]) -> list[list[str]]:
    """Return a line for each set of interactions that cannot be told apart."""
    return [
        [" + ".join(pairs), *(written(name, of.interactions[pairs], "+") for name, of in found.items())]
        for pairs in interactions()
    ]


def written(response: str, value: float, sign: str = "") -> str:
    """Return a response, or a difference of two, as a person reads it."""
    return percent(value, sign) if response.endswith("%") else fixed(value, 3, sign)


if __name__ == "__main__":
    main()
