"""Runs side by side: which of them are one method, what each method reaches on the test images, how sure that is."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from bdkd_dist.config import NOT_IDENTITY, Recipe, flatten
from bdkd_dist.engine.observer import NetworkDiagnosis
from bdkd_dist.errors import UserError, first_line
from bdkd_dist.metrics import Reliability
from bdkd_dist.metrics.bins import NUM_BINS
from bdkd_dist.records.comparison_bootstrap import Difference, Said, bins, paired_bootstrap
from bdkd_dist.records.results import read_results
from bdkd_dist.records.wording import METRICS, short_names, students_first, value_text

SEED = "train.seed"
TEACHER = "models.teacher_checkpoint"
FINGERPRINT = "data.fingerprint"
"""Stands beside a recipe's keys: of the images, where the run's results say it (earlier versions' do not)."""
STORING = ("data.max_side_px", "data.jpeg_quality")
"""What makes other files of the same images."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    name: str
    """What a person calls its folder."""
    recipe: dict[str, Any]
    """Resolved, by dotted key, with :data:`FINGERPRINT`."""
    results: dict[str, dict[str, Any]]
    """Of the test split, by network; see :func:`bdkd_dist.engine.evaluate.calibrated`."""
    epochs: int
    index: np.ndarray
    """(N,) of the test images, ascending."""
    label: np.ndarray
    said: dict[str, Said]
    """By network."""
    class_names: list[str]
    teacher: dict[str, Any] | None = None
    """The recipe, as the run's own, of the run whose finished teacher taught it, where that is known."""
    test_fingerprint: str | None = None
    """Of the test images' files; None of earlier versions' runs."""

    @classmethod
    def read(
        cls, name: str, recipe: Recipe, results: Path, predictions: Path, teacher: dict[str, Any] | None = None
    ) -> "Run":
        """Read what a run left.

        Args:
            name: What a person calls it.
            recipe: The resolved one.
            results: Its ``results.json``.
            predictions: Its ``predictions/test.parquet``.
            teacher: What :func:`described` returns of the run at ``models.teacher_checkpoint``, where that is known.

        Raises:
            UserError: A file is damaged, or of another version.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            measured = read_results(results)
            test, epochs = measured["test"], int(measured["epochs"])
            _check_measured(test)
            own, tested_on = described(recipe, measured), measured.get("data", {}).get("test_fingerprint")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(_unreadable(name, "results.json", error)) from None
        try:
            table = pq.read_table(predictions)
            label = table["label"].to_numpy()
            said = {network: _said(table, network, label) for network in test}
            class_names = json.loads(table.schema.metadata[b"class_names"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise UserError(_unreadable(name, "predictions/test.parquet", error)) from None
        index = table["index"].to_numpy()
        return cls(name, own, test, epochs, index, label, said, class_names, teacher, tested_on)

    @property
    def seed(self) -> int:
        """The training's."""
        return self.recipe[SEED]


def described(recipe: Recipe, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's recipe by dotted key, with :data:`FINGERPRINT` where its results say it."""
    fingerprint = results.get("data", {}).get("fingerprint")
    return flatten(recipe.to_dict()) | ({} if fingerprint is None else {FINGERPRINT: fingerprint[:12]})


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seeds alone."""

    key: str
    """A letter that stands for it in figures and columns."""
    label: str
    """In what it differs from the other methods."""
    runs: tuple[Run, ...]

    @property
    def networks(self) -> list[str]:
        """Students first."""
        return students_first(self.runs[0].results)

    def values(self, network: str, metric: str, kind: str = "raw") -> np.ndarray:
        """Return a metric of each run.

        Args:
            network: One of :attr:`networks`.
            metric: Of :meth:`bdkd_dist.metrics.CalibrationState.compute`.
            kind: ``raw`` or ``temperature_scaled``.
        """
        return np.array([run.results[network][kind][metric] for run in self.runs], float)

    def temperatures(self, network: str) -> np.ndarray:
        """Return the temperature of each run, fitted on its validation images."""
        return np.array([run.results[network]["temperature"] for run in self.runs], float)

    def reliability(self, network: str) -> NetworkDiagnosis:
        """Return the bins over the test images of all runs together, and the top-1 and ECE of that pool."""
        said = [run.said[network] for run in self.runs]
        return pooled(np.concatenate([s.confidence for s in said]), np.concatenate([s.correct for s in said]))

    def by_class(self, network: str) -> tuple[np.ndarray, np.ndarray]:
        """Return accuracy and mean confidence on the images of each class, means over runs; nan without images."""
        each = [_by_class(run, run.said[network]) for run in self.runs]
        accuracy, confidence = np.mean(each, axis=0)
        return accuracy, confidence


@dataclass(frozen=True)
class Comparison:
    """Methods side by side; the first is what the others are held against."""

    methods: tuple[Method, ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Comparison":
        """Tell the methods apart, in the order of their first runs.

        Raises:
            UserError: The runs are of different data.
        """
        assert runs, "nothing to compare"
        _check_same_data(runs)
        groups: dict[str, list[Run]] = defaultdict(list)
        identity_of: dict[str, dict[str, Any]] = {}
        for run, identity in zip(runs, _identities(runs), strict=True):
            key = json.dumps(identity, sort_keys=True)
            identity_of[key] = identity
            groups[key].append(run)
        labels = method_labels(list(identity_of.values())) or [PurePath(runs[0].name).name]
        methods = zip(labels, groups.values(), strict=True)
        return cls(tuple(Method(_letter(n), label, tuple(group)) for n, (label, group) in enumerate(methods)))

    @property
    def runs(self) -> list[Run]:
        """All of them, method by method."""
        return [run for method in self.methods for run in method.runs]

    @property
    def networks(self) -> list[str]:
        """Those of any method, students first."""
        return students_first({name for method in self.methods for name in method.networks})

    @property
    def students(self) -> list[str]:
        """All but the teacher."""
        return [name for name in self.networks if name != "teacher"]

    def having(self, network: str) -> list[Method]:
        """Return the methods that train such a network."""
        return [method for method in self.methods if network in method.networks]

    @property
    def repeated(self) -> list[tuple[str, str]]:
        """Pairs of runs of one recipe and one seed, their teachers' too: what parts them is no choice of the seed."""
        first: dict[tuple[str, int, int | None], str] = {}
        pairs = []
        for method in self.methods:
            for run in method.runs:
                of_teacher = None if run.teacher is None else run.teacher[SEED]
                earlier = first.setdefault((method.key, run.seed, of_teacher), run.name)
                if earlier != run.name:
                    pairs.append((earlier, run.name))
        return pairs

    @cached_property
    def other_files(self) -> list[str]:
        """Say of which runs the test images' files are not those of the first run that knows its own."""
        known = [run for method in self.methods for run in method.runs if run.test_fingerprint is not None]
        return [
            f"{run.name} was tested on other files than {known[0].name}: on other images, or on the same ones stored "
            "in another way"
            for run in known
            if run.test_fingerprint != known[0].test_fingerprint
        ]

    def same_images(self, method: Method) -> bool:
        """Whether a method's runs were tested on the images, by place and label, that the first method's were."""
        first = self.methods[0].runs[0]
        return all(
            np.array_equal(first.index, run.index) and np.array_equal(first.label, run.label)
            for run in (*self.methods[0].runs, *method.runs)
        )

    @cached_property
    def differences(self) -> dict[tuple[str, str], dict[str, Difference]]:
        """By (method's key, student), the difference from the first method in each of :data:`DIFFERENCES`.

        Only of students that both have, and of methods tested on the same images; see :func:`paired_bootstrap`.
        """
        first = self.methods[0]
        comparable = [method for method in self.methods[1:] if self.same_images(method)]
        found: dict[tuple[str, str], dict[str, Difference]] = {}
        for student in (name for name in first.networks if name != "teacher"):
            others = [method for method in comparable if student in method.networks]
            said = [[run.said[student] for run in method.runs] for method in (first, *others)]
            for method, difference in zip(others, paired_bootstrap(said), strict=True):
                found[method.key, student] = difference
        return found


def _identities(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return what each run computes, but for seeds: finished teachers of one recipe go by the first one's name."""
    first: dict[str, str] = {}
    teachers = iter(_computed([run.teacher for run in runs if run.teacher is not None]))
    recipes = []
    for run in runs:
        taught = {}
        if run.teacher is not None:
            taught[TEACHER] = first.setdefault(json.dumps(next(teachers), sort_keys=True), run.recipe[TEACHER])
        recipes.append(run.recipe | taught)
    return _computed(recipes)


def _computed(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each recipe computes; where its data are not known, they are those of the first like it."""
    left_out = (*NOT_IDENTITY, SEED, FINGERPRINT)
    computed = [{key: value for key, value in recipe.items() if not key.startswith(left_out)} for recipe in recipes]
    rest = [json.dumps(one, sort_keys=True) for one in computed]
    data: dict[str, str] = {}
    for key, recipe in zip(rest, recipes, strict=True):
        if FINGERPRINT in recipe:
            data.setdefault(key, recipe[FINGERPRINT])
    for one, key, recipe in zip(computed, rest, recipes, strict=True):
        if key in data:
            one[FINGERPRINT] = recipe.get(FINGERPRINT, data[key])
    return computed


def method_labels(identities: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each recipe, by dotted key, in what it differs from the others; nothing where there is but one.

    An objective's parameters, and what its teacher began as, are told among those of the same objective: between two
    objectives the name says it. So are data among those of the same storing.
    """
    if len(identities) == 1:
        return []
    differing = [list(_differing(own, identities)) for own in identities]
    keys = sorted({key for own in differing for key in own})
    shown = short_names(keys)
    if len(keys) > 1:
        shown["objective.name"] = ""  # the name speaks for itself
    parts = []
    for own, named in zip(identities, differing, strict=True):
        set_there = [key for key in named if own[key] not in (None, [])] or named
        parts.append(", ".join(f"{shown[key]} {_value(own[key])}".strip() for key in set_there))
    return parts


def _differing(own: Mapping[str, Any], identities: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the keys that tell a recipe from any other one, the objective's first."""
    for key in sorted(own, key=lambda key: (key != "objective.name", not key.startswith("objective."))):
        of_objective = key == TEACHER or (key.startswith("objective.") and key != "objective.name")
        others = [i for i in identities if not of_objective or i["objective.name"] == own["objective.name"]]
        if key == FINGERPRINT:
            others = [i for i in others if key in i and all(i[by] == own[by] for by in STORING)]
        if any(key not in other or other[key] != own[key] for other in others):
            yield key


def _value(value: Any) -> str:
    match value:
        case None:
            return "none"
        case str():
            return PurePath(value).name or value
        case list() | tuple():
            return f"[{','.join(map(_value, value))}]"
    return value_text(value)


def pooled(confidence: np.ndarray, correct: np.ndarray) -> NetworkDiagnosis:
    """Return the reliability diagram of (N,) samples, in the bins of :class:`bdkd_dist.metrics.CalibrationState`."""
    bin_of = bins(confidence)
    count, right, sure = (np.bincount(bin_of, w, NUM_BINS) for w in (None, correct, confidence))
    total = len(bin_of) or math.nan
    metrics = {"top1": float(correct.sum()) / total, "ece": float(np.abs(sure - right).sum()) / total}
    return NetworkDiagnosis(metrics, Reliability.of(*map(torch.from_numpy, (count, right, sure))))


def _by_class(run: Run, said: Said) -> tuple[np.ndarray, np.ndarray]:
    classes = len(run.class_names)
    with np.errstate(invalid="ignore"):
        count = np.bincount(run.label, minlength=classes)
        return (
            np.bincount(run.label, said.correct, classes) / count,
            np.bincount(run.label, said.confidence, classes) / count,
        )


def _said(table: Any, network: str, label: np.ndarray) -> Said:
    column = table[f"{network}_top5"].combine_chunks()
    first = column.flatten().to_numpy().reshape(len(label), -1)[:, 0] if len(label) else label
    confidence, nll = (table[f"{network}_{what}"].to_numpy() for what in ("confidence", "nll"))
    return Said(confidence.astype(float), (first == label).astype(float), nll.astype(float))


def _check_measured(test: Mapping[str, Any]) -> None:
    """Raise KeyError or TypeError where results lack what is compared."""
    for network in test.values():
        float(network["temperature"])
        for kind in ("raw", "temperature_scaled"):
            for metric in METRICS:
                float(network[kind][metric])


def _unreadable(name: str, file: str, error: Exception) -> str:
    return f"{name}/{file} cannot be read ({type(error).__name__}: {first_line(error)}); bdkd evaluate writes it anew"


def _check_same_data(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        both = f"{run.name} and {first.name} are of different data"
        for key in ("data.dataset", "data.num_classes"):
            if run.recipe[key] != first.recipe[key]:
                raise UserError(f"{both}: {key} is {run.recipe[key]} there, {first.recipe[key]} here")
        for number, (there, here) in enumerate(zip(run.class_names, first.class_names, strict=True)):
            if there != here:
                raise UserError(f"{both}: class {number} is '{there}' there, '{here}' here")


def _letter(number: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    above, own = divmod(number, 26)
    return (_letter(above - 1) if above else "") + chr(ord("A") + own)
