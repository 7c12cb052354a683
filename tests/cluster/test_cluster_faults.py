"""Runs on several Ray nodes that lose workers, a node, their driver: they end as if nothing had happened."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import ray_node
import s3_server
from driver import driving
from processes import below
from ray_node import RayHead
from runs import TWO, assert_equal_runs, command, reached
from training_record import Record

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(900)]


def worker_of(raylet: int) -> psutil.Process:
    """Return the training worker of a node."""
    (worker,) = below(raylet, "RayTrainWorker")
    return worker


def test_a_run_in_a_bucket_waits_until_the_place_of_a_dead_node_is_taken_and_goes_on_without_a_bit_lost(
    ray_head: RayHead, unbroken: Path, cache: Path, tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    nodes = s3_server.CREDENTIALS | record.environment
    with ExitStack() as stack:
        bucket = stack.enter_context(s3_server.serve())
        arguments = command(cache, bucket.uri("runs"), *TWO, "launch.placement=spread")  # type: ignore[arg-type]
        record.slow_down(1)
        driver = stack.enter_context(driving(ray_head, arguments, tmp_path))
        raylets = stack.enter_context(ray_node.all_joined(ray_head, ["127.0.0.3", "127.0.0.4"], **nodes))
        driver.until(bucket.reached("runs/run", 3))
        (writer,) = filter(writes_to_a_store, raylets)
        before = len(driver.said)
        os.kill(writer, signal.SIGKILL)
        record.speed_up()
        driver.until_said("waiting for 2 worker(s) of 1 CPU each", after=before)
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.5", **nodes))
        said = driver.ends()[before:]
        run = bucket.copy_to("runs/run", tmp_path / "copy")
    assert "restart 1 of at most 3" in said
    assert "CPU free on" in said
    assert_equal_runs(run, unbroken)
    record.assert_each_sample_once(epochs=2, steps=10)


def writes_to_a_store(raylet: int) -> bool:
    """Whether rank 0 is on this node: it alone has a working folder, locked."""
    return any("/runs/run-" in file.path for worker in below(raylet, "RayTrainWorker") for file in worker.open_files())


def test_a_killed_driver_costs_nothing_when_its_command_is_typed_again(
    ray_head: RayHead, unbroken: Path, cache: Path, tmp_path: Path, record: Record
) -> None:
    arguments = command(cache, tmp_path, *TWO)
    record.slow_down(1)
    with ExitStack() as stack:
        killed = stack.enter_context(driving(ray_head, arguments, tmp_path))
        stack.enter_context(ray_node.all_joined(ray_head, ["127.0.0.3", "127.0.0.4"], **record.environment))
        killed.until(reached(tmp_path / "run", 3))
        os.killpg(killed.process.pid, signal.SIGKILL)
        killed.process.wait()
        assert not (tmp_path / "run/results.json").exists()
        record.speed_up()
        with driving(ray_head, arguments, tmp_path) as driver:
            driver.ends()
    assert_equal_runs(tmp_path / "run", unbroken)
    record.assert_each_sample_once(epochs=2, steps=10)


def test_a_worker_that_hangs_is_shown_with_its_stack_and_all_start_again(
    ray_head: RayHead, unbroken: Path, cache: Path, tmp_path: Path, record: Record
) -> None:
    record.slow_down(1)
    arguments = command(cache, tmp_path, *TWO, "launch.placement=spread", "launch.stall_timeout_s=20")
    with (
        driving(ray_head, arguments, tmp_path) as driver,
        ray_node.all_joined(ray_head, ["127.0.0.3", "127.0.0.4"], **record.environment) as (raylet, _),
    ):
        driver.until(reached(tmp_path / "run", 3))
        worker_of(raylet).send_signal(signal.SIGSTOP)
        record.speed_up()
        said = driver.ends()
    assert "launch.stall_timeout_s=20: no worker has finished a step for " in said
    assert "gives no answer" in said  # it is stopped; the other one waits for it
    assert "in _train_step" in said or "in _agreed_wish" in said
    assert "restart 1 of at most 3" in said
    assert_equal_runs(tmp_path / "run", unbroken)
