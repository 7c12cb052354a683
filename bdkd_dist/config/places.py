"""The keys of a recipe that name places, by path or URI."""

from pathlib import Path
from typing import Any

from bdkd_dist.config.sections import Recipe
from bdkd_dist.uris import is_uri

PLACES = ("run.storage", "data.root", "data.prepared", "data.stage_folder", "models.teacher_checkpoint")


def places(recipe: Recipe) -> dict[str, str]:
    """Return the places that a recipe names, by dotted key."""
    values = {key: getattr(getattr(recipe, section), name) for key in PLACES for section, name in [key.split(".")]}
    return {key: place for key, place in values.items() if place is not None}


def absolute_place(place: str) -> str:
    """Return a path as it is called from any working directory; a URI is."""
    return place if is_uri(place) else str(Path(place).expanduser().absolute())


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe for processes that work in another directory."""
    changes: dict[str, dict[str, Any]] = {}
    for key, place in places(recipe).items():
        section, name = key.split(".")
        changes.setdefault(section, {})[name] = absolute_place(place)
    return recipe.model_copy(
        update={section: getattr(recipe, section).model_copy(update=values) for section, values in changes.items()}
    )
