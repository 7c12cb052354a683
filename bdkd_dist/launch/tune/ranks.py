"""The other ranks of a trial that trains with several workers: actors in the trial's own placement group."""

import os
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bdkd_dist import config
from bdkd_dist.config import Launch, Recipe
from bdkd_dist.engine.control import Control
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.stepper import release
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.vigil import FIRST_STEP_S
from bdkd_dist.launch.worker import training

ENDS_WITHIN_S = 5.0
"""How long a rank may take to end after it has left the others."""
CLOSED_WITHIN_S = 30.0
TOGETHER_WITHIN = timedelta(minutes=3)
"""A rank whose process dies before it joins is not waited for longer; a process may have to import torch first."""


class Rank:
    """A rank but the first. What it raises it raises after it has left the group: the others need not wait for it."""

    def __init__(self, cuda: bool):
        self.device = torch.device("cuda" if cuda else "cpu")
        self._stack = ExitStack()
        self._trainer: Trainer | None = None

    def node(self) -> str:
        """Return the id of the node that it is on."""
        return ray.get_runtime_context().get_node_id()

    def open(self, recipe: dict[str, Any], master: tuple[str, int], rank: int, world: int, local_world: int) -> None:
        """Join the group and build the trainer; see :func:`training`."""
        with self._leaving():
            os.environ["LOCAL_WORLD_SIZE"] = str(local_world)
            of_trial = config.from_dict(recipe)
            torch.set_num_threads(max(1, int(of_trial.launch.cpus_per_worker)))
            join(dist.TCPStore(*master, is_master=False), rank, world, self.device)
            folder = RunFolder.of(of_trial)
            self._trainer = self._stack.enter_context(
                training(of_trial, folder, self.device, (), Control(), lambda line: None)
            )
            self._trainer.start()

    def train_epoch(self) -> None:
        """See :meth:`Trainer.run_epoch`."""
        assert self._trainer is not None
        with self._leaving():
            self._trainer.run_epoch()

    def close(self) -> None:
        """Leave the group."""
        self._trainer = None
        self._stack.close()
        self._stack = ExitStack()
        release()
        leave()

    def _leaving(self) -> ExitStack:
        """Return a context that leaves the group where its block raises."""
        stack = ExitStack()
        stack.push(lambda kind, error, trace: leave() if kind is not None else None)
        return stack


class Ranks:
    """A trial's other ranks, as the first one sees them; of a trial with one worker there are none.

    Args:
        launch: How many workers a trial has, and what each claims.
        cuda: Whether they compute on GPUs.
    """

    def __init__(self, launch: Launch, cuda: bool):
        self.world, self.launch, self.cuda = launch.min_workers, launch, cuda
        self._actors: list[Any] = []
        self._working: list[Any] = []

    def open(self, recipe: Recipe) -> int:
        """Have the others build their trainers, and join their group; return how many ranks this node has."""
        if self.world == 1:
            return 1
        self._start()
        mine = ray.get_runtime_context().get_node_id()
        nodes = [mine, *ray.get([actor.node.remote() for actor in self._actors])]
        host = ray.util.get_node_ip_address()
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._working = [
            actor.open.remote(recipe.to_dict(), (host, store.port), rank, self.world, nodes.count(nodes[rank]))
            for rank, actor in enumerate(self._actors, 1)
        ]
        join(store, 0, self.world, torch.device("cuda" if self.cuda else "cpu"))
        return nodes.count(mine)

    def train_epoch(self) -> None:
        """Have the others train an epoch, beside this rank."""
        self._working += [actor.train_epoch.remote() for actor in self._actors]

    def wait(self) -> None:
        """Wait until the others have done what they were asked, and raise what ended one of them."""
        working, self._working = self._working, []
        ray.get(working)

    def cause_of(self, error: BaseException) -> BaseException:
        """Return what another rank failed of, where an error here may only be that it is missed."""
        if isinstance(error, RayTaskError):
            return error.cause
        done, _ = ray.wait(self._working, num_returns=len(self._working), timeout=ENDS_WITHIN_S)
        for task in done:
            try:
                ray.get(task)
            except RayTaskError as other:
                return other.cause
            except RayError:
                pass  # it died
        return error

    def close(self) -> None:
        """Have everybody leave the group; the actors that can stay for the next trial."""
        if self.world > 1 and self._actors:
            closing = [actor.close.remote() for actor in self._actors]
            leave()
            closed, _ = ray.wait(closing, num_returns=len(closing), timeout=CLOSED_WITHIN_S)
            if len(closed) < len(closing):
                self.end()

    def end(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._working = [], []
        leave()

    def _start(self) -> None:
        if self._actors:
            return
        group = ray.util.get_current_placement_group()
        for bundle in range(1, self.world):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            gpus = self.launch.gpus_per_worker if self.cuda else 0
            options = {"num_cpus": self.launch.cpus_per_worker, "num_gpus": gpus, "scheduling_strategy": strategy}
            self._actors.append(ray.remote(Rank).options(**options).remote(self.cuda))


def join(store: dist.TCPStore, rank: int, world: int, device: torch.device) -> None:
    """Become a rank of the group that meets at a store, once all of them are there; not all ever may be."""
    store.set(f"there/{rank}", "yes")
    store.wait([f"there/{other}" for other in range(world)], TOGETHER_WITHIN)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # By default half an hour: less than a node may take to copy its data while the others wait for it.
    patience = timedelta(seconds=FIRST_STEP_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
