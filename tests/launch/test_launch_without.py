"""Machines without FFCV and the native decoder, or without Ray.

One process trains all the same, and what is asked for by name is refused.
"""

import json
import shutil
from pathlib import Path

import pytest
from runs import BDKD, command, execute

from bdkd_dist.data import jpeg

pytestmark = pytest.mark.slow

ABSENT = """
import ctypes
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in {names!r} else find(name, *rest)

class CDLL(ctypes.CDLL):
    def __init__(self, name, *rest, **options):
        if {native!r} in str(name):
            raise OSError(f"{{name}}: cannot open shared object file")
        super().__init__(name, *rest, **options)

ctypes.CDLL = CDLL
"""


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make every process started from here find neither FFCV, Ray nor the native decoder, as where they are not."""
    hide(tmp_path, monkeypatch, ("ffcv", "ray"), "_jpeg.")
    return tmp_path


def hide(folder: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], native: str) -> None:
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(ABSENT.format(names=names, native=native))
    monkeypatch.setenv("PYTHONPATH", str(site))


@pytest.mark.skipif(not jpeg.available(), reason="the native decoder is not built here")
def test_the_native_decoder_alone_reads_as_fast(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(tmp_path, monkeypatch, ("ffcv",), "no library")
    assert "loader ffcv" in execute(command(cache, tmp_path, "train.epochs=1")).stdout


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
    for name in ("ffcv", "native decoder"):
        (found,) = [line for line in done.stdout.splitlines() if line.strip(" │┃").startswith(name)]
        assert "optional" in found
    assert ("apt-get install" in done.stdout) == (shutil.which("apt-get") is not None)
    (ray,) = [line for line in done.stdout.splitlines() if line.strip(" │┃").startswith("ray")]
    assert "missing" in ray
    assert "make setup" in ray
