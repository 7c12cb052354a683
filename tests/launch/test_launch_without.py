"""Machines without FFCV or without Ray: one process trains all the same, and what is asked for by name is refused."""

import json
from pathlib import Path

import pytest
from runs import BDKD, command, execute

pytestmark = pytest.mark.slow

ABSENT = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in {names!r} else find(name, *rest)
"""


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make every process started from here find neither FFCV nor Ray, as where they are not installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ABSENT.format(names=("ffcv", "ray")))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return tmp_path


def test_one_process_trains_with_the_torch_loader(without: Path, cache: Path) -> None:
    done = execute(command(cache, without, "train.epochs=1"))
    assert "loader torch" in done.stdout
    assert json.loads((without / "run/results.json").read_text())["epochs"] == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.loader=ffcv", ["data.loader=ffcv", "not installed", "bdkd doctor", "data.loader=torch"]),
        ("launch.workers=2", ["launch.workers=2", "Ray is not installed", "launch.workers=1"]),
    ],
)
def test_what_is_absent_is_refused_by_name(without: Path, cache: Path, override: str, words: list[str]) -> None:
    done = execute(command(cache, without, override), status=2)
    (line,) = done.stderr.strip().splitlines()
    for word in words:
        assert word in line
    assert not (without / "run").exists()


def test_doctor_says_what_is_missing_and_how_to_mend_it(without: Path) -> None:
    done = execute([str(BDKD), "doctor"], status=1)
    (ffcv,) = [line for line in done.stdout.splitlines() if "ffcv" in line]
    assert "optional" in ffcv
    assert "apt-get install" in done.stdout
    (ray,) = [line for line in done.stdout.splitlines() if line.strip(" │┃").startswith("ray")]
    assert "missing" in ray
    assert "make setup" in ray
