"""docs/recipe.md has every key that a recipe may hold, as the sections say it."""

import re
from dataclasses import fields
from pathlib import Path

from bdkd_dist import config
from bdkd_dist.config import reference
from bdkd_dist.objectives import OBJECTIVES

PAGE = Path(__file__).parents[1] / "docs/recipe.md"


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert reference.filled(page) == page, "run .venv/bin/python -m bdkd_dist.config.reference docs/recipe.md"
    assert reference.tables() in page
    assert reference.changeable() in page


def test_every_key_has_a_row_and_no_other() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|", reference.tables(), re.MULTILINE)
    resize = [f"data.resize.{name}" for name in ("start_px=32", "end_px=64", "to_epoch=5")]
    keys = config.flatten(config.load("digits", resize).to_dict()).keys()
    parameters = {f"objective.{field.name}" for kind in OBJECTIVES.values() for field in fields(kind)}
    assert sorted(rows) == sorted(keys | parameters)


def test_rows_say_what_is_allowed_the_default_and_the_meaning() -> None:
    tables = reference.tables()
    for row in (
        "| `optimizer.lr` | number > 0 | to be set | Learning rate of all networks, before the schedule's factor. |",
        "| `data.augment.flip` | `true`, `false` | `true` | Mirror left and right with probability ½. |",
        "| `launch.placement` | `pack`, `spread` | `pack` | Workers on as few nodes as possible, or on as many. |",
        "| `objective.weight` | number or schedule | `kd`: `0.9`; `dml`, `kdcl`, `competitive`, `mdca`: `1` | Weight ",
    ):
        assert row in tables


def test_what_is_said_to_be_changeable_is_what_recipes_are_not_told_apart_by() -> None:
    keys = config.flatten(config.load("digits").to_dict())
    said = re.findall(r"`([\w.]+)\*?`", reference.changeable())
    assert {key for key in keys if key.startswith(tuple(said))} == {
        key for key in keys if key.startswith(config.NOT_IDENTITY)
    }


def test_what_lies_outside_the_marks_stays() -> None:
    page = f"# Page\nbefore\n{reference.BEGIN}old\n{reference.END}after\n"
    assert reference.filled(page) == f"# Page\nbefore\n{reference.BEGIN}\n{reference.tables()}\n{reference.END}after\n"
