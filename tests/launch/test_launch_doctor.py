"""The doctor on this machine, and on ones that lack something."""

from collections import namedtuple
from pathlib import Path

import pytest

from bdkd_dist.launch import doctor


def test_this_machine_has_what_is_needed() -> None:
    findings = {finding.subject: finding for finding in doctor.examine()}
    for needed in ("python", "torch", "torchvision", "ray", "pyarrow", "tensorboard"):
        assert findings[needed].status == "ok", findings[needed]


def test_a_full_disk_names_the_key_that_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 1, 1))
    finding = doctor._room("cache", tmp_path / "not/yet/made", 2**30, "set data.prepared to another disk")
    assert finding.status == "optional"
    assert "data.prepared" in finding.mend


def test_a_package_that_is_installed_but_broken_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._package("halfway", "make setup")
    assert finding.status == "missing"
    assert "libfoo.so.1" in finding.found
    assert finding.mend == "make setup"
