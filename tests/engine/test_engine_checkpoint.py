"""Checkpoints are whole or absent, and a cut one falls back to the one before."""

import os
from pathlib import Path

import pytest
import torch

from bdkd_dist.engine.checkpoint import KEPT, Checkpoints, load
from bdkd_dist.errors import UserError


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {"weights": {"w": torch.randn(3, 4)}, "epoch": 2, "names": ["a"], "scaler": {}}
    Checkpoints(tmp_path).save(7, state)
    back = Checkpoints(tmp_path).load_newest()
    assert back is not None
    assert torch.equal(back["weights"]["w"], state["weights"]["w"])
    assert (back["step"], back["epoch"], back["names"], back["scaler"]) == (7, 2, ["a"], {})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10, 100_000_000 - 1, 20):
        checkpoints.save(step, {})
    assert len(list(tmp_path.iterdir())) == KEPT
    assert checkpoints.paths()[-1].name == "step-99999999.pt"


def test_each_write_has_a_file_of_its_own_and_removes_what_killed_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("step-00000001.partial", "step-00000007.0123.partial"):
        (tmp_path / name).write_bytes(b"half")
    seen: list[str] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.extend(path.name for path in tmp_path.glob("*.partial"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    for _ in range(2):
        Checkpoints(tmp_path).save(7, {})
    assert len(seen) == len(set(seen)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007.pt"]


@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path: Path, damage: str) -> None:
    lines: list[str] = []
    checkpoints = Checkpoints(tmp_path, lines.append)
    checkpoints.save(1, {"w": torch.ones(10_000)})
    newest = checkpoints.save(2, {"w": torch.zeros(10_000)})
    whole = newest.read_bytes()
    newest.write_bytes({"cut": whole[: len(whole) // 2], "emptied": b"", "overwritten": b"x" * len(whole)}[damage])
    state = checkpoints.load_newest()
    assert state is not None
    assert state["step"] == 1
    assert len(lines) == 1
    assert str(newest) in lines[0]
    assert "\n" not in lines[0]


def test_no_readable_checkpoint_is_an_error_not_a_start_from_scratch(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, {}).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint"):
        Checkpoints(tmp_path, lambda line: None).load_newest()


def test_a_write_that_fails_leaves_the_last_good_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": torch.ones(3)})
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save(2, {"w": lambda: None})
    state = checkpoints.load_newest()
    assert state is not None
    assert state["step"] == 1


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"x": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported|Weights only"):
        load(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "ran").exists()
