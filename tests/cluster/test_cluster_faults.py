"""Runs on several Ray nodes that lose workers, nodes, drivers, and get others: they end as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import ray_node
import s3_server
import torch
import two_ranks
from ray_node import RayHead
from runs import (
    assert_same_weights,
    command,
    environment,
    event_points,
    execute,
    final_state,
    metric_lines,
    reached,
)
from training_record import Record
from two_ranks import TWO

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(900)]
LIMIT_S = 600
IMPATIENT = """
import sys
from bdkd_dist.launch import ray_train, vigil

ray_train.RESIZE_EVERY_S = 5
vigil.SAY_EVERY_S = 5
if sys.argv[1] == "tune":
    from bdkd_dist.launch.tune import ledger

    ledger.WAITING_SAID_EVERY_S = 5
from bdkd_dist.cli import main

main()
"""


class Driver:
    """A training command under way on the cluster, and what it has said."""

    def __init__(self, head: RayHead, arguments: list[str], log: Path):
        self.log = log
        impatient = [sys.executable, "-c", IMPATIENT, *arguments[1:], "--address", head.gcs]
        with log.open("a") as out:
            self.process = subprocess.Popen(
                impatient,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment() | head.environment,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, moment: Callable[[], bool]) -> None:
        """Wait for a moment inside the run."""
        deadline_s = time.monotonic() + LIMIT_S
        while not moment():
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.said}"
            assert time.monotonic() < deadline_s, f"the moment never came\n{self.said}"
            time.sleep(0.02)

    def until_said(self, words: str) -> None:
        self.until(lambda: words in self.said)

    def ends(self, status: int = 0) -> str:
        """Wait for the end, check its status and that no trace was shown; return all that was said."""
        self.process.wait(LIMIT_S)
        assert self.process.returncode == status, self.said
        assert "Traceback" not in self.said, self.said
        return self.said


@contextmanager
def driving(head: RayHead, arguments: list[str], folder: Path) -> Iterator[Driver]:
    driver = Driver(head, arguments, folder / "driver.log")
    try:
        yield driver
    finally:
        if driver.process.poll() is None:
            os.killpg(driver.process.pid, signal.SIGKILL)
            driver.process.wait()


def worker_of(raylet: int) -> psutil.Process:
    """Return the training worker of a node."""
    (worker,) = [p for p in psutil.Process(raylet).children(recursive=True) if "RayTrainWorker" in p.name()]
    return worker


def assert_equal_runs(run: Path, unbroken: Path) -> None:
    assert_same_weights(run, unbroken)
    assert (run / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    assert event_points(run) == event_points(unbroken)


def assert_each_sample_once_an_epoch(record: Record, epochs: int, steps: int) -> None:
    counts: dict[int, Counter[int]] = {}
    done = record.steps()
    assert list(done) == list(range(steps))
    for epoch, _, samples in done.values():
        counts.setdefault(epoch, Counter()).update(samples)
    assert list(counts) == list(range(epochs))
    for of_epoch in counts.values():
        assert of_epoch.keys() == counts[0].keys()
        assert set(of_epoch.values()) == {1}


# One epoch without a checkpoint: growing makes one. Two workers add up in another order than one, and training makes
# such differences grow; with a rate like this by hardly anything over the steps of the test.
GENTLE = ("optimizer.lr=0.00001", "objective.gate=soft", "train.epochs=1", "train.checkpoint_every_steps=null")
STEPS = 100
SIZE = (f"data.train_limit={8 * STEPS}", "train.batch_size=8")


# First: Ray keeps the places of a run whose driver was killed for three minutes, and only elastic runs ask for that.
def test_a_run_between_one_and_two_workers_takes_a_node_that_joins_and_trains_every_sample_once(
    ray_head: RayHead, cache: Path, tmp_path: Path, record: Record
) -> None:
    elastic = command(cache, tmp_path, *TWO, *GENTLE, *SIZE, "launch.workers=[1,2]")
    slow = record.environment | {"PAUSE_S": "0.6"}  # time for a node to join, and for Ray to notice
    with ExitStack() as stack:
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.3", **slow))
        driver = stack.enter_context(driving(ray_head, elastic, tmp_path))
        driver.until(lambda: bool(list(tmp_path.glob("run/metrics.jsonl"))) and bool(metric_lines(tmp_path / "run")))
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.4", **slow))
        driver.until_said("going on with 2 worker(s), 1 before")
        driver.ends()
    assert_each_sample_once_an_epoch(record, epochs=1, steps=STEPS)
    assert {workers for _, workers, _ in record.steps().values()} == {1, 2}
    steps = [line["step"] for line in metric_lines(tmp_path / "run") if "train" in line]
    assert steps == list(range(2, STEPS + 1, 2))
    assert set(event_points(tmp_path / "run").values()) == {1}

    execute(command(cache, tmp_path, *TWO, *GENTLE, *SIZE, "launch.workers=1", name="one"))
    ours, expected = final_state(tmp_path / "run"), final_state(tmp_path / "one")
    for name, network in expected["networks"].items():
        for key, value in network.items():
            torch.testing.assert_close(ours["networks"][name][key], value, rtol=1e-3, atol=1e-4)


def test_a_node_that_dies_is_waited_for_and_its_place_taken_without_a_bit_lost(
    ray_head: RayHead, unbroken: Path, cache: Path, tmp_path: Path, record: Record
) -> None:
    with ExitStack() as stack:
        raylet = stack.enter_context(ray_node.joined(ray_head, "127.0.0.3", **record.environment))
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.4", **record.environment))
        arguments = command(cache, tmp_path, *TWO, "launch.placement=spread")
        driver = stack.enter_context(driving(ray_head, arguments, tmp_path))
        driver.until(reached(tmp_path / "run", 3))
        os.kill(raylet, signal.SIGKILL)
        driver.until_said("waiting for 2 worker(s) of 1 CPU each")
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.5", **record.environment))
        said = driver.ends()
    assert "restart 1 of at most 3" in said
    assert "CPU free on" in said
    assert_equal_runs(tmp_path / "run", unbroken)
    assert_each_sample_once_an_epoch(record, epochs=2, steps=10)


def test_a_run_in_a_bucket_goes_on_from_there_when_the_node_that_wrote_it_dies(
    ray_head: RayHead, unbroken: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    with ExitStack() as stack:
        bucket = stack.enter_context(s3_server.serve())
        nodes = ("127.0.0.3", "127.0.0.4", "127.0.0.5")
        raylets = [stack.enter_context(ray_node.joined(ray_head, node, **s3_server.CREDENTIALS)) for node in nodes]
        arguments = command(cache, bucket.uri("runs"), *TWO, "launch.placement=spread")  # type: ignore[arg-type]
        driver = stack.enter_context(driving(ray_head, arguments, tmp_path))
        driver.until(bucket.reached("runs/run", 3))
        writer = next(raylet for raylet in raylets if writes_to_a_store(raylet))
        os.kill(writer, signal.SIGKILL)
        said = driver.ends()
        run = bucket.copy_to("runs/run", tmp_path / "copy")
    assert "restart 1 of at most 3" in said
    assert_equal_runs(run, unbroken)


def writes_to_a_store(raylet: int) -> bool:
    """Whether rank 0 is on this node: it alone has a working folder, locked."""
    workers = [p for p in psutil.Process(raylet).children(recursive=True) if "RayTrainWorker" in p.name()]
    return any("/runs/run-" in file.path for worker in workers for file in worker.open_files())


def test_a_killed_driver_costs_nothing_when_its_command_is_typed_again(
    ray_head: RayHead, unbroken: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = command(cache, tmp_path, *TWO)
    with ray_node.joined(ray_head, "127.0.0.3"), ray_node.joined(ray_head, "127.0.0.4"):
        with driving(ray_head, arguments, tmp_path) as driver:
            driver.until(reached(tmp_path / "run", 3))
            os.killpg(driver.process.pid, signal.SIGKILL)
            driver.process.wait()
        with driving(ray_head, arguments, tmp_path) as driver:
            driver.ends()
    assert_equal_runs(tmp_path / "run", unbroken)


def test_a_worker_that_hangs_is_shown_with_its_stack_and_all_start_again(
    ray_head: RayHead, unbroken: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = command(cache, tmp_path, *TWO, "launch.placement=spread", "launch.stall_timeout_s=20")
    with ExitStack() as stack:
        raylet = stack.enter_context(ray_node.joined(ray_head, "127.0.0.3"))
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.4"))
        driver = stack.enter_context(driving(ray_head, arguments, tmp_path))
        driver.until(reached(tmp_path / "run", 3))
        worker_of(raylet).send_signal(signal.SIGSTOP)
        said = driver.ends()
    assert "launch.stall_timeout_s=20: no worker has finished a step for " in said
    assert "gives no answer" in said  # it is stopped; the other one waits for it
    assert "in _train_step" in said or "in _agreed_wish" in said
    assert "restart 1 of at most 3" in said
    assert_equal_runs(tmp_path / "run", unbroken)


ONE_EPOCH = ("data.train_limit=600", "train.batch_size=8", "train.epochs=1", "train.checkpoint_every_steps=null")


def test_a_node_to_be_taken_away_is_checkpointed_at_once_and_costs_no_restart(
    ray_head: RayHead, cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # No other checkpoint is due before the end, 75 steps from the start.
    arguments = command(cache, tmp_path, *TWO, *ONE_EPOCH, "launch.placement=spread", "launch.max_failures=0")
    with ExitStack() as stack:
        raylet = stack.enter_context(ray_node.joined(ray_head, "127.0.0.3"))
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.4"))
        driver = stack.enter_context(driving(ray_head, arguments, tmp_path))
        driver.until(lambda: (run / "metrics.jsonl").is_file() and bool(metric_lines(run)))
        drain(ray_head, raylet, within_s=5)
        driver.until(reached(run, 1))
        assert final_state(run)["step"] < 75
        os.kill(raylet, signal.SIGKILL)
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.5"))
        said = driver.ends()
    assert "is to be taken away; checkpointing now" in said
    assert said.count("a node was taken away; all workers start again from the newest checkpoint") == 1
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    assert_equal_runs(run, two_ranks.train(cache, unbroken, *ONE_EPOCH))


def drain(head: RayHead, raylet: int, within_s: int) -> None:
    """Announce that a node will be taken away, as a cloud's notice does."""
    arguments = psutil.Process(raylet).cmdline()
    node_id = next(a.partition("=")[2] for a in arguments if a.startswith("--node_id="))
    ray = Path(sys.executable).with_name("ray")
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot instance"]
    deadline = ["--deadline-remaining-seconds", str(within_s)]
    address = ["--address", head.gcs, "--node-id", node_id]
    subprocess.run(
        [str(ray), "drain-node", *address, *reason, *deadline], check=True, env=environment() | head.environment
    )


def test_workers_that_there_is_no_room_for_are_waited_for_with_words_and_given_up_in_time(
    ray_head: RayHead, cache: Path, tmp_path: Path
) -> None:
    with ray_node.joined(ray_head, "127.0.0.3"):
        arguments = command(cache, tmp_path, *TWO, "launch.wait_timeout_s=12")
        with driving(ray_head, arguments, tmp_path) as driver:
            said = driver.ends(status=1)
    assert re.search(r"waiting for 2 worker\(s\) of 1 CPU each since \d+ s; [01] of 1 CPU free on 2 node\(s\)", said)
    (line,) = [line for line in said.splitlines() if "gave up" in line]
    assert line.startswith("launch.wait_timeout_s=12: gave up waiting for 2 worker(s) of 1 CPU each; ")
    assert line.endswith("the state is kept, the same command goes on")
