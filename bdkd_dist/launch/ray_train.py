"""A run on several workers of this machine: DDP under Ray Train's TorchTrainer.

Checkpoints are the engine's own, in the run folder: a restarted worker group goes on from the newest of them, so
nothing depends on when Ray registers a checkpoint. Lost workers are started again; an exception in the training itself
would come again, so it is told and ends the run.
"""

import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from bdkd_dist import config
from bdkd_dist.config import Recipe
from bdkd_dist.data.loader import DataError
from bdkd_dist.engine import distributed
from bdkd_dist.engine.loop import Diverged, Interrupted
from bdkd_dist.engine.observer import EvalLog, Observer, StepLog
from bdkd_dist.errors import UserError, first_line
from bdkd_dist.launch.local import stop_on_sigint, wants_cuda
from bdkd_dist.launch.relay import Relay
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.worker import work

POLL_S = 0.25


class WorkersLost(RuntimeError):
    """Workers died more often than they may be started again."""


class Broken(RuntimeError):
    """An exception of the training itself on one rank: says which rank, and its trace."""


ENDS = {
    "finished": None,
    "interrupted": Interrupted,
    "diverged": Diverged,
    "mistaken": UserError,
    "damaged": DataError,
    "broken": Broken,
}
"""How a rank says that it ended, and what the driver raises."""
ENDS_OF_ONE_RANK = ("mistaken", "damaged", "broken")
"""Where one rank ends so, the others wait for it in vain."""


class RelayedProgress:
    """An observer whose calls reach the driver's."""

    def __init__(self, tell: Callable[..., None]):
        self.tell = tell

    def start(self, step: int, total_steps: int) -> None:
        """See :meth:`Observer.start`."""
        self.tell("start", step, total_steps)

    def stepped(self, log: StepLog) -> None:
        """See :meth:`Observer.stepped`."""
        self.tell("stepped", log)

    def evaluated(self, log: EvalLog) -> None:
        """See :meth:`Observer.evaluated`."""
        self.tell("evaluated", replace(log, entropies={}))  # for figures, which are drawn here

    def flush(self) -> None:
        """See :meth:`Observer.flush`."""

    def close(self) -> None:
        """See :meth:`Observer.close`; the driver closes its own."""


class Restarts(UserCallback):
    """Tells the driver that workers died and start again; called in the controller of Ray Train."""

    def __init__(self, relay: Any, max_failures: int):
        self.relay, self.max_failures, self.failures = relay, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """See :class:`UserCallback`."""
        self.failures += 1
        if self.failures <= self.max_failures:
            line = (
                f"{_lost(worker_exceptions)}; all workers start again from the newest checkpoint "
                f"(restart {self.failures} of at most {self.max_failures})"
            )
            ray.get(self.relay.tell.remote("warn", pickle.dumps((line,))))


def train(recipe: Recipe, folder: RunFolder, progress: Observer, warn: Callable[[str], None]) -> None:
    """Train with ``launch.workers`` DDP workers on this machine. See :func:`work` for what it raises."""
    cuda = wants_cuda(recipe)
    workers = recipe.launch.workers
    # More workers than cores may share them: they are asked for by name, so they get them.
    ray.init(
        address="local",
        num_cpus=max(workers, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        relay = ray.remote(num_cpus=0)(Relay).remote()
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "recipe": _with_absolute_paths(recipe).to_dict(),
                "folder": folder.path.absolute(),
                "relay": relay,
            },
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cuda else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=cuda, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=recipe.run.name,
                storage_path=str(folder.path.absolute() / "ray"),
                failure_config=FailureConfig(max_failures=recipe.launch.max_failures),
                callbacks=[Restarts(relay, recipe.launch.max_failures)],
            ),
        )
        _raise(_fit(trainer, relay, progress, warn))
    except WorkerGroupError as error:
        raise WorkersLost(
            f"launch.max_failures={recipe.launch.max_failures}: {_lost(error.worker_failures)} and no restart is left; "
            "the state is kept, the same command goes on"
        ) from None
    finally:
        ray.shutdown()


def _fit(trainer: Any, relay: Any, progress: Observer, warn: Callable[[str], None]) -> tuple[str, tuple[Any, ...]]:
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
    with stop_on_sigint(warn) as pressed:
        thread.start()
        asked = False
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
            if not alive or outcome[0] in ENDS_OF_ONE_RANK:
                break
            time.sleep(POLL_S)
    if failure and outcome[0] not in ENDS_OF_ONE_RANK:
        raise failure[0]
    return outcome


def _raise(outcome: tuple[str, tuple[Any, ...]]) -> None:
    method, arguments = outcome
    assert method in ENDS, "Ray Train ended without an error and rank 0 did not say how"
    if (kind := ENDS[method]) is not None:
        raise kind(*arguments)


def _is_loss(error: Exception) -> bool:
    """Whether a rank's exception speaks of a device or another rank that was lost, and may be there after a restart."""
    kinds = (torch.distributed.DistError, torch.AcceleratorError, RayError)
    gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)  # names its source file, has no class of its own
    return gloo or isinstance(error, kinds)


def _lost(worker_exceptions: dict[int, Exception]) -> str:
    """Say which workers were lost, apart from those that only miss them."""
    ranks = sorted(rank for rank, error in worker_exceptions.items() if not _is_loss(error))
    if ranks:
        return f"lost the worker of rank {', '.join(map(str, ranks))}"
    return f"lost the connection between workers ({first_line(next(iter(worker_exceptions.values())))})"


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe for workers, whose working directory is another."""
    places = {"prepared": str(Path(recipe.data.prepared).expanduser().absolute())}
    if recipe.data.root is not None and "://" not in recipe.data.root:
        places["root"] = str(Path(recipe.data.root).expanduser().absolute())
    if recipe.data.stage_folder is not None:
        places["stage_folder"] = str(Path(recipe.data.stage_folder).expanduser().absolute())
    networks = {}
    if recipe.models.teacher_checkpoint is not None:
        networks["teacher_checkpoint"] = str(Path(recipe.models.teacher_checkpoint).expanduser().absolute())
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=places),
            "models": recipe.models.model_copy(update=networks),
        }
    )


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker. Ends that a restart cannot mend are told, not raised: Ray would try again."""
    recipe, relay = config.from_dict(settings["recipe"]), settings["relay"]

    def tell(method: str, *arguments: Any) -> None:
        ray.get(relay.tell.remote(method, pickle.dumps(arguments)))

    def tell_once(method: str, *arguments: Any) -> None:
        if distributed.rank() == 0:
            tell(method, *arguments)

    def should_stop() -> bool:
        return distributed.rank() == 0 and ray.get(relay.stop_requested.remote())

    try:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // distributed.world_size()))
        work(
            recipe,
            RunFolder(settings["folder"]),
            get_device(),
            RelayedProgress(tell),
            should_stop,
            lambda line: tell_once("warn", line),
        )
        tell_once("finished")
    except Interrupted as stop:
        tell_once("interrupted", stop.step, stop.checkpoint)
    except Diverged as error:
        tell_once("diverged", str(error))
    except UserError as error:
        tell("mistaken", str(error))
    except DataError as error:
        tell("damaged", str(error))
    except Exception as error:
        if _is_loss(error):
            raise
        tell("broken", f"rank {distributed.rank()} failed\n{traceback.format_exc()}")
