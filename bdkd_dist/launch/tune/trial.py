"""A trial of a search, in a process of its own that serves one trial after the other.

The trial's first rank trains in this very process; where a trial has several, the others are actors in the trial's
placement group, so that Ray ends them, and frees what they hold, with the trial. What a trial needs to go on is in its
run folder, as for every run: Ray keeps no state of it, apart from what one trial takes over from another.
"""

import json
import math
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from ray.tune import Trainable

from bdkd_dist import config
from bdkd_dist.config import PLACES, Recipe
from bdkd_dist.engine.checkpoint import Checkpoints, checkpoint_name, loads
from bdkd_dist.engine.control import Control
from bdkd_dist.engine.endings import Diverged
from bdkd_dist.engine.loop import Trainer
from bdkd_dist.engine.observer import EvalLog, Observer
from bdkd_dist.engine.patience import patiently
from bdkd_dist.engine.stepper import release
from bdkd_dist.errors import Fault, UnfitNode, UserError, first_line
from bdkd_dist.files import json_text
from bdkd_dist.launch.mirror import METRICS
from bdkd_dist.launch.ray_worker import is_loss
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.tune.folder import RECORD, TAKEN
from bdkd_dist.launch.tune.ranks import Ranks
from bdkd_dist.launch.worker import enough_memory, training
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.hparams import HParams
from bdkd_dist.records.metric_lines import MetricLines, flat, validations
from bdkd_dist.records.tensorboard import TensorBoardObserver
from bdkd_dist.records.trials import Trial

CHECKPOINT = "checkpoint.pt"
NEEDED_THERE = {*PLACES, "data.dataset", "data.num_classes", "data.image_px", "data.stage"}
"""Keys that say what a node must have: where they are a trial's own values, these may be what is wrong."""
SHOWN_METRICS = ("top1", "ece", "nll")


class Evaluated(Observer):
    """Keeps the last evaluation that the loop told of."""

    def __init__(self) -> None:
        self.epoch, self.step, self.metrics = -1, -1, dict[str, float]()

    def evaluated(self, log: EvalLog) -> None:
        """See :meth:`Observer.evaluated`."""
        self.epoch, self.step = log.epoch, log.step
        self.metrics = flat({name: diagnosis.metrics for name, diagnosis in log.networks.items()})


