"""The rooms of the house: a package imports only those below it, large libraries only where they are used."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import bdkd_dist

HOUSE = Path(bdkd_dist.__file__).parent
ORDER = (
    ("__main__",),
    ("cli",),
    ("launch",),
    ("records",),
    ("engine",),
    ("data",),
    ("config",),
    ("models", "metrics", "objectives"),
)
BELOW_ALL = {"distributed", "uris", "files", "cores", "errors"}
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names} | dict.fromkeys(BELOW_ALL, len(ORDER))
FILES = sorted(HOUSE.rglob("*.py"))
ONLY_IN = {"ray": "launch", "ffcv": "data", "matplotlib": "records", "tensorboard": "records"}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).with_suffix("").parts[0]


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in FILES} - {"__init__", "recipes"} == LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_a_room_knows_only_those_below_it(path: Path) -> None:
    room = room_of(path)
    for name in imports_of(path):
        first, other, *_ = [*name.split("."), ""]
        if first == "bdkd_dist" and other in LEVEL and other != room:
            assert LEVEL[other] > LEVEL[room], f"{path} imports {name}"
        assert ONLY_IN.get(first, room) == room, f"{path} imports {name}"
