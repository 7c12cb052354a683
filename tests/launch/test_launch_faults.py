"""Two workers of which one dies, or one meets an error that the other does not."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import without_ray
from processes import below
from runs import TWO, assert_equal_runs, command, environment, reached

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def unbroken(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that no Ray started and nobody interrupted."""
    return without_ray.train_two_ranks(cache, tmp_path_factory.mktemp("unbroken"), *TWO)


def kill_a_worker(arguments: list[str], when: Callable[[], bool]) -> tuple[int, str, str]:
    """Start, kill one of two workers at a moment inside the run, return status, output and errors of the driver."""
    with driver(arguments) as process:
        while not when():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        workers = below(process.pid, "RayTrainWorker")
        assert len(workers) == 2
        workers[0].send_signal(signal.SIGKILL)
        output, errors = process.communicate(timeout=200)
    assert "Traceback" not in output + errors
    return process.returncode, output, errors


@contextmanager
def driver(arguments: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Start the command; a test that fails leaves nothing of it behind."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_killed_worker_costs_no_bit_whether_it_is_restarted_or_the_command_typed_again(
    unbroken: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = command(cache, tmp_path, *TWO)
    run = tmp_path / "run"

    status, output, errors = kill_a_worker([*arguments, "launch.max_failures=0"], reached(run, 3))
    assert status == 1, errors
    assert "workers start again" not in output
    line = errors.splitlines()[-1]
    assert line.startswith("launch.max_failures=0: lost the ")
    assert "the same command goes on" in line
    assert not (run / "results.json").exists()

    status, output, errors = kill_a_worker(arguments, reached(run, 6))
    assert status == 0, errors
    (line,) = [line for line in output.splitlines() if "workers start again" in line]
    assert line.startswith("lost the ")  # worker of rank 0; or the connection, seen from rank 1
    assert "restart 1 of at most 3" in line

    assert_equal_runs(run, unbroken)


FAULTS = """
from bdkd_dist.data import order
from bdkd_dist.errors import UserError

rank_batches = order.rank_batches

def faulty(indices, batch_size, rank, world_size, first_step=0):
    batches = rank_batches(indices, batch_size, rank, world_size, first_step)
    if rank == 1:
        with open({met!r}, "a") as file:
            file.write("met\\n")
        {fault}
    return batches

order.rank_batches = faulty
"""


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("batches[2][3] = 10**6", 1, ["cache", "1000000"]),
        ("raise UserError('data.root=/lent: gone')", 2, ["data.root=/lent: gone"]),
        ("raise ZeroDivisionError('a bug')", 1, ["ZeroDivisionError: a bug"]),
    ],
    ids=["data", "user", "bug"],
)
def test_an_error_on_one_rank_ends_the_run_at_once_and_is_not_tried_again(
    fault: str, status: int, words: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = tmp_path / "met"  # a line for each time that rank 1 comes to the fault
    (tmp_path / "sitecustomize.py").write_text(FAULTS.format(met=str(met), fault=fault))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    seen: set[psutil.Process] = set()
    with driver(command(cache, tmp_path, *TWO)) as process:
        while not met.exists():
            assert process.poll() is None, process.communicate()
            seen.update(psutil.Process(process.pid).children(recursive=True))
            time.sleep(0.1)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    lines = errors.strip().splitlines()
    for word in words:
        assert word in lines[-1]
    if "bug" in fault:
        assert "rank 1 failed" in errors
        assert "in faulty" in errors
    else:
        assert "Traceback" not in output + errors
    assert met.read_text() == "met\n"
    _, left = psutil.wait_procs(seen, timeout=20)
    assert left == []
