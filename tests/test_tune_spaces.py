"""The shipped search spaces: each goes with every shipped recipe, and around the defaults that it starts from."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from bdkd_dist import config
from bdkd_dist.launch.tune.space import load_space
from bdkd_dist.objectives import BDKD, OBJECTIVES

SPACES = Path(__file__).parent.parent / "tune_spaces"
NAMES = ("bdkd_ramp", "bdkd_weighting", "objectives", "optimizer", "weighting_schedule")


def space_of(name: str, recipe: str = "digits") -> Any:
    return load_space(str(SPACES / f"{name}.py"), config.load(recipe))


def parameter(key: str) -> str:
    """The key of an objective's parameter, of which a schedule has parts."""
    return ".".join(key.split(".")[:2]) if key.startswith("objective.") else key


def test_the_spaces_are_all_there() -> None:
    assert {path.stem for path in SPACES.glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("recipe", config.recipe_names())
@pytest.mark.parametrize("name", NAMES)
def test_every_space_goes_with_every_shipped_recipe(name: str, recipe: str) -> None:
    space = space_of(name, recipe)
    base = config.load(recipe)
    for values in space.draws(40, seed=1):
        changed = config.replace(base, values)
        for key, _, _ in config.differences(base, changed):
            # A schedule takes the place of a number, and the other way round.
            of_a_value = any(key == one or f"{one}.".startswith(f"{parameter(key)}.") for one in values)
            assert of_a_value or ("objective.name" in values and key.startswith("objective.")), key


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_the_docstring_names_this_space_and_a_shipped_recipe(name: str) -> None:
    tree = ast.parse((SPACES / f"{name}.py").read_text(encoding="utf-8"))
    command = re.search(r"bdkd tune (\S+) (\S+)", ast.get_docstring(tree) or "")
    assert command is not None
    assert command[1] == f"tune_spaces/{name}.py"
    assert command[2] in config.recipe_names()
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(functions) == {"search_space"}
    assert ast.get_docstring(functions["search_space"])


@pytest.mark.parametrize("name", ["bdkd_weighting", "weighting_schedule"])
def test_bdkds_defaults_lie_inside_the_ranges(name: str) -> None:
    for key, domain in space_of(name).space.items():
        default = getattr(BDKD(), key.removeprefix("objective."))
        assert domain.is_valid(default), key
        if isinstance(default, float):
            assert domain.lower < default < domain.upper, key


def test_the_weighting_searches_eight_parameters_and_logarithmically_where_they_are_numbers() -> None:
    domains = space_of("bdkd_weighting").space
    assert {key.removeprefix("objective.") for key in domains} == {
        *("nu_forward", "nu_reverse", "temperature", "entropy_temperature"),
        *("student_weight", "teacher_weight", "gate", "sharpness"),
    }
    numbers = [domain for domain in domains.values() if hasattr(domain, "lower")]
    assert len(numbers) == 7
    assert {str(domain.get_sampler()) for domain in numbers} == {"LogUniform"}


@pytest.mark.parametrize("recipe", sorted({*config.recipe_names()} - {"digits_few"}))  # 40 images: batches of ten
def test_the_recipes_own_values_lie_inside_the_optimizers_ranges(recipe: str) -> None:
    base = config.flatten(config.load(recipe).to_dict())
    for key, domain in space_of("optimizer", recipe).space.items():
        assert domain.is_valid(base[key]), key


def test_the_grid_is_every_objective_that_trains_both_networks_with_three_seeds() -> None:
    space = space_of("objectives")
    expected = {name for name, objective in OBJECTIVES.items() if objective.teacher_learns}
    drawn = [(values["objective.name"], values["train.seed"]) for values in space.draws(1000, seed=0)]
    assert set(drawn) == {(name, seed) for name in expected for seed in (0, 1, 2)}
    assert space.grid_size() == len(drawn) == 3 * len(expected)
    assert space.defaults == {"search": "grid", "scheduler": "none", "test": "all"}


def test_trials_of_the_grid_differ_in_objective_and_seed_alone() -> None:
    base = config.load("digits")
    flat = config.flatten(base.to_dict())
    for values in space_of("objectives").draws(1000, seed=0):
        changed = config.flatten(config.replace(base, values).to_dict())
        rest = {key for key in flat if not key.startswith("objective.") and key != "train.seed"}
        assert {key: changed[key] for key in rest} == {key: flat[key] for key in rest}


def test_the_schedule_is_trained_as_a_population() -> None:
    space = space_of("weighting_schedule")
    assert space.defaults["scheduler"] == "pbt"
    assert set(space.space) == {
        *("objective.nu_forward", "objective.nu_reverse"),
        *("objective.student_weight", "objective.teacher_weight"),
    }
