import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy
import pytest
import torch

from bdkd_dist.cores import usable_cores
from bdkd_dist.records import environment as module
from bdkd_dist.records.environment import environment, git_state, source_hash, write_environment


def test_versions_machine_and_time_are_those_of_this_process() -> None:
    said = environment()
    assert said["packages"]["numpy"] == numpy.__version__
    assert said["packages"]["torch"] == torch.__version__
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert said["hardware"]["usable_cores"] == usable_cores()
    kib = int(Path("/proc/meminfo").read_text().split()[1])
    assert said["hardware"]["memory_bytes"] == pytest.approx(kib * 1024, rel=0.01)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(said["started"])).total_seconds() < 60
    assert json.loads(json.dumps(said)) == said


def test_a_package_that_is_not_installed_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("numpy", "no-such-package-here"))
    assert environment()["packages"]["no-such-package-here"] is None


def test_a_run_that_goes_on_appends(tmp_path: Path) -> None:
    write_environment(tmp_path / "environment.json")
    write_environment(tmp_path / "environment.json")
    one, two = json.loads((tmp_path / "environment.json").read_text())
    assert one["started"] <= two["started"]
    assert one["code"] == two["code"]


def test_the_source_hash_is_over_names_and_contents_and_nothing_else(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "recipes").mkdir(parents=True)
    (package / "b.py").write_bytes(b"two")
    (package / "a.py").write_bytes(b"one")
    (package / "recipes/r.yaml").write_bytes(b"x: 1")
    by_hand = hashlib.sha256(b"a.py\0003\0oneb.py\0003\0tworecipes/r.yaml\0004\0x: 1").hexdigest()
    assert source_hash(package) == by_hand
    (package / "__pycache__").mkdir()
    (package / "__pycache__/a.pyc").write_bytes(b"compiled")
    assert source_hash(package) == by_hand
    (package / "a.py").rename(package / "c.py")
    assert source_hash(package) != by_hand


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", str(folder), *who, *command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_and_whether_the_package_differs_from_it(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) is None, "not a checkout"
    git(tmp_path, "init", "-q")
    assert git_state(package) is None, "no commit, not tracked"
    git(tmp_path, "add", ".")
    assert git_state(package) is None, "no commit"
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(package) == {"commit": commit, "dirty": False}
    (tmp_path / "notes.txt").write_text("not the package's")
    assert git_state(package) == {"commit": commit, "dirty": False}
    (package / "new.py").write_text("")
    assert git_state(package) == {"commit": commit, "dirty": True}


def test_a_virtual_environment_inside_another_project_is_not_its_checkout(tmp_path: Path) -> None:
    package = tmp_path / ".venv/package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "theirs.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "theirs.py")
    git(tmp_path, "commit", "-qm", "one")
    assert git_state(package) is None


def test_a_machine_without_git_and_nvidia_smi_says_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = environment()
    assert said["code"]["git"] is None
    assert said["hardware"]["gpus"] == []


def test_gpus_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA GB10, [N/A]'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment()["hardware"]["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 * 2**20},
        {"name": "NVIDIA GB10", "memory_bytes": None},
    ]


@pytest.mark.slow
def test_neither_ray_nor_ffcv_is_imported() -> None:
    code = (
        "import sys; from bdkd_dist.records.environment import environment; environment(); "
        "assert not {'ray', 'ffcv'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
