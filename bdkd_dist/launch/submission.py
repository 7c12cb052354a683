"""A command line that is to run as a job elsewhere: what would go wrong there is said here."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bdkd_dist import config
from bdkd_dist.config import Recipe
from bdkd_dist.config.reading import RECIPES
from bdkd_dist.errors import UserError, unknown
from bdkd_dist.launch.prepare import NAMED
from bdkd_dist.launch.source_package import source_files
from bdkd_dist.launch.tune.space import load_space
from bdkd_dist.uris import has_secret, shown

COMMANDS = ("train", "tune", "evaluate", "compare", "prepare", "doctor")


def check(arguments: Sequence[str], parameters: dict[str, Any], folder: Path) -> None:
    """See here what would go wrong there.

    Args:
        arguments: The command line that a job is to run, its command first.
        parameters: The values of its parameters, by name.
        folder: Whose source tree will travel.

    Raises:
        UserError: Something that the job could not do, or what it must not carry.
    """
    for word in arguments:
        key, equals, value = word.partition("=")
        if secret := next(filter(has_secret, (word, value)), None):
            raise UserError(
                f"{key + equals if secret == value else ''}{shown(secret)} holds a secret key, which the cluster's "
                "dashboard would show; set it in the environment of the cluster's nodes"
            )
    match arguments[0]:
        case "train":
            _check_recipe(parameters, folder)
        case "tune":
            recipe = _check_recipe(parameters, folder)
            for key, place in load_space(parameters["space"], recipe).relative_paths:
                _check_place(key, place)
            _check_travels("space", Path(parameters["space"]), folder, source_files(folder))
        case "evaluate":
            _check_place("RUN", parameters["run_path"])
        case "compare":
            for run in parameters["runs"]:
                _check_place("RUN", run)
            _check_place("OUT", parameters["out"])
        case "prepare":
            _check_place("SOURCE", None if parameters["source"] in NAMED else parameters["source"])
            _check_place("OUT", parameters["out"])


def command_of(arguments: Sequence[str]) -> str:
    """Return which command a job is to run; raises UserError for one that is none for a job."""
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        raise unknown("command for a job", command, COMMANDS)
    return command


def _check_place(name: str, place: str | Path | None) -> None:
    """A job runs in a copy of the source tree, deleted after it: what it is to find there or to keep lies elsewhere."""
    if place is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/|[/~]", str(place)) is None:
        raise UserError(
            f"{name}={place}: a job's own folder is deleted after it and holds no data; give an absolute path or a URI "
            "that all nodes reach"
        )


def _check_recipe(parameters: dict[str, Any], folder: Path) -> Recipe:
    _check_recipe_file(parameters["recipe"], folder)
    recipe = config.load(parameters["recipe"], parameters["overrides"] or ())
    for key, place in config.places(recipe).items():
        _check_place(key, place)
    return recipe


def _check_recipe_file(recipe: str, folder: Path) -> None:
    """Raise UserError where a recipe, or one that it builds on, is a file that does not travel."""
    files, seen = source_files(folder), set[str]()
    while recipe and recipe not in seen and not (RECIPES / f"{recipe}.yaml").is_file():
        seen.add(recipe)
        path = Path(recipe)
        _check_travels("recipe", path, folder, files)
        recipe = str(_tree(path).get("base") or "")


def _check_travels(kind: str, path: Path, folder: Path, files: dict[str, Path]) -> None:
    if path.is_file() and (path.is_absolute() or os.path.normpath(path) not in files):
        raise UserError(
            f"{kind} {path} does not travel with the job; put it into {folder} (not hidden, not ignored by git) "
            "and give its path from there"
        )


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # said by who reads it in earnest
    return tree if isinstance(tree, dict) else {}
