"""What a storage refuses is tried again, with growing pauses, for so long and no longer."""

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch
from small_disk import small_disk

from bdkd_dist.engine import patience
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.patience import patiently
from bdkd_dist.errors import UserError


class Clock:
    """Time that passes in pauses alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.pauses, self.said = 0.0, list[float](), list[tuple[float, str]]()
        monkeypatch.setattr(patience.time, "monotonic", lambda: self.now)

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def say(self, line: str) -> None:
        self.said.append((self.now, line))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def refuse() -> None:
    raise UserError("s3://b/x cannot be written: no")


def test_what_is_taken_at_once_is_not_spoken_of(clock: Clock) -> None:
    assert patiently(lambda: 5, clock.say, clock.pause) == 5
    assert clock.said == clock.pauses == []


def test_pauses_double_to_half_a_minute_and_lines_come_every_half_minute(clock: Clock) -> None:
    with pytest.raises(UserError, match=r"^s3://b/x cannot be written: no; tried for \d+ s$"):
        patiently(refuse, clock.say, clock.pause)
    assert clock.pauses[:7] == [1, 2, 4, 8, 16, 30, 30]
    assert 570 <= clock.now <= patience.STORAGE_PATIENCE_S == 600
    times = [time for time, _ in clock.said]
    assert times[0] == 0
    assert all(30 <= later - sooner <= 60 for sooner, later in itertools.pairwise(times))
    assert all("\n" not in line and "trying again" in line for _, line in clock.said)


def test_when_it_goes_again_that_is_said(clock: Clock) -> None:
    answers = iter([refuse, refuse, lambda: None])
    patiently(lambda: next(answers)(), clock.say, clock.pause)
    assert [line for _, line in clock.said][-1] == "the storage answers again, after 3 s"
    assert len(clock.said) == 2


def test_what_the_system_refuses_is_one_line_too(clock: Clock) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/x")

    with pytest.raises(UserError, match=r"^\[Errno 28\] No space left on device: '/disk/x'; tried for \d+ s$"):
        patiently(full, clock.say, clock.pause)
    assert clock.said[0] == (0, "[Errno 28] No space left on device: '/disk/x'; trying again, for 600 s at most")


def test_a_bug_is_not_tried_again(clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 / 0, clock.say, clock.pause)
    assert clock.pauses == []


def test_a_full_disk_that_is_emptied_costs_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_mib=2) as disk:
        ballast = disk / "ballast"
        lines: list[str] = []

        def say(line: str) -> None:
            lines.append(line)
            ballast.unlink(missing_ok=True)

        checkpoints = Checkpoints(disk / "checkpoints", say)
        checkpoints.save(1, {"w": torch.zeros(1000)})
        ballast.write_bytes(b"x" * (2**21 - 2**17))
        checkpoints.save(2, {"w": torch.ones(100_000)})
        assert "No space left on device" in lines[0]
        assert "the checkpoint before it is kept" in lines[0]
        assert "answers again" in lines[1]
        assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000001.pt", "step-00000002.pt"]
        state = checkpoints.load_newest()
        assert state is not None
        assert torch.equal(state["w"], torch.ones(100_000))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_network_disk_that_stays_away_ends_with_one_line_and_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, number: int
) -> None:
    checkpoints = Checkpoints(tmp_path, clock.say)
    checkpoints.save(1, {"w": torch.zeros(3)})

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints, "pause", clock.pause)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match=f"{os.strerror(number)}.*the checkpoint before it is kept; tried for"):
            checkpoints.save(2, {"w": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    state = checkpoints.load_newest()
    assert state is not None
    assert state["step"] == 1
