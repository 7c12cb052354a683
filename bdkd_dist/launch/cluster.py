"""A Ray cluster as a driver sees it: connecting, what is free, which nodes go, ending a process on one of them."""

import logging
import math
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bdkd_dist.config import Launch
from bdkd_dist.cores import usable_cores
from bdkd_dist.errors import UserError, first_line

CONNECT_WITHIN_S = 10.0


@contextmanager
def connected(address: str, num_cpus: int | None = None) -> Iterator[None]:
    """Be a driver of a Ray cluster for the while.

    Args:
        address: ``auto``, ``HOST:PORT``, or ``local`` for one of this machine alone, which ends with the block.
        num_cpus: CPUs that ``local`` says it has; by default the machine's.

    Raises:
        UserError: No cluster that fits answers there.
    """
    if "://" in address:
        raise UserError(
            f"--address {address} (or RAY_ADDRESS): not a cluster's address; give auto or HOST:PORT, leave it out to "
            f"stay on this machine, or send a job: bdkd submit --address {address} -- COMMAND"
        )
    try:
        if address not in ("auto", "local"):
            _knock(address)
        own = {"include_dashboard": False, "num_cpus": num_cpus} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    # RuntimeError: a cluster of other versions; RayError: it asks for a token.
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster that fits answers ({first_line(error)}); "
            "give auto, HOST:PORT or local"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See that somebody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=CONNECT_WITHIN_S).close()


def here() -> NodeAffinitySchedulingStrategy:
    """Return where to schedule what lives and dies with the driver: on its own node."""
    return on_node(ray.get_runtime_context().get_node_id())


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return how to schedule on one node and no other."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def cores(launch: Launch, workers: int) -> int:
    """Return how many CPUs a cluster of this machine says it has: so many workers are asked for by name, and share."""
    return max(usable_cores(), math.ceil(workers * launch.cpus_per_worker))


def claim(launch: Launch, cuda: bool) -> dict[str, float]:
    """Return what a worker claims of a node."""
    return {"CPU": launch.cpus_per_worker} | ({"GPU": launch.gpus_per_worker} if cuda else {})


def free(resources: dict[str, float]) -> str:
    """Say how much of some resources the cluster has free, e.g. ``0 of 4 CPU free on 2 node(s)``."""
    there, unused = ray.cluster_resources(), ray.available_resources()
    parts = [f"{unused.get(name, 0):g} of {there.get(name, 0):g} {name}" for name in resources]
    return f"{', '.join(parts)} free on {sum(node['Alive'] for node in ray.nodes())} node(s)"


def wanted(launch: Launch, resources: dict[str, float]) -> str:
    """Say what a run waits for, e.g. ``1 to 2 worker(s) of 1 CPU each``.

    Args:
        launch: How many workers.
        resources: What each claims.
    """
    low, high = launch.min_workers, launch.max_workers
    return f"{low if low == high else f'{low} to {high}'} worker(s) of {amounts(resources)} each"


def amounts(resources: dict[str, float]) -> str:
    """Say how much of some resources, e.g. ``1 CPU and 1 GPU``."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def holds(resources: dict[str, float]) -> bool:
    """Return whether a node is there that has so much, free or not."""
    return any(
        node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in resources.items())
        for node in ray.nodes()
    )


def draining() -> set[str]:
    """Return the ids of nodes that are about to be taken away.

    Ray 2.60 tells a driver of them by no public name; ``ray.train.get_preemption_info`` is for workers, and a barrier.
    """
    return set(ray._private.state.state.get_draining_nodes())


def kill(processes: list[tuple[str, int]], timeout_s: float) -> int:
    """Kill processes, each a node's id and a pid, whatever they are stuck in; return how many were there."""
    killing = [
        ray.remote(_kill).options(num_cpus=0, scheduling_strategy=on_node(node_id)).remote(pid)
        for node_id, pid in processes
    ]
    done, _ = ray.wait(killing, num_returns=len(killing), timeout=timeout_s)
    return sum(_answer(task) for task in done)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _answer(task: Any) -> bool:
    try:
        return ray.get(task)
    except ray.exceptions.RayError:  # the node is gone, and the process with it
        return False
