"""A run on the workers of a Ray cluster: DDP under Ray Train's TorchTrainer.

Checkpoints are the engine's own, in the run folder: a restarted worker group goes on from the newest of them, so
nothing depends on when Ray registers a checkpoint. Lost workers are started again; an exception in the training itself
would come again, so it is told and ends the run.
"""

import math
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback

from bdkd_dist.config import Recipe, with_absolute_paths
from bdkd_dist.data.node_folder import node_folder
from bdkd_dist.engine.observer import Observer
from bdkd_dist.errors import first_line
from bdkd_dist.launch import cluster
from bdkd_dist.launch.local import stop_on_signal, wants_cuda
from bdkd_dist.launch.ray_worker import ENDS, ENDS_OF_ONE_RANK, is_loss, ray_worker
from bdkd_dist.launch.relay import Relay
from bdkd_dist.launch.vigil import TALK_WITHIN_S, Vigil, WorkersLost, patience_s

POLL_S = 0.5
RESIZE_EVERY_S = 30.0
"""How often an elastic run looks whether there is room for more workers."""
CHECKPOINT_WITHIN_S = 60.0
"""What is not kept by then is computed again."""
END_WITHIN_S = 60.0
"""How long the other ranks may take to end once rank 0 has."""
START_TIMEOUT_S = 30
"""How long Ray holds on to places that it has asked for; then it looks again at what the cluster has."""


class Restarts(UserCallback):
    """Tells the driver that workers died and start again; called in the controller of Ray Train."""

    def __init__(self, relay: Any, max_failures: int):
        self.relay, self.max_failures, self.failures = relay, max_failures, 0
        self._taken_away: set[str] = set()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """See :class:`UserCallback`."""
        ray.get(self.relay.forget_workers.remote())
        if taken := {str(error) for error in worker_exceptions.values() if _was_taken_away(error)}:
            # Ray Train comes back with the same exceptions until the announced time is over, and counts none of them.
            if not taken <= self._taken_away:
                self._warn("a node was taken away; all workers start again from the newest checkpoint")
            self._taken_away |= taken
            return
        self.failures += 1
        if self.failures <= self.max_failures:
            self._warn(
                f"{_lost(worker_exceptions)}; all workers start again from the newest checkpoint "
                f"(restart {self.failures} of at most {self.max_failures})"
            )

    def _warn(self, line: str) -> None:
        ray.get(self.relay.tell.remote("warn", pickle.dumps((line,))))


class CheckpointFirst(ControllerCallback):
    """Lets the workers checkpoint before Ray Train ends them to start another number of them.

    Ray 2.60 has the hook for its own callbacks alone; ``RunConfig`` takes those too.
    """

    def __init__(self, relay: Any):
        self.relay = relay

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """See Ray's ``ControllerCallback``; called before the first start and restarts too, where nobody is there."""
        until_s = time.monotonic() + CHECKPOINT_WITHIN_S
        ray.get(self.relay.order.remote("checkpoint"))
        while ray.get(self.relay.is_awaited.remote("checkpoint")) and time.monotonic() < until_s:
            time.sleep(POLL_S)


def train(recipe: Recipe, progress: Observer, warn: Callable[[str], None], address: str | None = None) -> None:
    """Train with ``launch.workers`` DDP workers. See :func:`work` for what it raises.

    Args:
        recipe: What to train.
        progress: Shows the run to a person.
        warn: Says one line to the person.
        address: Of the cluster; without one, of this machine alone, for this run.

    Raises:
        WorkersLost: Workers died too often, or there was no room for them for too long; the state is kept.
    """
    launch = recipe.launch
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    with cluster.connected(address or "local", cluster.cores(launch, launch.max_workers)):
        # A cluster that starts GPU nodes on demand shows none yet: there launch.device=cuda says that they are wanted.
        cuda = wants_cuda(recipe, None if address is None else ray.cluster_resources().get("GPU", 0))
        resources = cluster.claim(launch, cuda)
        relay = ray.remote(Relay).options(num_cpus=0, scheduling_strategy=cluster.here()).remote()
        trainer = TorchTrainer(
            ray_worker,
            train_loop_config={"recipe": with_absolute_paths(recipe).to_dict(), "relay": relay},
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
                # By default half an hour: less than a node may take to copy its data while the others wait for it.
                timeout_s=round(patience_s(launch, begun=False) + TALK_WITHIN_S),
            ),
            scaling_config=ScalingConfig(
                num_workers=launch.workers,
                use_gpu=cuda,
                resources_per_worker=resources,
                placement_strategy=launch.placement.upper(),
                elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            ),
            run_config=RunConfig(
                name=recipe.run.name,
                storage_path=str(node_folder() / "ray"),  # its own notes; the run's state is kept by the engine
                failure_config=FailureConfig(max_failures=launch.max_failures),
                callbacks=[Restarts(relay, launch.max_failures), CheckpointFirst(relay)],
            ),
        )
        try:
            method, arguments = _fit(trainer, relay, Vigil(relay, launch, resources, warn), progress, warn)
        except WorkerGroupError as error:
            raise WorkersLost(
                f"launch.max_failures={launch.max_failures}: {_lost(error.worker_failures)} and no restart is left; "
                "the state is kept, the same command goes on"
            ) from None
    assert method in ENDS, "Ray Train ended without an error and rank 0 did not say how"
    if (kind := ENDS[method]) is not None:
        raise kind(*arguments)


def _fit(
    trainer: Any, relay: Any, vigil: Vigil, progress: Observer, warn: Callable[[str], None]
) -> tuple[str, tuple[Any, ...]]:
    """Run the trainer beside a loop that shows what the relay brings; return how rank 0 ended."""
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread
            failure.append(error)

    # Ray takes SIGINT for itself when fit() runs in the main thread, and aborts without a checkpoint.
    thread = threading.Thread(target=fit, daemon=True)
    outcome: tuple[str, tuple[Any, ...]] = ("", ())
    with stop_on_signal(warn) as pressed:
        thread.start()
        asked, end_by_s = False, math.inf
        while True:
            alive = thread.is_alive()
            for method, pickled in ray.get(relay.drain.remote()):
                arguments = pickle.loads(pickled)
                if method in ENDS:
                    outcome = (method, arguments)
                elif method == "warn":
                    warn(*arguments)
                else:
                    getattr(progress, method)(*arguments)
            if pressed() and not asked:
                relay.request_stop.remote()
                asked = True
            if not alive or outcome[0] in ENDS_OF_ONE_RANK or time.monotonic() > end_by_s:
                break
            if outcome[0]:
                end_by_s = min(end_by_s, time.monotonic() + END_WITHIN_S)
            else:
                vigil.look()
                if asked and vigil.alone:  # there is nobody who could stop with a checkpoint
                    raise KeyboardInterrupt
            time.sleep(POLL_S)
    if failure and outcome[0] not in ENDS_OF_ONE_RANK:
        raise failure[0]
    return outcome


def _was_taken_away(error: Exception) -> bool:
    """Whether a worker's node went as it had announced."""
    return getattr(getattr(error, "health_check_failure", error), "preempted", False)


def _lost(worker_exceptions: dict[int, Exception]) -> str:
    """Say which workers were lost, apart from those that only miss them."""
    ranks = sorted(rank for rank, error in worker_exceptions.items() if not is_loss(error))
    if ranks:
        return f"lost the worker of rank {', '.join(map(str, ranks))}"
    return f"lost the connection between workers ({first_line(next(iter(worker_exceptions.values())))})"
