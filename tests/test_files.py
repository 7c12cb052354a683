import os
import stat
from pathlib import Path

import pytest

from bdkd_dist.files import atomic_write, json_text


def test_a_file_is_replaced_and_nothing_is_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, b"one, which is longer")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.out.tfevents.1"
    atomic_write(path, b"old")
    beside: list[str] = []

    def full_disk(descriptor: int) -> None:
        beside.extend(p.name for p in tmp_path.iterdir() if p != path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert len(beside) == 1
    assert "tfevents" not in beside[0], "TensorBoard would read the half-written file"


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.fsync", files_only)
    atomic_write(tmp_path / "a.txt", b"content")
    assert (tmp_path / "a.txt").read_bytes() == b"content"


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic_write(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_has_null_for_what_it_cannot_say_and_exact_floats() -> None:
    tree = {"a": float("nan"), "b": [float("inf"), 0.1 + 0.2], "c": {"d": -float("inf"), "e": "NaN", "f": 3}}
    text = json_text(tree)
    assert text == b'{"a": null, "b": [null, 0.30000000000000004], "c": {"d": null, "e": "NaN", "f": 3}}\n'