class TrialProcess(Trainable):
    """What Ray Tune starts for trials. A ``step`` is the training up to the next evaluation.

    Ray's ``config`` is ``{"trial": {"number", "name", "values"}}``; what all trials share comes by
    ``tune.with_parameters``.
    """

    _trainer: Trainer | None

    def setup(self, config: dict[str, Any], recipe: dict[str, Any], goal: Goal, replays: bool, cuda: bool) -> None:
        """See Ray's ``Trainable``.

        Args:
            config: Of the first trial.
            recipe: That all trials vary; ``run.storage`` is the folder of trials, for every node.
            goal: What trials are measured by.
            replays: Whether a trial that goes on says again what it said before, for a scheduler that forgot it.
            cuda: Whether trials compute on GPUs.
        """
        self.recipe, self.goal, self.replays = config_of(recipe), goal, replays
        self.device = torch.device("cuda" if cuda else "cpu")
        self.ranks = Ranks(self.recipe.launch, cuda)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """See Ray's ``Trainable``: the process takes another trial, or the same one with other values."""
        before, lacking = self.folder, ""
        try:
            self._close()
        except Exception as error:  # of the trial before, which has ended; not of the one that begins
            lacking = f"the last records of {before} may be lacking ({type(error).__name__}: {first_line(error)})"
            self.ranks.end()
        release()
        self._begin(new_config)
        if lacking:
            self._warn(lacking)
        return True

    def step(self) -> dict[str, Any]:
        """See Ray's ``Trainable``. A trial that fails by itself says so; only lost processes and nodes are raised."""
        began = time.monotonic()
        try:
            report = self._next_report()
        except (Exception, SystemExit) as error:
            cause = self.ranks.cause_of(error) if is_loss(error) else error
            if is_loss(cause):
                # Another process goes on from what is in the folder: nothing more is written there by this one.
                self._abandoned = self._stack.pop_all()
                self._trainer = None
                self.ranks.end()
                raise
            return self._failed(cause)
        metrics = report["metrics"]
        return {
            **report,
            **result_of(self.goal, metrics),
            "values": self.values,
            "wall_s": time.monotonic() - began,
            "warnings": self._warnings(),
            "done": report["finished"],
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """See Ray's ``Trainable``: the state that another trial takes over."""
        content = self._taken_over or Checkpoints(self.folder.checkpoints, self._warn).read_newest()[1]
        Path(checkpoint_dir, CHECKPOINT).write_bytes(content)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """See Ray's ``Trainable``: go on from another trial's state, unless that was done before.

        What Ray keeps of a trial itself is no newer than what is in its folder.
        """
        self._close()
        if self._taken is not None and self._taken != taken_before(self.folder, self._warn):
            self._taken_over = Path(checkpoint_dir, CHECKPOINT).read_bytes()

    def cleanup(self) -> None:
        """See Ray's ``Trainable``."""
        self._close()
        self.ranks.end()

    def _begin(self, config: dict[str, Any]) -> None:
        trial = config["trial"]
        self.values: dict[str, Any] = trial["values"]
        self.folder = RunFolder(self.recipe.run.storage) / trial["name"]
        self._taken, self._resumed = trial.get("taken"), trial.get("resumed", False)
        self._run = {"run.name": trial["name"]}
        self._stack = ExitStack()
        self._trainer = None
        self._hparams: HParams | None = None
        self._evaluated = Evaluated()
        self._past: deque[dict[str, Any]] = deque()
        self._taken_over = b""
        self._said: list[str] = []

    def _next_report(self) -> dict[str, Any]:
        trainer = self._trainer or self._open()
        if self._past:
            report = self._past.popleft()
        else:
            with enough_memory(trainer.recipe):
                while self._evaluated.epoch != trainer.epoch:
                    self.ranks.train_epoch()
                    trainer.run_epoch()
                    self.ranks.wait()
            report = {"epoch": trainer.epoch, "step": trainer.step, "metrics": self._evaluated.metrics}
            self._evaluated.epoch = -1
        finished = report["epoch"] == trainer.recipe.train.epochs
        if finished:
            self._close()
        return {**report, "finished": finished}

    def _open(self) -> Trainer:
        # The driver wrote it before it asked for the trial. First of all: nothing is to be written where it is not.
        if not patiently(lambda: self.folder.sees(RECORD), self._warn):
            raise UnfitNode(
                f"run.storage: {self.folder}, where the search was begun, is not seen; "
                "give a path that all nodes share, or a URI (s3://…)"
            )
        first = next(role for role in self.recipe.models.by_role if role != "teacher")
        self._hparams = HParams(self.folder.path, self.values, tuple(f"val/{first}/{name}" for name in SHOWN_METRICS))
        recipe = config.replace(self.recipe, self.values | self._run)
        os.environ["LOCAL_WORLD_SIZE"] = str(self.ranks.open(recipe))
        torch.set_num_threads(max(1, int(recipe.launch.cpus_per_worker)))
        folder = self.folder
        if taking := bool(self._taken_over):
            take_over(folder, self._taken_over, {"taken": self._taken, "values": self.values}, self._warn)
            self._taken_over = b""
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.describe(recipe, self._warn)
        observers: list[Observer] = [
            TensorBoardObserver(folder.path, recipe.to_yaml()),
            MetricLines(folder.path),
            self._hparams,
            self._evaluated,
        ]
        trainer = self._stack.enter_context(training(recipe, folder, self.device, observers, Control(), self._warn))
        trainer.start()
        self._trainer = trainer
        # What lies behind a state that was taken over the donor has said.
        self._past = deque([] if taking else self._unheard(validations(folder.path / METRICS, trainer.epoch), recipe))
        return trainer

    def _unheard(self, past: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
        """Return which of its reports the trial has to say (again): what the driver did not hear, or its scheduler."""
        if self._resumed and self.replays:
            return past
        record = patiently(lambda: self.folder.place.find(RECORD), self._warn)
        heard = Trial.from_json(record).reports[-1:] if record is not None else []
        unheard = [report for report in past if not heard or report["epoch"] > heard[0].epoch]
        # One whose end was heard and that is asked again says that again: there is nothing to train.
        return unheard or [report for report in past[-1:] if report["epoch"] == recipe.train.epochs]

    def _failed(self, error: BaseException) -> dict[str, Any]:
        match error:
            case UnfitNode():
                reason = error.named
            case Diverged():
                reason = error.what
            case UserError() | Fault():
                reason = first_line(error)
            case _:
                reason = f"{type(error).__name__}: {first_line(error)}"
                self._warn("".join(traceback.format_exception(error)).rstrip())
        self._close(failed=True)
        self.ranks.end()
        return {
            "failed": reason,
            "of_node": isinstance(error, UnfitNode) and NEEDED_THERE.isdisjoint(self.values),
            "values": self.values,
            "warnings": self._warnings(),
            "done": True,
        }

    def _close(self, failed: bool = False) -> None:
        """Close what is open of the trial; all of it lies in its folder then."""
        trainer, self._trainer = self._trainer, None
        if trainer is None and not failed:
            return
        if self._hparams is not None:
            self._hparams.end(failed)
        self._stack.close()
        self._stack = ExitStack()
        self.ranks.close()

    def _warn(self, line: str) -> None:
        self._said.append(line)

    def _warnings(self) -> list[str]:
        said, self._said = self._said, []
        return said


OBJECTIVES = ("objective_0", "objective_1")
"""Where a result holds the goal's parts, each to be made small."""
WORST = 1e9
"""In place of a score that is no number: schedulers interpolate between scores."""


def result_of(goal: Goal, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what search and scheduler look at in a report; smaller is better."""
    parts = dict(zip(OBJECTIVES, goal.objectives(metrics), strict=False))
    scores = {"goal": goal.score(metrics), **parts}
    return {name: score if math.isfinite(score) else WORST for name, score in scores.items()}


def config_of(recipe: dict[str, Any]) -> Recipe:
    """Return the recipe; ``config`` is a name that Ray's interface takes."""
    return config.from_dict(recipe)


def take_over(folder: RunFolder, content: bytes, mark: dict[str, Any], say: Callable[[str], None]) -> None:
    """Put another trial's checkpoint in the place of a trial's own, and write down that it was done.

    Killed in between, the trial has one or the other whole.
    """
    name = checkpoint_name(loads(content)["step"])
    place = folder.place
    patiently(lambda: place.write(f"checkpoints/{name}", content), say)
    for own in patiently(folder.kept, say):
        if own != name:
            patiently(lambda own=own: place.delete(f"checkpoints/{own}"), say)  # type: ignore[misc]
    patiently(lambda: place.write(TAKEN, json_text(mark)), say)


def taken_before(folder: RunFolder, say: Callable[[str], None]) -> dict[str, int] | None:
    """Return what a trial took over last, see :func:`take_over`."""
    content = patiently(lambda: folder.place.find(TAKEN), say)
    return None if content is None else json.loads(content)["taken"]
