"""What a study's records say: tables with the noise floor of the ECE, paired differences, and the goals."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from recorded_trainings import PREDICTIONS

from bdkd_dist import config
from bdkd_dist.errors import UserError
from bdkd_dist.records.comparison import Run
from bdkd_dist.records.comparison_bootstrap import Difference, bins, paired_bootstrap
from bdkd_dist.records.wording import fixed, percent

NUM_SEEDS = 5
"""Of a row that is complete; another number is told."""
CONTROL, BASE, OWN = "dml", "ce", "bdkd"
RIVALS_IN_ECE = ("dml", "kdcl", "switokd", "focal", "mdca", "ce_smooth")
MIXING = ("data.augment.mixup_alpha", "data.augment.cutmix_alpha")
DRAWS, DRAWS_AT_ONCE, QUANTILE = 1000, 50, 0.95
LEAST_GAIN, MOST_NLL_RATIO = 0.02, 0.65
COLUMNS = (
    *("row", "top-1 %", "NLL", "Brier", "ECE %", "floor % (95 %)", "gap %", "T-scaled ECE %", "T-scaled NLL"),
    *("teacher top-1 %", "teacher ECE %"),
)
LEGEND = f"""\
ECE and its floor: a perfectly calibrated network with the same confidences would measure the floor on as many test
images (mean of {DRAWS} draws of which predictions are right; in brackets the {100 * QUANTILE:.0f} % quantile; means
over the runs). `≈`: the ECE is within that quantile: calibrated, as far as this test set can tell; such rows are not
ranked by it. Gap: mean confidence − accuracy, positive where over-confident. T-scaled: divided by a temperature fitted
on the validation images."""
HOW_TO_READ = """\
Intervals: 95 %, paired bootstrap over the test images, the trained networks as they are (`bdkd compare`); `*`: 0 is
outside."""


@dataclass(frozen=True)
class Measured:
    """A row's runs, which differ in their seeds alone."""

    name: str
    title: str
    runs: tuple[Run, ...]

    def values(self, metric: str, kind: str = "raw", network: str = "student") -> list[float]:
        """Return a metric of the test images, a run each."""
        return [float(run.results[network][kind][metric]) for run in self.runs]

    def mean(self, metric: str, kind: str = "raw", network: str = "student") -> float:
        """Return the mean of :meth:`values`."""
        return statistics.mean(self.values(metric, kind, network))

    @cached_property
    def floor(self) -> tuple[float, float]:
        """Mean and quantile of the student's :func:`noise_floor`, means over runs."""
        means, quantiles = zip(*(noise_floor(run.said["student"].confidence) for run in self.runs), strict=True)
        return statistics.mean(means), statistics.mean(quantiles)

    @property
    def label(self) -> str:
        """The name, with the number of runs where that is not all."""
        return f"`{self.name}`" + (f" (n = {len(self.runs)})" if len(self.runs) != NUM_SEEDS else "")

    @property
    def is_mixed(self) -> bool:
        """Whether it is trained on mixed images."""
        return any(self.runs[0].recipe[key] for key in MIXING)


def read_record(folder: Path) -> Run:
    """Return the run of a record; raises UserError."""
    recipe = config.load(str(folder / "recipe.yaml"))
    return Run.read(folder.name, recipe, folder / "results.json", folder / PREDICTIONS)


