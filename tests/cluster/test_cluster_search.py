"""Searches on several Ray nodes: trials that lose their node, trials of several workers, and what Ray has then."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray_node
import searches
import without_ray
from driver import Driver
from ray_node import RayHead
from runs import assert_same_weights, environment, metric_lines
from searches import TINY, records

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(900)]

LEFT = """
import json, sys, time, ray

ray.init(address=sys.argv[1], log_to_driver=False)
there = {name: amount for name, amount in ray.cluster_resources().items() if name == "CPU"}
for _ in range(100):  # Ray tells of what is free a moment later
    free = {name: ray.available_resources().get(name, 0) for name in there}
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    if free == there and not groups:
        break
    time.sleep(0.2)
print(json.dumps([there, free, list(map(str, groups))]))
"""


def search(cache: Path, folder: Path, space: str, *words: str) -> list[str]:
    file = folder / "space.py"
    file.write_text(space)
    return searches.command(file, cache, folder, *words)


def left(head: RayHead) -> Any:
    """Return the cluster's CPUs, those that are free, and the placement groups that are there."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT, head.gcs], capture_output=True, text=True, env=environment() | head.environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ends(driver: Driver) -> str:
    try:
        return driver.ends()
    finally:
        if driver.process.poll() is None:
            os.killpg(driver.process.pid, signal.SIGKILL)


def amid(folder: Path, epoch: int) -> Callable[[], bool]:
    """Return a question whether the first trial has reported an epoch."""
    return lambda: any(
        report["epoch"] >= epoch for trial in records(folder / "search")[:1] for report in trial["reports"]
    )


def test_more_trials_than_fit_each_of_two_workers_and_stopped_early_leave_the_cluster_whole(
    ray_head: RayHead, cache: Path, tmp_path: Path
) -> None:
    # The best comes first, so that the others are given up at the first rung.
    arguments = search(
        cache,
        tmp_path,
        searches.grid(lr=[0.05, 0.00001, 0.000001]),
        *("--scheduler", "asha", "launch.workers=2", "launch.placement=spread"),
    )
    driver = Driver(ray_head, arguments, tmp_path / "driver.log")  # it waits for the nodes
    with ray_node.all_joined(ray_head, ["127.0.0.3", "127.0.0.4"]):
        ends(driver)
        there, free, groups = left(ray_head)
    assert there == {"CPU": 2}
    assert free == there
    assert groups == []
    trials = records(tmp_path / "search")
    assert [trial["status"] for trial in trials] == ["finished", "stopped", "stopped"]
    assert all(len(trial["reports"]) == 1 for trial in trials[1:])
    assert trials[0]["device_s"] == pytest.approx(2 * sum(report["wall_s"] for report in trials[0]["reports"]))


def test_a_search_without_room_says_what_it_waits_for_and_gives_up(
    ray_head: RayHead, cache: Path, tmp_path: Path
) -> None:
    arguments = search(cache, tmp_path, searches.grid(lr=[0.05]), "launch.wait_timeout_s=12")
    driver = Driver(ray_head, arguments, tmp_path / "driver.log")
    try:
        said = driver.ends(status=1)
    finally:
        if driver.process.poll() is None:
            os.killpg(driver.process.pid, signal.SIGKILL)
    waiting = r"waiting for 1 worker\(s\) of 1 CPU each since"
    # From 5 s on, at the first look that comes then.
    assert re.search(rf"^{waiting} ([5-9]|1[0-2]) s; 0 of 0 CPU free on 1 node\(s\)$", said, re.MULTILINE)
    last = said.strip().splitlines()[-1]
    assert re.match(rf"launch\.wait_timeout_s=12: gave up {waiting} 1\d s;", last)
    assert "the same command goes on" in last
    assert [trial["status"] for trial in records(tmp_path / "search")] == []


def test_a_trial_whose_node_dies_goes_on_elsewhere_to_the_same_bits(
    ray_head: RayHead, cache: Path, tmp_path: Path
) -> None:
    epochs = "train.epochs=6"
    arguments = search(cache, tmp_path, searches.grid(lr=[0.05]), "--scheduler", "none", epochs)
    alone = without_ray.train(cache, tmp_path, *TINY, epochs, "optimizer.lr=0.05", name="alone")
    with ExitStack() as stack:
        first = stack.enter_context(ray_node.joined(ray_head, "127.0.0.3"))
        driver = Driver(ray_head, arguments, tmp_path / "driver.log")
        driver.until(amid(tmp_path, 2))
        os.kill(first, signal.SIGKILL)
        stack.enter_context(ray_node.joined(ray_head, "127.0.0.4"))
        said = ends(driver)
    assert "trial 0000 lost a process or node; it goes on from its checkpoint" in said
    (trial,) = records(tmp_path / "search")
    assert trial["status"] == "finished"
    assert [report["epoch"] for report in trial["reports"]] == [1, 2, 3, 4, 5, 6]
    run = tmp_path / "search/trials" / trial["name"]
    assert_same_weights(run, alone)
    assert metric_lines(run) == metric_lines(alone)
