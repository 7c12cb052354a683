"""Nodes that join, that are announced to go, or that are too few: runs take them as they come."""

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import ray_node
import torch
import without_ray
from driver import driving
from ray_node import RayHead
from runs import LIGHT, TWO, assert_equal_runs, command, environment, event_points, final_state, metric_lines, reached
from training_record import Record

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(900)]


def has_metrics(run: Path) -> bool:
    return (run / "metrics.jsonl").is_file() and bool(metric_lines(run))


# One epoch without a checkpoint: growing makes one. Two workers add up in another order than one, and training makes
# such differences grow; with a rate like this by hardly anything over the steps of the test.
GENTLE = ("optimizer.lr=0.00001", "objective.gate=soft", "train.epochs=1", "train.checkpoint_every_steps=null")
STEPS = 60
SIZE = (f"data.train_limit={8 * STEPS}", "train.batch_size=8")


# Not behind a run whose driver was killed: Ray keeps its places for three minutes, and only elastic runs ask for that.
def test_a_run_between_one_and_two_workers_takes_a_node_that_joins_and_trains_every_sample_once(
    ray_head: RayHead, cache: Path, tmp_path: Path, record: Record
) -> None:
    elastic = command(cache, tmp_path, *LIGHT, *GENTLE, *SIZE, "launch.workers=[1,2]")
    record.slow_down(3)  # time for a node to join, and for Ray to notice
    with ExitStack() as stack:
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.3", **record.environment))
        driver = stack.enter_context(driving(ray_head, elastic, tmp_path))
        driver.until(lambda: has_metrics(tmp_path / "run"))
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.4", **record.environment))
        driver.until_said("going on with 2 worker(s), 1 before")
        record.speed_up()
        driver.ends()
    record.assert_each_sample_once(epochs=1, steps=STEPS)
    assert {workers for _, workers, _ in record.steps().values()} == {1, 2}
    steps = [line["step"] for line in metric_lines(tmp_path / "run") if "train" in line]
    assert steps == list(range(2, STEPS + 1, 2))
    assert set(event_points(tmp_path / "run").values()) == {1}

    one = without_ray.train(cache, tmp_path, *LIGHT, *GENTLE, *SIZE, name="one")
    ours, expected = final_state(tmp_path / "run"), final_state(one)
    for name, network in expected["networks"].items():
        for key, value in network.items():
            torch.testing.assert_close(ours["networks"][name][key], value, rtol=1e-3, atol=1e-4)


def test_a_node_to_be_taken_away_is_checkpointed_at_once_and_costs_no_restart(
    ray_head: RayHead, unbroken: Path, cache: Path, tmp_path: Path, record: Record
) -> None:
    run, due = tmp_path / "run", 5  # the end of the first epoch
    limits = ("train.checkpoint_every_steps=null", "launch.max_failures=0")
    arguments = command(cache, tmp_path, *TWO, *limits, "launch.placement=spread")
    record.slow_down(6)  # the notice comes amid a step, and the checkpoint at its end
    with ExitStack() as stack:
        driver = stack.enter_context(driving(ray_head, arguments, tmp_path))
        both = ray_node.all_joined(ray_head, ["127.0.0.3", "127.0.0.4"], **record.environment)
        raylet, _ = stack.enter_context(both)
        driver.until(lambda: has_metrics(run))
        drain(ray_head, raylet, within_s=20)
        driver.until(reached(run, 1))
        os.kill(raylet, signal.SIGKILL)
        assert final_state(run)["step"] < due
        record.speed_up()
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.5", **record.environment))
        said = driver.ends()
    assert "is to be taken away; checkpointing now" in said
    assert said.count("a node was taken away; all workers start again from the newest checkpoint") == 1
    assert_equal_runs(run, unbroken)


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
