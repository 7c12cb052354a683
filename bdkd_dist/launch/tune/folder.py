"""A search's folder: what the search is, and the records of its trials."""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import yaml

from bdkd_dist import config
from bdkd_dist.config import Recipe
from bdkd_dist.data.sources.storage import in_parallel
from bdkd_dist.engine.patience import patiently
from bdkd_dist.errors import UserError, first_line
from bdkd_dist.launch.lease import LEASE
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.records.trials import Trial

SEARCH = "search.yaml"
TRIALS = "trials"
RECORD = "trial.json"
TAKEN = "taken.json"
"""What a trial took over from another one last, and the values that it got with that; written by the trial."""


class SearchFolder:
    """Keeps a search: the truth that it goes on from. The driver alone writes here; trials write in their run folders.

    Args:
        folder: ``run.storage/run.name`` of the search.
        say: Told one line when the storage refuses.

    Attributes:
        notes: When the search ``began``, when it ``ended`` last, and the ``device`` that trials held, CPU or GPU.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], None]):
        self.folder, self._say = folder, say
        self.notes: dict[str, str] = {}

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def trials_storage(self) -> str:
        """Where the run folders of trials are: the ``run.storage`` of each."""
        return (self.folder / TRIALS).where

    def check_owner(self, recipe: Recipe, identity: dict[str, Any]) -> None:
        """Raise UserError where the folder holds another search, or something else; the number of trials may grow.

        Args:
            recipe: The one that is varied.
            identity: What else makes the search, by name.
        """
        place = self.folder.place
        if (content := place.find(SEARCH)) is None:
            if place.exists("recipe.yaml") or (place.is_folder() and _names(place)):
                raise UserError(f"run.name: {self} exists and holds no search; choose another run.name")
            return
        try:
            there = yaml.safe_load(content)
            recipe_there = config.from_dict(there.pop("recipe"))
            self.notes = dict(there.get("notes", {}))
        except (UserError, yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{self}/{SEARCH} does not fit this version: {' '.join(str(error).split())}") from None
        for key, value in identity.items():
            if there.get(key) != value:
                one, other = ("other lines", "these") if key == "space" else (there.get(key), value)
                raise UserError(
                    f"{self} holds another search ({key.replace('_', '-')} is {one} there, {other} here); "
                    "choose another run.name"
                )
        for key, one, other in config.differences(recipe_there, recipe):
            raise UserError(
                f"{self} holds another search ({key} is {one} there, {other} here); choose another run.name"
            )

    def describe(self, recipe: Recipe, identity: dict[str, Any], device: str | None = None) -> None:
        """Write what the search is, and what is noted of it; the beginning stays what it was when it goes on.

        Args:
            recipe: The one that is varied.
            identity: What else makes the search, by name.
            device: What trials held, once they have ended.
        """
        now = f"{datetime.now():%Y-%m-%d %H:%M}"
        self.notes = {"began": now, "ended": now} | self.notes
        if device is not None:
            self.notes |= {"ended": now, "device": device}
        tree = {**identity, "notes": self.notes, "recipe": recipe.to_dict()}
        self.write(SEARCH, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())

    def trials(self) -> list[Trial]:
        """Return the records of all trials so far, by number."""
        place = self.folder.place / TRIALS
        if not place.is_folder():
            return []
        _, names = patiently(place.listing, self._say)
        contents = in_parallel(lambda name: patiently(lambda: place.find(f"{name}/{RECORD}"), self._say), names)
        found = [
            self._read(name, content) for name, content in zip(names, contents, strict=True) if content is not None
        ]
        trials = {trial.number: trial for trial in sorted(found, key=lambda trial: trial.number)}
        for trial in trials.values():
            if trial.status == "running" and (mark := place.find(f"{trial.name}/{TAKEN}")) is not None:
                self._catch_up(trial, trials, json.loads(mark))
        return list(trials.values())

    def _catch_up(self, trial: Trial, trials: dict[int, Trial], mark: dict[str, Any]) -> None:
        """Bring a record to what the trial has taken over since its last report."""
        if mark["taken"] != trial.taken:
            trial.take_over(trials[mark["taken"]["number"]], mark["taken"]["epoch"])
            trial.values = mark["values"]

    def _read(self, name: str, content: bytes) -> Trial:
        try:
            return Trial.from_json(content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self}/{TRIALS}/{name}/{RECORD} does not fit this version: {first_line(error)}") from None

    def record(self, trial: Trial) -> None:
        """Write a trial's record as it stands."""
        self.write(f"{TRIALS}/{trial.name}/{RECORD}", trial.to_json())

    def run(self, trial: Trial) -> RunFolder:
        """Return a trial's run folder."""
        return self.folder / f"{TRIALS}/{trial.name}"

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the search, whole or not at all."""
        patiently(lambda: self.folder.place.write(name, content), self._say)


def _names(place: Any) -> Sequence[str]:
    files, folders = place.listing()
    return [name for name in (*(file.path for file in files), *folders) if name != LEASE]
