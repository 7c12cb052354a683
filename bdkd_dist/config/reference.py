"""Every key of a recipe as Markdown: what is allowed, the default and the meaning, as the sections themselves have it.

    .venv/bin/python -m bdkd_dist.config.reference docs/recipe.md

puts the tables, and the list of keys that may change when a run goes on, between the marks of the page, so that no key
there is typed.
"""

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bdkd_dist.config.sections import NOT_IDENTITY, Data, Recipe
from bdkd_dist.objectives import OBJECTIVES, ParameterSchedule

BEGIN, END = "<!-- the keys, by bdkd_dist.config.reference -->\n", "<!-- end -->\n"
BEGIN_CHANGEABLE = "<!-- what may change, by bdkd_dist.config.reference -->\n"
HEAD = "| key | allowed | default | meaning |\n|---|---|---|---|\n"
KINDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true`, `false`",
    ...: "…",
    ParameterSchedule: "schedule",
}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
OBJECTIVE_KEYS = {
    "nu_forward": "ν_f: factor of KL(p_t‖p_s) where the gate boosts it (over-confident student).",
    "nu_reverse": "ν_r: factor of KL(p_s‖p_t) where the gate boosts it (under-confident student).",
    "temperature": "What logits are divided by in the divergences, which are multiplied by its square.",
    "entropy_temperature": "What logits are divided by in the entropies that the gate compares.",
    "ce_weight": "Weight of the cross-entropy in each loss that has one.",
    "student_weight": "Weight of the student's divergences.",
    "teacher_weight": "Weight of the teacher's divergence.",
    "gate": "Whether a sample's boost is switched by the sign of H_s − H_t, or follows it smoothly.",
    "sharpness": "k of the soft gate, per nat; the hard gate does not read it.",
    "teacher_term": "The teacher's divergence: KL(p_s‖p_t); KL(p_t‖p_s); the student's form, networks swapped; none.",
    "weight": "Weight of the divergence: from the teacher, the others (their mean), the ensemble, the winner; of MDCA.",
    "past_share": "Share of a network's own prediction of the epoch before in its targets, up to 1.",
    "gamma_low": "γ where the target's probability is below the threshold.",
    "gamma_high": "γ where it is not.",
    "threshold": "Probability of the target that separates the two, from 0 to 1.",
    "ensemble": "How the ensemble is made of the networks (docs/objectives.md).",
    "skew": "λ: the teacher's share in the mixture that it is compared with.",
    "head_mass": "Probability up to which the teacher's most probable classes are its head.",
    "alpha": "α of the α-β divergence.",
    "beta": "β of the α-β divergence; (α, β) = (1, 0) is KL(p_t‖p_s), (0, 1) is KL(p_s‖p_t).",
}


def filled(page: str) -> str:
    """Return a page with the generated text between its marks."""
    for begin, text in {BEGIN_CHANGEABLE: changeable(), BEGIN: tables()}.items():
        before, mark, rest = page.partition(begin)
        if mark:
            page = f"{before}{begin}\n{text}\n{END}{rest.partition(END)[2]}"
    return page


def changeable() -> str:
    """Return the keys that may change when a run goes on or is evaluated."""
    sections = [f"`{name}*`" for name in NOT_IDENTITY if name.endswith(".")]
    keys = [f"`data.{key}`" for key in Data.model_fields if f"data.{key}".startswith(NOT_IDENTITY)]
    return ", ".join([*sections, *keys]) + "\n"


def tables() -> str:
    """Return a heading and a table for each section."""
    return "\n".join([*_sections(Recipe, ""), _objectives()])


def _sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if section := _section(field.annotation):
            rows = [
                _row(f"{prefix}{name}.{key}", _allowed(of), _default(of), of.description)
                for key, of in section.model_fields.items()
                if not _section(of.annotation)
            ]
            yield f"### `{prefix}{name}`\n\n{_text(section.__doc__)}\n\n{HEAD}{''.join(rows)}"
            yield from _sections(section, f"{prefix}{name}.")


def _objectives() -> str:
    rows = [_row("objective.name", ", ".join(f"`{name}`" for name in OBJECTIVES), "`bdkd`", "Which objective.")]
    parameters = {name: fields(kind) for name, kind in OBJECTIVES.items()}  # type: ignore[arg-type]
    assert {field.name for of in parameters.values() for field in of} == {"name", *OBJECTIVE_KEYS}
    for key, meaning in OBJECTIVE_KEYS.items():
        having = [(name, field.default) for name, of in parameters.items() for field in of if field.name == key]
        names_by_default: dict[Any, list[str]] = {}
        for name, default in having:
            names_by_default.setdefault(default, []).append(f"`{name}`")
        shown = "; ".join(f"{', '.join(names)}: {_value(default)}" for default, names in names_by_default.items())
        rows.append(_row(f"objective.{key}", _kind(get_type_hints(OBJECTIVES[having[0][0]])[key]), shown, meaning))
    text = "An objective has the keys by whose defaults it is named; `ce` and `switokd` have none."
    return f"### `objective`\n\n{text}\n\n{HEAD}{''.join(rows)}"


def _row(key: str, allowed: str, default: str, meaning: str | None) -> str:
    assert meaning, f"{key} has no docstring"
    return f"| `{key}` | {allowed} | {default} | {_text(meaning)} |\n"


def _allowed(field: FieldInfo) -> str:
    limits = [(sign, getattr(one, name, None)) for one in field.metadata for name, sign in BOUNDS.items()]
    bounds = [f"{sign} {limit:,}" for sign, limit in limits if limit is not None]
    return f"{_kind(field.annotation)} {', '.join(bounds)}".strip()


def _kind(annotation: Any) -> str:
    if annotation in KINDS:
        return KINDS[annotation]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"[{', '.join(map(_kind, get_args(annotation)))}]"
    return " or ".join(map(_kind, _members(annotation)))


def _members(annotation: Any) -> list[Any]:
    """Return what a union is of, None left out."""
    members = get_args(annotation) if get_origin(annotation) is types.UnionType else (annotation,)
    return [member for member in members if member is not types.NoneType]


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key is, or None."""
    return next((m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _default(field: FieldInfo) -> str:
    return "to be set" if field.is_required() else _value(field.default)


def _value(value: Any) -> str:
    if isinstance(value, bool | tuple):
        value = str(list(value)) if isinstance(value, tuple) else str(value).lower()
    return "–" if value is None else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _text(docstring: str | None) -> str:
    """Return a docstring as one line of Markdown, with links to the pages that it names."""
    text = (
        re.sub(r":\w+:`([^`]+)`", r"`\1`", " ".join((docstring or "").split())).replace("``", "`").replace("|", r"\|")
    )
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
