"""A disk that somebody else fills while a run trains on it, and empties again."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import assert_equal_runs, command, environment, execute, reached
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


@contextmanager
def started(arguments: list[str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ends_well_once_emptied(process: "subprocess.Popen[str]", ballast: Path) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "trying again" in line:
            time.sleep(3)  # that it is refused more than once
            ballast.unlink(missing_ok=True)
    said = "".join(lines)
    assert process.wait() == 0, said
    assert "No space left on device" in said
    assert "the storage answers again" in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def unbroken(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    execute(command(cache, folder, *EPOCHS))
    return folder / "run"


@pytest.mark.parametrize("step", [3, 20], ids=["midway", "before the results"])
def test_a_full_disk_that_is_emptied_costs_a_run_no_bit(step: int, unbroken: Path, cache: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_mib=96) as disk:
        with started(command(cache, disk, *EPOCHS)) as process:
            while not reached(disk / "run", step)():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.005)
            with halted(process):
                ballast = fill(disk)
            ends_well_once_emptied(process, ballast)
        assert_equal_runs(disk / "run", unbroken)
        assert (disk / "run/results.json").read_bytes() == (unbroken / "results.json").read_bytes()
