"""Search spaces: Python files whose ``search_space()`` says which of a recipe's values a search may choose, and how."""

import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bdkd_dist import config
from bdkd_dist.config import Recipe, last_name
from bdkd_dist.errors import UserError, first_line, nearest, unknown
from bdkd_dist.objectives import OBJECTIVES

DEFAULTS: dict[str, type] = {"goal": str, "search": str, "scheduler": str, "num_trials": int, "test": str}
"""What a space file's ``DEFAULTS`` may set, and its type."""

CHECKED_DRAWS = 20
CHECKED_GRID = 500
"""A grid of at most so many combinations is checked whole before anything starts, any other space by draws."""

_DOMAINS = "tune.uniform, loguniform and randint, quantized or not, choice, grid_search, or a constant"
_EXAMPLE = 'e.g. {"objective.nu_forward": tune.loguniform(0.5, 8)}'
_OBJECTIVE = "objective.name"


@dataclass(frozen=True)
class Space:
    """What a search chooses from."""

    name: str
    """The file's, without its ending."""
    space: dict[str, Any]
    """A ``ray.tune`` domain, a ``grid_search`` or a constant by the recipe's dotted key."""
    defaults: dict[str, Any]
    """Of the command line; see :data:`DEFAULTS`."""
    text: str
    """The file's source."""
    relative_paths: tuple[tuple[str, str], ...] = ()
    """Keys, and paths as the file gives them, that were made absolute for trials, which work in another folder."""
    absolute_paths: tuple[str, ...] = ()
    """What became of them."""

    def grid_size(self) -> int | None:
        """Return the number of combinations, or None where the space is not made of grids and constants alone."""
        if not self._is_grid:
            return None
        size = self._combinations
        return len(self.draws(size, seed=0)) if _grid(self.space.get(_OBJECTIVE)) else size

    def draws(self, num: int, seed: int) -> list[dict[str, Any]]:
        """Return ``num`` choices of values by dotted key, a function of the space, ``num`` and ``seed``.

        The grids' combinations come one after the other, again and again, each time with a new draw of all else. Where
        there is nothing but grids, the list ends when all combinations are in it.
        """
        return list(islice(self._drawn(seed), num))

    def fitting(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values without the parameters that an objective chosen among them does not have.

        A space that chooses ``objective.name`` may hold parameters of some of its objectives.
        """
        objective = OBJECTIVES.get(str(values.get(_OBJECTIVE)))
        if objective is None:
            return dict(values)
        own = _keys_of(objective)
        return {key: value for key, value in values.items() if _parameter(key) in own or not _of_objective(key)}

    def text_of(self, values: Mapping[str, Any], max_len: int = 80) -> str:
        """Return values as a part of a run's name, e.g. ``nu_forward-2.103-gate-soft``; constants go without saying.

        As many whole values as ``max_len`` characters hold, perhaps none.
        """
        text = ""
        for key, value in values.items():
            if key in self.space and _is_constant(self.space[key]):
                continue
            longer = f"{text}-{last_name(key)}-{_word(value)}".lstrip("-")
            if len(longer) > max_len:
                break
            text = longer
        return text

    def within(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values moved to the nearest that the space's ranges hold, steps included."""
        from ray.tune.search.sample import Float, Integer, Quantized

        moved = dict(values)
        for key, domain in self.space.items():
            if key in moved and isinstance(domain, Float | Integer):
                low, high = _extremes(domain)
                value, sampler = moved[key], domain.get_sampler()
                if isinstance(sampler, Quantized):
                    value = round(value / sampler.q) * sampler.q
                moved[key] = domain.cast(min(max(value, low), high))
        return moved

    @property
    def has_grid(self) -> bool:
        """Whether some values are to be tried all."""
        return any(map(_grid, self.space.values()))

    @property
    def _is_grid(self) -> bool:
        return all(_grid(domain) or _is_constant(domain) for domain in self.space.values())

    def _drawn(self, seed: int) -> Iterator[dict[str, Any]]:
        if not self._is_grid:
            yield from map(self.fitting, _variants(self.space, seed))
            return
        seen: list[dict[str, Any]] = []
        for values in map(self.fitting, islice(_variants(self.space, seed), self._combinations)):
            if values not in seen:
                seen.append(values)
                yield values

    @property
    def _combinations(self) -> int:
        return math.prod(len(_grid(domain) or [domain]) for domain in self.space.values())


def load_space(path: str, recipe: Recipe) -> Space:
    """Read a space file and check it against the recipe that it is to be searched over.

    The file defines ``search_space()``, which returns a dict: a domain of ``ray.tune`` (uniform, loguniform, quniform,
    randint, choice, grid_search) or a constant by the recipe's dotted key. It may set ``DEFAULTS``, a dict of command
    line options (:data:`DEFAULTS`). It may import modules that lie beside it.

    Args:
        path: Of the file.
        recipe: Its values are those that the space leaves alone.

    Raises:
        UserError: One line: the file is missing, is not Python or fails; a key that the recipe does not have; a value
            that the recipe does not allow, at the bounds of a domain or in a draw of the whole.
    """
    file = Path(path)
    text = _source(file)
    try:
        tree, defaults = _executed(file, text)
        space = Space(file.stem, _checked_domains(tree), _checked_defaults(defaults), text)
        _check(space, recipe)
    except UserError as error:
        raise UserError(f"{file.name}: {error}") from None
    return _with_absolute_paths(space)


def _source(file: Path) -> str:
    if not file.is_file():
        beside = [other.name for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        shipped = Path("tune_spaces") / f"{file.stem}.py"
        hint = f"; did you mean '{shipped}'?" if shipped.is_file() else nearest(file.name, beside)
        raise UserError(f"there is no space file {file}{hint}")
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"space file {file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"space file {file} is not Python: it is not text in UTF-8") from None


def _executed(file: Path, text: str) -> tuple[Any, Any]:
    """Run the file's source; return what its ``search_space()`` returns, and its ``DEFAULTS``."""
    try:
        code = compile(text, str(file), "exec")
    except SyntaxError as error:
        raise UserError(f"is not Python: line {error.lineno}: {error.msg}") from None
    except ValueError as error:  # null bytes
        raise UserError(f"is not Python: {first_line(error)}") from None
    with _as_module(file) as module:
        try:
            exec(code, vars(module))
            if not callable(search_space := getattr(module, "search_space", None)):
                raise UserError(f"defines no function search_space(); it returns a dict, {_EXAMPLE}")
            return search_space(), getattr(module, "DEFAULTS", {})
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(_told(error, file)) from error


@contextmanager
def _as_module(file: Path) -> Iterator[ModuleType]:
    """Lend the file a private module, and imports from its own folder."""
    name, folder = f"_bdkd_space_{file.stem}", str(file.parent.resolve())
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, file
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    try:
        yield module
    finally:
        del sys.modules[name]
        with suppress(ValueError):
            sys.path.remove(folder)


def _told(error: BaseException, file: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f" in line {lines[-1]}" if lines else ""
    return f"fails{where} with {type(error).__name__}: {first_line(error)}"


def _checked_defaults(defaults: Any) -> dict[str, Any]:
    if not isinstance(defaults, dict):
        raise UserError(f"DEFAULTS is of type {type(defaults).__name__} (allowed: a dict)")
    for key, value in defaults.items():
        if key not in DEFAULTS:
            raise unknown("key of DEFAULTS:", str(key), DEFAULTS)
        if type(value) is not DEFAULTS[key]:
            raise UserError(f"DEFAULTS: {key}={value!r} is not allowed (allowed: of type {DEFAULTS[key].__name__})")
    return dict(defaults)


def _checked_domains(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise UserError(f"search_space() returned a value of type {type(tree).__name__} (allowed: a dict, {_EXAMPLE})")
    if not tree:
        raise UserError(f"search_space() is empty: nothing to search; {_EXAMPLE}")
    for key in tree:
        if not isinstance(key, str):
            raise UserError(f"the key {key!r} is of type {type(key).__name__} (allowed: a recipe's dotted key)")
        if key.startswith(("run.", "launch.")):
            raise UserError(
                f"{key} changes nothing that is computed: there is nothing to search (set it on the command line)"
            )
    return {key: _checked_domain(key, value) for key, value in tree.items()}


def _checked_domain(key: str, value: Any) -> Any:
    """Return a domain with plain Python values, once it is one that every search understands."""
    from ray import tune
    from ray.tune.search.sample import Categorical, Domain

    if isinstance(value, Categorical) or _is_grid_search(value):
        choices = [_plain(one) for one in (value if isinstance(value, Categorical) else value["grid_search"])]
        if not choices:
            raise UserError(f"{key}: nothing to choose from (allowed: one value or more)")
        if isinstance(value, Categorical):
            return tune.choice(choices)  # a value that is listed twice is drawn twice as often
        return tune.grid_search([one for index, one in enumerate(choices) if one not in choices[:index]])
    inside = value.items() if _of_objective(key) and isinstance(value, dict) else ()
    if part := next((name for name, one in inside if isinstance(one, Domain) or _is_grid_search(one)), None):
        raise UserError(f"{key}: a domain inside a section is not allowed; give it a key of its own, {key}.{part}")
    if not isinstance(value, Domain):
        return _plain(value)
    if value.is_function() or not (math.isfinite(value.lower) and math.isfinite(value.upper)):
        kind = "tune.sample_from" if value.is_function() else "tune.randn"
        raise UserError(f"{key}: {kind}, which has no bounds, is not allowed (allowed: {_DOMAINS})")
    lowest, highest = _extremes(value)
    if lowest > highest:
        raise UserError(f"{key}: there is no value between the bounds {value.lower} and {value.upper}")
    return value


def _check(space: Space, recipe: Recipe) -> None:
    """Raise UserError where the recipe does not take the space's keys and values."""
    start = _random(space).draws(1, seed=0)[0]
    for key, domain in space.space.items():
        for value in _extremes(domain):
            for objective in _objectives_of(key, space):
                config.replace(recipe, {**space.fitting({**start, **objective, key: value}), key: value})
    size = space.grid_size()
    whole = space.draws(size, seed=0) if size and size <= CHECKED_GRID else _random(space).draws(CHECKED_DRAWS, seed=0)
    for values in whole:
        config.replace(recipe, values)


def _with_absolute_paths(space: Space) -> Space:
    """Return the space for trials, whose working directory is another."""
    relative, absolutes = [], []

    def absolute(key: str, value: Any) -> Any:
        place = config.absolute_place(value) if key in config.PLACES and isinstance(value, str) else value
        if place != value:
            relative.append((key, value))
            absolutes.append(place)
        return place

    domains = {key: _each(domain, partial(absolute, key)) for key, domain in space.space.items()}
    return replace(space, space=domains, relative_paths=tuple(relative), absolute_paths=tuple(absolutes))


def _each(domain: Any, change: Callable[[Any], Any]) -> Any:
    """Return a domain with its listed values changed."""
    from ray import tune
    from ray.tune.search.sample import Categorical, Domain

    if isinstance(domain, Categorical):
        return tune.choice([change(value) for value in domain.categories])
    if _is_grid_search(domain):
        return tune.grid_search([change(value) for value in domain["grid_search"]])
    return domain if isinstance(domain, Domain) else change(domain)


def _objectives_of(key: str, space: Space) -> list[dict[str, Any]]:
    """Return the choices of an objective, among those of the space, under which a key means something."""
    if key == _OBJECTIVE or _OBJECTIVE not in space.space or not _of_objective(key):
        return [{}]
    names = _extremes(space.space[_OBJECTIVE])
    having = [{_OBJECTIVE: name} for name in names if key in space.fitting({_OBJECTIVE: name, key: None})]
    if not having:
        raise unknown("recipe key", key, set().union(*(_keys_of(OBJECTIVES[name]) for name in names)))
    return having


def _keys_of(objective: Any) -> set[str]:
    return {f"objective.{field.name}" for field in fields(objective)}


def _of_objective(key: str) -> bool:
    return key.startswith("objective.")


def _parameter(key: str) -> str:
    """Return the key of the parameter that a key sets, or sets a part of: a schedule has parts of its own."""
    return ".".join(key.split(".")[:2])


def _extremes(domain: Any) -> list[Any]:
    """Return the values of a domain that lie at its bounds, or all where they are listed."""
    from ray.tune.search.sample import Categorical, Domain, Integer, Quantized

    if isinstance(domain, Categorical):
        return list(domain.categories)
    if not isinstance(domain, Domain):
        return _grid(domain) or [domain]
    sampler = domain.get_sampler()
    step = sampler.q if isinstance(sampler, Quantized) else None
    exclusive = isinstance(domain, Integer) and step in (None, 1)
    lower, upper = domain.lower, domain.upper - 1 if exclusive else domain.upper
    if isinstance(domain, Integer) and step:
        lower, upper = math.ceil(lower / step) * step, math.floor(upper / step) * step
    return [domain.cast(lower), domain.cast(upper)]


def _random(space: Space) -> Space:
    """Return the space with its grids as choices, so that a few draws reach all over it."""
    from ray import tune

    choices = {key: tune.choice(values) if (values := _grid(domain)) else domain for key, domain in space.space.items()}
    return Space(space.name, choices, space.defaults, space.text)


def _variants(space: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Yield Ray's variants of a space without end: all combinations of its grids, again and again."""
    from ray.tune.search.variant_generator import generate_variants

    generator = np.random.default_rng(seed)
    while True:
        for _, values in generate_variants(space, random_state=generator):
            yield values


def _is_grid_search(domain: Any) -> bool:
    return isinstance(domain, dict) and domain.keys() == {"grid_search"}


def _grid(domain: Any) -> list[Any]:
    """Return the values of a ``grid_search``, none for anything else."""
    return domain["grid_search"] if _is_grid_search(domain) else []


def _is_constant(domain: Any) -> bool:
    from ray.tune.search.sample import Domain

    return not isinstance(domain, Domain) and not _is_grid_search(domain)


def _plain(value: Any) -> Any:
    """Return NumPy's numbers and arrays as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def _word(value: Any) -> str:
    """Return a value in letters that every file system takes."""
    if isinstance(value, list | tuple):
        return "-".join(map(_word, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, str) and value.startswith("/"):
        value = Path(value).name or value
    return re.sub(r"[^\w.+-]+", "_", f"{value:.4g}" if isinstance(value, float) else str(value), flags=re.ASCII)
