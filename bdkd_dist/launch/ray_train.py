"""A run on several workers of this machine: DDP under Ray Train's TorchTrainer.

Checkpoints are the engine's own, in the run folder: a restarted worker group goes on from the newest of them, so
nothing depends on when Ray registers a checkpoint.
"""

import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from bdkd_dist import config
from bdkd_dist.config import Recipe
from bdkd_dist.data.loader import DataError
from bdkd_dist.engine import distributed
from bdkd_dist.engine.loop import Diverged, Interrupted
from bdkd_dist.engine.observer import EvalLog, Observer, StepLog
from bdkd_dist.errors import UserError
from bdkd_dist.launch.local import stop_on_sigint, wants_cuda
from bdkd_dist.launch.relay import Relay
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.worker import work

POLL_S = 0.25
ENDS = {"finished": None, "interrupted": Interrupted, "diverged": Diverged, "mistaken": UserError, "damaged": DataError}
"""How a rank says that it ended, and what the driver raises."""


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
        self.tell("evaluated", log)

    def flush(self) -> None:
        """See :meth:`Observer.flush`."""

    def close(self) -> None:
        """See :meth:`Observer.close`; the driver closes its own."""


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
            ),
        )
        _raise(_fit(trainer, relay, progress, warn))
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
            # Where one rank fails the others wait for it: they are not waited for here.
            if not alive or outcome[0] in ("mistaken", "damaged"):
                break
            time.sleep(POLL_S)
    if failure:
        raise failure[0]
    return outcome


def _raise(outcome: tuple[str, tuple[Any, ...]]) -> None:
    method, arguments = outcome
    assert method in ENDS, "Ray Train ended without an error and rank 0 did not say how"
    if (kind := ENDS[method]) is not None:
        raise kind(*arguments)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe for workers, whose working directory is another."""
    places = {"cache": str(Path(recipe.data.cache).expanduser().absolute())}
    if recipe.data.root is not None:
        places["root"] = str(Path(recipe.data.root).expanduser().absolute())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=places)})


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

    device = get_device()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // distributed.world_size()))
    try:
        work(
            recipe,
            RunFolder(settings["folder"]),
            device,
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
