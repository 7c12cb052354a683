"""Nothing that came from storage can run code: what reads files reads plain values."""

import ast
from collections.abc import Iterator
from pathlib import Path

import bdkd_dist

PACKAGE = Path(bdkd_dist.__file__).parent
UNPICKLES = {
    "pickle.load",
    "pickle.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "dill.load",
    "shelve.open",
}
FROM_MEMORY = {"launch/ray_train.py": ["pickle.loads"]}
"""What a rank of the same run says to its driver through Ray, which pickles all messages itself."""


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield (file, call) of every call in the package whose dotted name ends so."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and f".{ast.unparse(node.func)}".endswith(f".{name}"):
                yield path.relative_to(PACKAGE).as_posix(), node


def test_checkpoints_are_loaded_as_weights_only() -> None:
    found = list(calls("torch.load"))
    assert found
    for file, call in found:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert options.get("weights_only") == "True", file


def test_nothing_else_unpickles_but_what_ranks_say_to_their_driver() -> None:
    found: dict[str, list[str]] = {}
    for name in sorted(UNPICKLES):
        for file, _ in calls(name):
            found.setdefault(file, []).append(name)
    assert found == FROM_MEMORY


def test_arrays_yaml_and_code_are_not_read_in_ways_that_can_run_something() -> None:
    for name in ("np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        assert list(calls(name)) == []
    bare = [file for name in ("eval", "exec") for file, call in calls(name) if isinstance(call.func, ast.Name)]
    assert bare == ["launch/tune/space.py"]  # a search space is Python, a file that its user names
