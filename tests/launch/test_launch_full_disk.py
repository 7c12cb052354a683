"""A disk that somebody else fills while a run trains on it, and empties again."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import assert_same_weights, command, environment, event_points, execute, reached
from small_disk import fill, small_disk

pytestmark = pytest.mark.slow

EPOCHS = ("train.epochs=4", "data.loader=torch")


@contextmanager
def halted(process: "subprocess.Popen[str]") -> Iterator[None]:
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGCONT)


def test_a_full_disk_that_is_emptied_costs_a_run_no_bit(cache: Path, tmp_path: Path) -> None:
    execute(command(cache, tmp_path, *EPOCHS, name="unbroken"))
    with small_disk(tmp_path / "disk", size_mib=96) as disk:
        process = subprocess.Popen(
            command(cache, disk, *EPOCHS),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment() | {"PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None
        try:
            while not reached(disk / "run", 3)():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.005)
            with halted(process):
                ballast = fill(disk)
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "trying again" in line:
                    time.sleep(3)  # that it is refused more than once
                    ballast.unlink(missing_ok=True)
            assert process.wait() == 0, "".join(lines)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = "".join(lines)
        assert "No space left on device" in said
        assert "the storage answers again" in said
        assert "Traceback" not in said
        unbroken = tmp_path / "unbroken"
        assert_same_weights(disk / "run", unbroken)
        assert (disk / "run/metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
        assert event_points(disk / "run") == event_points(unbroken)
        assert (disk / "run/results.json").read_bytes() == (unbroken / "results.json").read_bytes()
