"""Recipes read from YAML, dotted overrides, and one line for each mistake in them."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from bdkd_dist.config.sections import Recipe
from bdkd_dist.errors import UserError, nearest, unknown
from bdkd_dist.objectives import OBJECTIVES, ParameterSchedule

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("[!_]*.yaml"))


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides.

    Args:
        recipe: The name of a shipped recipe, or the path of a YAML file.
        overrides: ``section.key=value`` each. Setting ``objective.name`` to another objective drops the recipe's
            parameters of the former one.

    Raises:
        UserError: An unknown recipe or key, or a value that is not allowed.
    """
    return _replaced(_read(recipe), map(_split, overrides))


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a recipe with dotted overrides applied, as :func:`load` applies them."""
    return _replaced(recipe.to_dict(), map(_split, overrides))


def replace(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with values put in by their dotted keys, by the rules of :func:`override`; raises UserError."""
    return _replaced(recipe.to_dict(), values.items())


def _replaced(tree: dict[str, Any], changes: Iterable[tuple[str, Any]]) -> Recipe:
    pairs = list(changes)
    chosen = next((value for key, value in reversed(pairs) if key == "objective.name"), None)
    if chosen is not None:
        tree = _merged(tree, {"objective": {"name": chosen}})
    for key, value in pairs:
        if key.startswith("objective.") and key.count(".") > 1:
            _make_schedule(tree, key)
        _set(tree, key, value)
        if (other := {"models.student": "models.students", "models.students": "models.student"}.get(key)) and value:
            _set(tree, other, None if other == "models.student" else [])
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Recipe:
    """Check nested sections and return the recipe; raises UserError."""
    tree = dict(tree)
    objective = tree.pop("objective", {"name": "bdkd"})
    try:
        parsed = _objective(objective)
        return Recipe.model_validate({**tree, "objective": parsed})
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def _objective(section: Any) -> Any:
    if not isinstance(section, dict):
        raise UserError(f"objective must be a section with a name, not {section!r}")
    name = section.get("name", "bdkd")
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise unknown("objective.name", str(name), OBJECTIVES)
    objective = OBJECTIVES[name]
    numbers = _numbers(objective)
    values = {
        key: _parsed(ParameterSchedule, value, f"objective.{key}.")
        if key in numbers and isinstance(value, dict)
        else value
        for key, value in section.items()
    }
    return _parsed(objective, {**values, "name": name}, "objective.")


def _parsed(kind: type, values: dict[str, Any], prefix: str) -> Any:
    """Return the dataclass with these values; raises UserError that names keys behind the prefix."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(_one_line(error, prefix, [f"{prefix}{name}" for name in _names(kind)])) from None


def _names(kind: Any) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(kind)]


def _numbers(objective: type) -> set[str]:
    """Return the names of an objective's parameters that may be schedules."""
    return {name for name, hint in get_type_hints(objective).items() if ParameterSchedule in get_args(hint)}


def _make_schedule(tree: dict[str, Any], key: str) -> None:
    """Let ``objective.parameter.end=…`` change a plain number: it becomes a schedule that begins and ends with it."""
    parameter = key.split(".")[1]
    section = tree.setdefault("objective", {})
    objective = OBJECTIVES.get(str(section.get("name", "bdkd"))) if isinstance(section, dict) else None
    if objective is None:
        return  # from_dict says so
    if parameter not in _numbers(objective):
        numbers = sorted(_numbers(objective))
        hint, allowed = nearest(parameter, numbers), ", ".join(numbers) or "none of this objective"
        raise UserError(f"{key}: {parameter} is no number that may change over training{hint} (allowed: {allowed})")
    now = section.get(parameter, getattr(objective, parameter))
    if isinstance(now, ParameterSchedule):
        section[parameter] = dataclasses.asdict(now)
    elif not isinstance(now, dict):
        section[parameter] = {"start": now, "end": now}


