"""The cluster that a search runs on, and what its trials claim of it."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray

from bdkd_dist.config import Recipe
from bdkd_dist.launch import cluster
from bdkd_dist.launch.local import wants_cuda
from bdkd_dist.launch.vigil import LOOK_EVERY_S, SAY_EVERY_S, WorkersLost
from bdkd_dist.records.progress import duration

RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials keep records of their own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # only losses reach Ray, and are said in a line
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nothing is read from Ray's own notes
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new kind describes the search even where it is asked to be silent
}


class SearchCluster:
    """Connects when there is something to do; a block with it ends that.

    Args:
        address: Of the cluster; without one, of this machine alone.
        recipe: Whose workers compute there.
    """

    def __init__(self, address: str | None, recipe: Recipe):
        self.address, self.recipe, self.launch, self.cuda = address, recipe, recipe.launch, False
        self._stack = ExitStack()
        self._connected = False

    def connect(self) -> None:
        """Connect, once."""
        if self._connected:
            return
        os.environ.update(RAY_SETTINGS)
        cpus = cluster.cores(self.launch, self.launch.min_workers)
        self._stack.enter_context(cluster.connected(self.address or "local", cpus))
        self._connected = True
        self.cuda = wants_cuda(self.recipe, None if self.address is None else ray.cluster_resources().get("GPU", 0))

    @property
    def bundle(self) -> dict[str, float]:
        """What a worker claims."""
        return cluster.claim(self.launch, self.cuda)

    @property
    def options(self) -> dict[str, float]:
        """The same, as Ray's tasks and actors take it."""
        return {f"num_{name.lower()}s": amount for name, amount in self.bundle.items()}

    @property
    def devices(self) -> float:
        """How many devices a trial holds."""
        each = self.launch.gpus_per_worker if self.cuda else self.launch.cpus_per_worker
        return self.launch.min_workers * each

    def wait(self, tasks: list[Any], say: Callable[[str], None]) -> tuple[list[Any], list[Any]]:
        """Wait until one of some tasks that claim a bundle has ended; return those that have, and the others.

        Raises:
            WorkersLost: For ``launch.wait_timeout_s`` the cluster has had no node that could run them.
        """
        held_s = said_s = time.monotonic()
        while True:
            done, others = ray.wait(tasks, timeout=LOOK_EVERY_S)
            now_s = time.monotonic()
            if done:
                return done, others
            if cluster.holds(self.bundle):
                held_s = said_s = now_s
                continue
            waiting = f"a node with {cluster.amounts(self.bundle)} since {duration(now_s - held_s)}"
            if now_s - held_s > (limit_s := self.launch.wait_timeout_s):
                raise WorkersLost(f"launch.wait_timeout_s={limit_s:g}: gave up waiting for {waiting}")
            if now_s - said_s >= SAY_EVERY_S:
                said_s = now_s
                say(f"waiting for {waiting}; {cluster.free(self.bundle)}")

    def __enter__(self) -> "SearchCluster":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
