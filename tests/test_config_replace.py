"""Values put into a recipe by dotted keys: what the command line's overrides do, without their text."""

from typing import Any

import pytest

from bdkd_dist import config
from bdkd_dist.errors import UserError


@pytest.mark.parametrize(
    ("values", "overrides"),
    [
        ({"train.epochs": 5}, ["train.epochs=5"]),
        ({"optimizer.lr": 0.003, "optimizer.nesterov": False}, ["optimizer.lr=3e-3", "optimizer.nesterov=false"]),
        ({"optimizer.clip_grad_norm": None}, ["optimizer.clip_grad_norm=none"]),
        ({"schedule.milestones": [3, 4]}, ["schedule.milestones=[3,4]"]),
        ({"schedule.milestones": (3, 4)}, ["schedule.milestones=[3,4]"]),
        ({"train.batch_size": 128.0}, ["train.batch_size=128"]),
        ({"data.augment.cutout_px": 8}, ["data.augment.cutout_px=8"]),
        ({"objective.gate": "soft", "objective.nu_forward": 3}, ["objective.gate=soft", "objective.nu_forward=3"]),
        ({"objective.name": "dml"}, ["objective.name=dml"]),
        ({"objective.temperature": 3.0, "objective.name": "jsd"}, ["objective.temperature=3", "objective.name=jsd"]),
        ({"models.students": ["resnet8", "resnet14"]}, ["models.students=[resnet8,resnet14]"]),
        ({}, []),
    ],
)
def test_values_do_what_the_same_overrides_do(values: dict[str, Any], overrides: list[str]) -> None:
    recipe = config.load("digits", ["objective.nu_reverse=4"])
    before = recipe.to_dict()
    assert config.replace(recipe, values) == config.override(recipe, overrides)
    assert recipe.to_dict() == before


def test_values_reach_the_recipe() -> None:
    recipe = config.replace(config.load("digits"), {"objective.nu_forward": 2.5, "train.seed": 3})
    assert (recipe.objective.nu_forward, recipe.train.seed) == (2.5, 3)


def test_another_objective_drops_the_former_ones_parameters_and_the_same_one_keeps_them() -> None:
    recipe = config.load("digits", ["objective.nu_reverse=4"])
    assert config.replace(recipe, {"objective.name": "bdkd"}).objective.nu_reverse == 4
    changed = config.replace(recipe, {"objective.name": "jeffreys"})
    assert changed.objective.name == "jeffreys"
    assert config.replace(changed, {"objective.name": "bdkd"}).objective.nu_reverse == 2


def test_one_student_replaces_several_and_the_reverse() -> None:
    several = config.replace(config.load("digits"), {"models.students": ["resnet8", "resnet14"]})
    assert several.models.by_role == {"teacher": "resnet20", "student_1": "resnet8", "student_2": "resnet14"}
    single = config.replace(several, {"models.student": "resnet14"})
    assert single.models.by_role == {"teacher": "resnet20", "student": "resnet14"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"objective.nu_forwrd": 2.0}, ["objective.nu_forwrd", "did you mean 'objective.nu_forward'"]),
        ({"optimizr.lr": 0.1}, ["optimizr", "did you mean"]),
        ({"epochs": 3}, ["epochs", "train.epochs"]),
        ({"train": 3}, ["train is a section"]),
        ({"optimizer.lr": -0.5}, ["optimizer.lr=-0.5", "greater than 0"]),
        ({"train.epochs": 2.5}, ["train.epochs=2.5", "integer"]),
        ({"optimizer.lr": "fast"}, ["optimizer.lr=fast", "number"]),
        ({"objective.name": "dml", "objective.nu_forward": 2.0}, ["objective.nu_forward"]),
    ],
)
def test_a_wrong_value_is_one_line(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.replace(config.load("digits"), values)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