def _read(recipe: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    shipped = RECIPES / f"{recipe}.yaml"
    path = shipped if shipped.is_file() else Path(recipe)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or "/" in recipe:
            raise UserError(f"recipe file {recipe} does not exist")
        raise unknown("recipe", recipe, recipe_names())
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no sections (allowed: {', '.join(Recipe.model_fields)})")
    if isinstance(run := tree.setdefault("run", {}), dict):
        run.setdefault("name", path.stem)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if str(base) in (*above, recipe):
        raise UserError(f"{path}: base={base} leads back to where it began")
    return _merged(_read(str(base), (*above, recipe)), tree)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the keys of ``above`` put over it, section by section.

    An objective of another name takes none of the former one's parameters.
    """
    merged = dict(below)
    former, chosen = below.get("objective"), above.get("objective")
    if isinstance(former, dict) and isinstance(chosen, dict):
        name = former.get("name", "bdkd")
        if chosen.get("name", name) != name:
            merged["objective"] = {}
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"'{override}' is not key=value, e.g. train.epochs=5")
    if text.lower() == "null" or (text.lower() == "none" and "none" not in get_args(_annotations().get(key))):
        return key, None
    if text[:1] in ("[", "{"):
        try:
            return key, yaml.safe_load(text)
        except yaml.YAMLError:
            example = "[resnet8,resnet20]" if key == "models.students" else "[150,180]"
            kind = f"a list, e.g. {example}" if text[0] == "[" else "a section, e.g. {start: 0, end: 1}"
            raise UserError(f"{key}: '{text}' is not {kind}") from None
    return key, text  # pydantic reads the text by the key's type


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    if not sections and key in Recipe.model_fields:
        first = "name" if key == "objective" else next(k for k in _keys() if k.startswith(f"{key}.")).partition(".")[2]
        raise UserError(f"{key} is a section; set its keys, e.g. {key}.{first}={value}")
    if not sections:
        raise unknown("recipe key", key, _keys())
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise unknown("recipe key", key, _keys())
        tree = child
    tree[last] = value


def _keys() -> list[str]:
    """Every dotted key that a recipe may hold."""
    return list(_annotations())


def _annotations() -> dict[str, Any]:
    """What a recipe may hold, by dotted key."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from walk(inner, f"{prefix}{name}.")
            elif name != "objective":
                yield f"{prefix}{name}", inner

    parameters: dict[str, Any] = {}
    for objective in OBJECTIVES.values():
        hints = get_type_hints(objective)
        parameters |= {f"objective.{name}": hints[name] for name in _names(objective)}
    return dict(walk(Recipe, "")) | dict(sorted(parameters.items()))


def _one_line(error: ValidationError, prefix: str = "", siblings: Sequence[str] = ()) -> str:
    """Return the first complaint of pydantic as: key, value, what is allowed, nearest right spelling.

    Args:
        error: Of pydantic.
        prefix: What stands before its keys.
        siblings: The keys of the section that it is about; by default those of the recipe's section.
    """
    by_key: dict[str, Any] = {}
    for complaint in error.errors():  # of a number or schedule there is one for each
        parts = [str(part) for part in complaint["loc"] if part not in ("float", ParameterSchedule.__name__)]
        by_key.setdefault(prefix + ".".join(parts), complaint)
    (key, first), *rest = by_key.items()
    more = f" (and {len(rest)} more)" if rest else ""
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section = key.rpartition(".")[0]
        siblings = siblings or ([k for k in _keys() if k.rpartition(".")[0] == section] if section else [])
        hint = nearest(key, siblings) or nearest(key, _keys())
        allowed = ", ".join(k.rpartition(".")[2] for k in siblings) or ", ".join(Recipe.model_fields)
        return f"unknown recipe key '{key}'{hint} (allowed: {allowed}){more}"
    if first["type"] == "missing":
        return f"the recipe does not set {key}{more}"
    if first["type"] == "value_error":
        return (f"{key}: " if first["loc"] else prefix) + message + more
    value = first["input"]
    if first["type"] == "tuple_type":
        return f"{key}={value}: give a list in brackets, e.g. {key}=[{value}]{more}"
    if first["type"] == "literal_error" and isinstance(value, str):
        more = nearest(value, re.findall("'([^']+)'", first["ctx"]["expected"])) + more
    shown = f"={value}" if isinstance(value, str | int | float | bool | list | tuple) or value is None else ""
    return f"{key}{shown}: {message[0].lower()}{message[1:]}{more}"