def starts_of(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the environments in which records were trained."""
    return [start for folder in folders for start in json.loads((folder / "environment.json").read_text())]


def noise_floor(confidence: np.ndarray, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return mean and 95 % quantile of the ECE that a perfectly calibrated network would measure.

    Each prediction is right with the probability that its confidence states (consistency resampling: Bröcker and
    Smith 2007, "Increasing the Reliability of Reliability Diagrams").

    Args:
        confidence: (N,) of the predictions, in [0, 1].
        draws: Of the N outcomes.
        seed: Of the draws.
    """
    bin_of = bins(confidence)
    order = np.argsort(bin_of, kind="stable")
    ordered, starts = confidence[order], np.flatnonzero(np.diff(bin_of[order], prepend=-1))
    rng = np.random.default_rng(seed)
    found = []
    for first in range(0, draws, DRAWS_AT_ONCE):
        right = rng.random((min(DRAWS_AT_ONCE, draws - first), len(ordered))) < ordered
        found.append(np.abs(np.add.reduceat(ordered - right, starts, axis=1)).sum(1) / len(ordered))
    eces = np.concatenate(found)
    return float(eces.mean()), float(np.quantile(eces, QUANTILE))


def check_same_images(runs: Sequence[Run]) -> None:
    """Raise UserError unless all runs were tested on the same images."""
    first = runs[0]
    for run in runs[1:]:
        same = np.array_equal(run.index, first.index) and np.array_equal(run.label, first.label)
        if not same or run.test_fingerprint != first.test_fingerprint:
            raise UserError(f"{run.name} was tested on other images than {first.name}; delete the record that is wrong")


def report(rows: Sequence[Measured], title: str, missing: Sequence[str] = (), published: str = "") -> str:
    """Return what the rows say, as Markdown.

    Args:
        rows: Those that have runs.
        title: What was trained.
        missing: Names of rows without records.
        published: What others found, if anything.

    Raises:
        UserError: The runs are not of the same test images.
    """
    check_same_images([run for row in rows for run in row.runs])
    from_base, from_own = (differences(rows, name) for name in (BASE, OWN))
    said = [
        control(from_base),
        f"**{title}**; test images, {NUM_SEEDS} seeds where no n is given, mean ± standard deviation:",
        table(COLUMNS, [line(row) for row in rows]),
        LEGEND,
        "\n".join(f"- `{row.name}`: {row.title}" for row in rows),
    ]
    if missing:
        said.append(f"Without records, and left out: {', '.join(f'`{name}`' for name in missing)}.")
    if published:
        said.append(published)
    for name, found in ((BASE, from_base), (OWN, from_own)):
        if found:
            columns = ("row", "top-1, points", "NLL", "ECE, points")
            said += [f"**Student's differences from `{name}`**:", table(columns, map(difference_line, found.items()))]
    return "\n\n".join([*said, *[HOW_TO_READ] * bool(from_base or from_own), goals(rows)])


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines))


def line(row: Measured) -> list[str]:
    """Return the cells of :data:`COLUMNS`."""
    ece, (floor, quantile) = row.values("ece"), row.floor
    return [
        row.label,
        spread(row.values("top1"), percent),
        spread(row.values("nll"), _three),
        spread(row.values("brier"), _three),
        "≈ " * (statistics.mean(ece) <= quantile) + spread(ece, percent),
        f"{percent(floor)} ({percent(quantile)})",
        spread(row.values("gap"), percent, "+"),
        spread(row.values("ece", "temperature_scaled"), percent),
        spread(row.values("nll", "temperature_scaled"), _three),
        spread(row.values("top1", network="teacher"), percent),
        spread(row.values("ece", network="teacher"), percent),
    ]


def spread(values: Sequence[float], written: Callable[[float, str], str], sign: str = "") -> str:
    """Return mean ± standard deviation (n − 1); of one value, itself."""
    mean = written(statistics.mean(values), sign)
    return f"{mean} ± {written(statistics.stdev(values), '')}" if len(values) > 1 else mean


def _three(value: float, sign: str = "") -> str:
    return fixed(value, 3, sign)


def differences(rows: Sequence[Measured], base: str) -> dict[str, dict[str, Difference]]:
    """Return by row how its students differ from those of the row of that name; nothing without that row."""
    first = next((row for row in rows if row.name == base), None)
    others = [row for row in rows if row is not first]
    if first is None:
        return {}
    said = [[run.said["student"] for run in row.runs] for row in (first, *others)]
    return {row.name: found for row, found in zip(others, paired_bootstrap(said), strict=True)}


def difference_line(found: tuple[str, dict[str, Difference]]) -> list[str]:
    """Return a row's cells of its differences."""
    name, of = found
    return [f"`{name}`", in_words(of["top1"], percent), in_words(of["nll"], _three), in_words(of["ece"], percent)]


