"""What every Ray Train worker runs, and how it says how it ended."""

import pickle
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.train.torch import get_device

from bdkd_dist import config, distributed
from bdkd_dist.cores import usable_cores
from bdkd_dist.data.loader import DataError
from bdkd_dist.engine.endings import Diverged, Interrupted
from bdkd_dist.engine.observer import EvalLog, Observer, StepLog
from bdkd_dist.errors import UnfitNode, UserError
from bdkd_dist.launch.lease import Superseded
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.watch import Watch
from bdkd_dist.launch.worker import work


class Broken(RuntimeError):
    """An exception of the training itself on one rank: says which rank, and its trace."""


ENDS = {
    "finished": None,
    "interrupted": Interrupted,
    "diverged": Diverged,
    "mistaken": UserError,
    "damaged": DataError,
    "superseded": Superseded,
    "broken": Broken,
}
"""How a rank says that it ended, and what the driver raises."""
ENDS_OF_ONE_RANK = ("mistaken", "damaged", "superseded", "broken")
"""Where one rank ends so, the others wait for it in vain."""


class RelayedProgress(Observer):
    """Passes calls on to the driver's observer, which the driver closes itself."""

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


def ray_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker. Ends that a restart cannot mend are told, not raised: Ray would try again."""
    recipe, relay = config.from_dict(settings["recipe"]), settings["relay"]

    def tell(method: str, *arguments: Any) -> None:
        ray.get(relay.tell.remote(method, pickle.dumps(arguments)))

    def tell_once(method: str, *arguments: Any) -> None:
        if distributed.rank() == 0:
            tell(method, *arguments)

    folder = RunFolder.of(recipe)
    watch = Watch(relay, distributed.rank(), distributed.world_size())
    try:
        if distributed.rank() == 0:
            folder.check_seen(recipe)
        torch.set_num_threads(max(1, usable_cores() // distributed.local_world_size()))
        work(
            recipe,
            folder,
            get_device(),
            RelayedProgress(tell),
            watch,
            lambda line: tell_once("warn", line),
        )
        tell_once("finished")
    except Interrupted as stop:
        tell_once("interrupted", stop.step, stop.checkpoint)
    except Diverged as error:
        tell_once("diverged", str(error))
    except UserError as error:
        tell("mistaken", error.named if isinstance(error, UnfitNode) else str(error))
    except DataError as error:
        tell("damaged", str(error))
    except Superseded as error:
        if watch.is_current():  # else by the workers that were started in place of these
            tell("superseded", str(error))
    except (Exception, SystemExit) as error:
        if is_loss(error):
            raise
        tell("broken", f"rank {distributed.rank()} failed\n{traceback.format_exc()}")


def is_loss(error: BaseException) -> bool:
    """Whether a rank's exception speaks of a device or another rank that was lost, and may be there after a restart."""
    kinds = (torch.distributed.DistError, torch.AcceleratorError, RayError)
    if isinstance(error, torch.AcceleratorError) and re.search("device-side assert|illegal (memory|instr)", str(error)):
        return False  # of the code that ran there: it would come again
    gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)  # names its source file, has no class of its own
    return gloo or isinstance(error, kinds)
