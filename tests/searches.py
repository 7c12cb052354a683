"""Searches by the real command line, small enough for tests."""

import json
from pathlib import Path
from typing import Any

from runs import BDKD, SMALL

TINY = [*SMALL, "data.train_limit=130", "train.epochs=3", "train.checkpoint_every_steps=null", "models.teacher=resnet8"]
"""Three epochs of three steps: of a trial Ray's own part is the larger."""

RANGES = """
from ray import tune

def search_space():
    return {"objective.nu_forward": tune.loguniform(0.5, 8), "objective.gate": tune.choice(["hard", "soft"])}
"""


def grid(**values: list[Any]) -> str:
    """Return a space file whose values are tried all; ``lr=[…]`` is ``optimizer.lr``, ``seed`` ``train.seed``."""
    keys = {"lr": "optimizer.lr", "seed": "train.seed", "nu": "objective.nu_forward", "name": "objective.name"}
    lines = [f"        {keys[name]!r}: tune.grid_search({list(listed)!r})," for name, listed in values.items()]
    return "\n".join(["from ray import tune", "", "def search_space():", "    return {", *lines, "    }", ""])


def command(space: Path, cache: Path, storage: Path | str, *words: str, name: str = "search") -> list[str]:
    """Return a search's command line; ``words`` are options and overrides."""
    places = [f"data.prepared={cache}", f"run.storage={storage}", f"run.name={name}"]
    return [str(BDKD), "tune", str(space), "digits", *TINY, *places, *words]


def records(search: Path) -> list[dict[str, Any]]:
    """Return the records of a search's trials, by number."""
    return [json.loads(path.read_text()) for path in sorted(search.glob("trials/*/trial.json"))]
