"""The driver's watch over the workers of a run: those it waits for, those that stall, those whose node goes."""

import time
from collections.abc import Callable
from typing import Any

import ray

from bdkd_dist.config import Launch
from bdkd_dist.errors import Fault
from bdkd_dist.launch import cluster
from bdkd_dist.launch.relay import Workers
from bdkd_dist.records.progress import duration

LOOK_EVERY_S = 1.0
SAY_EVERY_S = 30.0
SILENT_S = 15.0
"""Workers that said nothing for so long are waited for: they are gone, or start again."""
FIRST_STEP_S = 3600.0
"""At least so long may pass before the first step, in which data may be copied and networks compiled."""
TALK_WITHIN_S = 600.0
"""Ranks give up on each other by themselves so long after the vigil would have started them again."""
STACKS_WITHIN_S = 10.0
KILL_WITHIN_S = 30.0


def patience_s(launch: Launch, begun: bool) -> float:
    """Return how long no worker may finish a step: the first, in which data may be copied, takes its time."""
    return launch.stall_timeout_s if begun else max(FIRST_STEP_S, launch.stall_timeout_s)


class WorkersLost(Fault):
    """Workers died more often than they may be started again, or the cluster had no room for them for too long."""


class Vigil:
    """Watches the workers of a run.

    Args:
        relay: The actor that they talk to.
        launch: How many there should be, and how patient to be.
        resources: What each claims, by Ray's names.
        warn: Says a line to the person.

    Attributes:
        waiting: Whether no complete group of workers is heard.
        alone: Whether no complete group of workers is there.
    """

    def __init__(self, relay: Any, launch: Launch, resources: dict[str, float], warn: Callable[[str], None]):
        self.relay, self.launch, self.resources, self.warn = relay, launch, resources, warn
        self.waiting = self.alone = True
        self._next_look_s = self._waiting_since_s = self._said_at_s = time.monotonic()
        self._size: int | None = None
        self._draining: set[str] = set()

    def look(self) -> None:
        """Look now, unless that was done just before; say and do what follows.

        Raises:
            WorkersLost: There was no complete group of workers for ``launch.wait_timeout_s``.
        """
        if (now_s := time.monotonic()) < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_EVERY_S
        workers: Workers = ray.get(self.relay.workers.remote())
        self.alone = not workers.complete
        if workers.complete and workers.idle_s > patience_s(self.launch, workers.begun):
            self._restart(workers)
        elif workers.complete and workers.silent_s < SILENT_S:
            self.waiting = False
            self._see_size(workers)
            self._see_draining(workers)
        else:
            self._wait(workers, now_s)

    def _wait(self, workers: Workers, now_s: float) -> None:
        if not self.waiting:
            self.waiting = True
            self._waiting_since_s = self._said_at_s = now_s
        waited_s, wanted = now_s - self._waiting_since_s, cluster.wanted(self.launch, self.resources)
        if waited_s > self.launch.wait_timeout_s:
            raise WorkersLost(
                f"launch.wait_timeout_s={self.launch.wait_timeout_s:g}: gave up waiting for {wanted}; "
                f"{cluster.free(self.resources)}; the state is kept, the same command goes on"
            )
        if now_s - self._said_at_s >= SAY_EVERY_S:
            self._said_at_s = now_s
            started = f", {len(workers.beats)} started" if workers.beats else ""
            self.warn(f"waiting for {wanted} since {duration(waited_s)}{started}; {cluster.free(self.resources)}")

    def _see_size(self, workers: Workers) -> None:
        size = len(workers.beats)
        if self._size is not None and size != self._size:
            self.warn(f"going on with {size} worker(s), {self._size} before; the batch stays what it is")
        self._size = size

    def _see_draining(self, workers: Workers) -> None:
        draining = cluster.draining()
        going = {beat.node: beat.host for beat in workers.beats.values() if beat.node in draining}
        if new := going.keys() - self._draining:
            hosts = ", ".join(going[node] for node in new)
            self.warn(f"node {hosts} is to be taken away; checkpointing now, going on until then")
            ray.get(self.relay.order.remote("checkpoint"))
        self._draining |= going.keys()

    def _restart(self, workers: Workers) -> None:
        """Show what every rank is doing, and kill them all: Ray Train starts them again."""
        ray.get(self.relay.order.remote("stacks"))
        deadline_s = time.monotonic() + STACKS_WITHIN_S
        while len(shown := ray.get(self.relay.stacks.remote())) < len(workers.beats):
            if time.monotonic() > deadline_s:
                break
            time.sleep(LOOK_EVERY_S)
        killed = cluster.kill([(beat.node, beat.pid) for beat in workers.beats.values()], KILL_WITHIN_S)
        ray.get(self.relay.forget_workers.remote())
        if not killed:  # they were gone already, and Ray Train has not said so
            return
        waited_for = "finished a step" if workers.begun else "come to its first step"
        self.warn(
            f"launch.stall_timeout_s={self.launch.stall_timeout_s:g}: no worker has {waited_for} for "
            f"{duration(workers.idle_s)}; what each was doing, before they start again:"
        )
        for rank, beat in sorted(workers.beats.items()):
            does = shown.get(rank, "gives no answer\n")
            self.warn(
                f"rank {rank} on {beat.host} (pid {beat.pid}), after {beat.done} steps and evaluation batches:\n{does}"
            )