def in_words(difference: Difference, written: Callable[[float, str], str]) -> str:
    """Return a difference with its interval, marked where that leaves 0 out."""
    value, low, high = (written(end, "+") for end in (difference.value, difference.low, difference.high))
    return f"{value} [{low}, {high}]" + " *" * difference.is_clear


def control(from_base: dict[str, dict[str, Difference]]) -> str:
    """Say whether the study sees what is known: networks that learn from each other beat networks alone."""
    known = f"**Positive control** (mutual learning, `{CONTROL}`, is known to beat `{BASE}`)"
    if CONTROL not in from_base:
        return f"{known}: not there, as records of `{CONTROL}` or of `{BASE}` are missing."
    top1, nll = (from_base[CONTROL][metric] for metric in ("top1", "nll"))
    better = [top1.low > 0, nll.high < 0]
    yes_or_no = ["yes" if one else "no" for one in better]
    seen = "The study sees it." if all(better) else "The study does not see it in both: mind that below."
    figures = f"top-1 {in_words(top1, percent)} points ({yes_or_no[0]}), NLL {in_words(nll, _three)} ({yes_or_no[1]})"
    return f"{known}: {figures}. {seen}"


def goals(rows: Sequence[Measured]) -> str:
    """Say of each goal of the row :data:`OWN` against :data:`BASE` whether it is met, with the figures."""
    named = {row.name: row for row in rows}
    if OWN not in named or BASE not in named:
        return f"**Goals**: not judged, as records of `{OWN}` or of `{BASE}` are missing."
    own, base = named[OWN], named[BASE]
    ece, floor, base_scaled = own.mean("ece"), own.floor[0], base.mean("ece", "temperature_scaled")
    gain, ratio = own.mean("top1") - base.mean("top1"), own.mean("nll") / base.mean("nll")
    nll, base_nll = own.mean("nll"), base.mean("nll", "temperature_scaled")
    teachers = [row.mean("top1", network="teacher") for row in (own, base)]
    judged = [
        (
            ece <= max(base_scaled, floor),
            f"raw ECE {percent(ece)} %, at most `{BASE}`'s T-scaled ECE, {percent(base_scaled)} %, or its own floor, "
            f"{percent(floor)} %",
        ),
        (gain >= LEAST_GAIN, f"top-1 {percent(gain, '+')} points, at least {percent(LEAST_GAIN, '+')}"),
        (ratio <= MOST_NLL_RATIO, f"NLL {ratio:.3f} of `{BASE}`'s, at most {MOST_NLL_RATIO:.2f}"),
        (nll <= base_nll, f"NLL {_three(nll)}, at most `{BASE}`'s T-scaled NLL, {_three(base_nll)}"),
        *(_is_best(rows, own, metric, label) for metric, label in (("nll", "NLL"), ("brier", "Brier"))),
        (
            teachers[0] >= teachers[1],
            f"teacher's top-1 {percent(teachers[0])} %, at least `{BASE}`'s, {percent(teachers[1])} %",
        ),
        *(_is_not_above(own, named[rival]) for rival in RIVALS_IN_ECE if rival in named),
    ]
    lines = [f"- {'met' if met else 'missed'}: {what}" for met, what in judged]
    return "\n".join([f"**Goals** of `{OWN}`, means over seeds:\n", *lines])


def _is_not_above(own: Measured, rival: Measured) -> tuple[bool, str]:
    """Say whether a row's ECE is at most a rival's."""
    ece, of_rival = own.mean("ece"), rival.mean("ece")
    return ece <= of_rival, f"ECE {percent(ece)} %, at most `{rival.name}`'s, {percent(of_rival)} %"


def _is_best(rows: Sequence[Measured], own: Measured, metric: str, label: str) -> tuple[bool, str]:
    """Say whether a row has the lowest metric of those that are trained on images as they are."""
    best = min((row for row in rows if row is not own and not row.is_mixed), key=lambda row: row.mean(metric))
    value, of_best = own.mean(metric), best.mean(metric)
    return value <= of_best, (
        f"{label} {_three(value)}, the lowest without mixup and cutmix; the lowest other, `{best.name}`: "
        f"{_three(of_best)}"
    )
