"""The doctor on this machine, and on ones that lack something."""

import sys
from collections import namedtuple
from pathlib import Path

import pytest

from bdkd_dist import cli
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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--storage", "s3://lab/runs"], "--storage is looked at from the nodes of a cluster; give its --address too"),
        (["--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster that fits answers"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    options: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bdkd", "doctor", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(expected)
    assert said.count("\n") == 1
