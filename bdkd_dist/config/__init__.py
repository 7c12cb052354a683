"""Everything a user may set: one pydantic model per section, units in names; recipes and dotted overrides.

A recipe is a YAML file with the sections of :class:`Recipe`. ``load("digits", ["train.epochs=5"])`` reads the
shipped recipe of that name (or a YAML file), applies the overrides, each parsed by its key's type, and checks all.
Every mistake raises :class:`~bdkd_dist.errors.UserError` with one line.
"""

from bdkd_dist.config.places import PLACES, absolute_place, places, with_absolute_paths
from bdkd_dist.config.reading import from_dict, load, override, recipe_names, replace
from bdkd_dist.config.sections import (
    NOT_IDENTITY,
    Augmentation,
    Data,
    Launch,
    Models,
    Optimizer,
    Recipe,
    Run,
    Schedule,
    Train,
    differences,
    flatten,
    last_name,
)

__all__ = [
    "NOT_IDENTITY",
    "PLACES",
    "Augmentation",
    "Data",
    "Launch",
    "Models",
    "Optimizer",
    "Recipe",
    "Run",
    "Schedule",
    "Train",
    "absolute_place",
    "differences",
    "flatten",
    "from_dict",
    "last_name",
    "load",
    "override",
    "places",
    "recipe_names",
    "replace",
    "with_absolute_paths",
]
