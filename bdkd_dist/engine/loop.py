"""The training loop of one rank: steps, logs, evaluations, checkpoints, and going on exactly where a run was cut.

No step waits for the device here: per-step values go into a buffer there and are read every
``train.log_every_steps`` steps.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdkd_dist import __version__, distributed
from bdkd_dist.config import Recipe
from bdkd_dist.data.appearance import Appearance
from bdkd_dist.data.dataset import Dataset
from bdkd_dist.data.loader import Batch, Loader
from bdkd_dist.data.mixing import Mixing
from bdkd_dist.data.order import (
    Indices,
    epoch_order,
    num_batches,
    quasi_random_order,
    rank_batches,
    rank_shard,
)
from bdkd_dist.data.targets import smoothed
from bdkd_dist.engine.batchnorm import synchronise
from bdkd_dist.engine.checkpoint import Checkpoints, load_teacher
from bdkd_dist.engine.control import Control, Wish
from bdkd_dist.engine.endings import Diverged, Interrupted
from bdkd_dist.engine.evaluate import Evaluator
from bdkd_dist.engine.observer import EvalLog, NetworkDiagnosis, Observer, StepLog
from bdkd_dist.engine.optim import learning_rate
from bdkd_dist.engine.pair import build_pair
from bdkd_dist.engine.past_predictions import PastPredictions
from bdkd_dist.engine.patience import patiently
from bdkd_dist.engine.stepper import Stepper
from bdkd_dist.errors import UserError


class Trainer:
    """Trains the recipe's pair on this rank.

    Args:
        recipe: What to train.
        dataset: Its images.
        loaders: ``train`` and ``validation``.
        device: Where this rank computes.
        checkpoints: Where its state goes; a state found there is gone on from.
        observer: Told what happens, on rank 0.
        control: Told of every step, and asked between steps what is wanted.

    Attributes:
        step: Optimiser steps done.
        evaluator: Of the epochs.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        loaders: dict[str, Loader],
        device: torch.device,
        checkpoints: Checkpoints,
        observer: Observer,
        control: Control | None = None,
    ):
        self.recipe, self.dataset, self.loaders = recipe, dataset, loaders
        self.device, self.checkpoints, self.observer = device, checkpoints, observer
        self.control = control or Control()
        self.rank, self.world = distributed.rank(), distributed.world_size()
        images = len(dataset.train.indices)
        if recipe.train.batch_size > images:
            raise UserError(f"train.batch_size={recipe.train.batch_size}: larger than the {images} training images")
        self.steps_per_epoch = num_batches(images, recipe.train.batch_size)
        self.total_steps = self.steps_per_epoch * recipe.train.epochs
        self.appearance = Appearance.training(recipe.data, recipe.train.seed)
        self.mixing = Mixing.training(recipe.data, recipe.train.seed)
        self.pair = build_pair(recipe, device)
        if recipe.objective.uses_past:
            samples = int(dataset.train.indices.max()) + 1
            self.pair.past = PastPredictions(len(self.pair.networks), samples, recipe.data.num_classes, device)
        if recipe.train.batchnorm == "sync" and self.world > 1:
            synchronise(self.pair, device, recipe.train.compile)
        self.stepper = Stepper(self.pair, recipe, device)
        self.step = self.epoch = self.step_in_epoch = 0
        self.history = torch.empty(0)
        self._averaged = 0  # so many rows of it are means over ranks already
        if (state := checkpoints.load_newest(device)) is not None:
            self._load(state)
        elif recipe.models.teacher_checkpoint is not None:
            teacher = self.pair.networks["teacher"]
            if self.rank == 0:
                load_teacher(teacher, recipe.models.teacher_checkpoint)
            distributed.broadcast_(teacher.state_dict().values())
        self.stepper.join()
        self.evaluator = Evaluator(
            self.pair,
            self.networks,
            recipe.data.num_classes,
            device,
            self.control.beat,
            precise=False,
            replayed=self.stepper.replayed,
        )

    def precise_evaluator(self) -> Evaluator:
        """Return what measures the networks as they are exported, in float32, and not as training saw them."""
        return Evaluator(self.pair, self.networks, self.recipe.data.num_classes, self.device, self.control.beat)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks to evaluate, by name."""
        return dict(self.pair.networks.items()) | self.stepper.averages

    def run(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            Interrupted: ``control`` wants it to stop; the state is kept.
            Diverged: A loss is not finite; the checkpoint before it is kept.
        """
        self.start()
        while not self.finished:
            self.run_epoch()

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained."""
        return self.epoch >= self.recipe.train.epochs

    def start(self) -> None:
        """Tell the observer where the run begins or goes on; comes once, before the first epoch."""
        patiently(
            lambda: self.observer.start(self.step, self.total_steps), self.checkpoints.warn, self.checkpoints.pause
        )
        self._clock, self._clock_step = time.perf_counter(), self.step
        self.pair.train()

    def run_epoch(self) -> None:
        """Train to the end of an epoch, with its evaluation where one is due, and checkpoint. See :meth:`run`."""
        self._train_epoch()
        self._end_epoch()

    def _train_epoch(self) -> None:
        settings = self.recipe.train
        order = self._order()
        batches = rank_batches(order, settings.batch_size, self.rank, self.world, first_step=self.step_in_epoch)
        for batch in self.loaders["train"].batches(self.epoch, batches):
            self._train_step(batch)
            if self.step % settings.log_every_steps == 0:
                self._log()
            self.control.beat()
            wish = self._agreed_wish()
            if wish == Wish.STOP:
                raise Interrupted(self.step, self.checkpoints.name(self._save()))
            every = settings.checkpoint_every_steps
            # The last step of an epoch is kept after its evaluation, so that going on does not evaluate twice; unless
            # there may be no time for that.
            due = every and self.step % every == 0 and self.step_in_epoch < self.steps_per_epoch
            if due or wish == Wish.CHECKPOINT:
                self._save()
            if wish == Wish.CHECKPOINT:  # the machine may go as soon as it is said to be there
                self.checkpoints.wait()

    def _order(self) -> Indices:
        """Return the order of this epoch's samples."""
        data, train, subset = self.recipe.data, self.recipe.train, self.dataset.train
        if data.order == "random":
            return epoch_order(subset.indices, train.seed, self.epoch)
        pages = subset.beton.pages[subset.indices]
        return quasi_random_order(subset.indices, pages, train.seed, self.epoch, train.batch_size)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a batch's images and targets on the device, with what augmentation is done there."""
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        images = self.appearance(images, batch.indices, self.epoch)
        classes = self.recipe.data.num_classes
        images, targets = self.mixing(images, labels, batch.indices, self.epoch, classes)
        return images, smoothed(targets, self.recipe.train.label_smoothing, classes)

    def _train_step(self, batch: Batch) -> None:
        # Dropout draws from (seed, step, rank), so no generator's state has to be kept.
        torch.manual_seed(hash((self.recipe.train.seed, self.step, self.rank)) % 2**63)
        larger = len(self.dataset.train) % self.steps_per_epoch
        global_batch = len(self.dataset.train) // self.steps_per_epoch + (self.step_in_epoch < larger)
        lr, progress = self._learning_rate(self.step), self.step / self.total_steps
        self._remember(self.stepper(*self._on_device(batch), batch.indices, lr, progress, global_batch))
        self.step += 1
        self.step_in_epoch += 1

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            self.steps_per_epoch,
            self.recipe.train.epochs,
            self.recipe.optimizer.lr,
            self.recipe.schedule,
        )

    def _remember(self, values: Tensor) -> None:
        """Keep this step's values on the device until the next log."""
        if self.history.numel() == 0:
            self.history = values.new_zeros(self.recipe.train.log_every_steps, len(values))
        self.history[self.step % len(self.history)].copy_(values)

    def _read_history(self, steps: int) -> Tensor:
        """Return the last ``steps`` rows, averaged over ranks, on the CPU; stops the run where one is not finite."""
        if steps > self._averaged:
            distributed.mean_(self.history[self._averaged : steps])
            self._averaged = steps
        rows = self.history[:steps].cpu()
        losses = [column for column, name in enumerate(self.stepper.names) if name.endswith("/loss")]
        bad = (~rows[:, losses].isfinite()).any(1).nonzero()
        if len(bad):
            row = int(bad[0])
            first = self.step - steps + row + 1
            said = ", ".join(f"{self.stepper.names[c].removesuffix('/loss')} {float(rows[row, c]):g}" for c in losses)
            kept = self.checkpoints.paths()
            name = self.checkpoints.name(kept[-1]) if kept else ""
            back = f"the checkpoint before it is {name}" if kept else "there is no checkpoint before it"
            raise Diverged(
                f"the loss is not finite at step {first} ({said}); {back}",
                "train again under another run.name with a lower optimizer.lr or with optimizer.clip_grad_norm",
            )
        return rows

    def _read_pending(self) -> Tensor:
        """Return the rows since the last log."""
        pending = self.step % self.recipe.train.log_every_steps
        return self._read_history(pending) if pending else torch.empty(0)

    def _log(self) -> None:
        interval = len(self.history)
        means = self._read_history(interval).mean(0).tolist()
        self._averaged = 0
        scalars = {f"train/{name}": value for name, value in zip(self.stepper.names, means, strict=True)}
        lr = self._learning_rate(self.step - 1)
        scalars |= {f"lr/{group['name']}": lr for group in self.stepper.optimizer.param_groups}
        progress = (self.step - 1) / self.total_steps
        scalars |= {f"objective/{name}": schedule.at(progress) for name, schedule in self.pair.schedules.items()}
        now = time.perf_counter()
        seconds_per_step = (now - self._clock) / max(1, self.step - self._clock_step)
        self._clock, self._clock_step = now, self.step
        self.observer.stepped(
            StepLog(
                step=self.step,
                total_steps=self.total_steps,
                epoch=self.epoch,
                scalars=scalars,
                images_per_s=len(self.dataset.train) / self.steps_per_epoch / seconds_per_step,
                remaining_s=seconds_per_step * (self.total_steps - self.step),
            )
        )

    def _agreed_wish(self) -> Wish:
        """Return what to do now. Several ranks ask each other only where they wait for each other anyway."""
        if self.world > 1 and self.device.type != "cpu" and self.step % self.recipe.train.log_every_steps:
            return Wish.GO_ON
        return Wish(distributed.largest(self.control.wish(), self.device))

    def _end_epoch(self) -> None:
        self._read_pending()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        last = self.epoch == self.recipe.train.epochs
        if last or self.epoch % self.recipe.train.evaluate_every_epochs == 0:
            began = time.perf_counter()
            self._evaluate()
            self._clock += time.perf_counter() - began  # images/s speaks of training alone
        self._save()

    def _evaluate(self) -> None:
        subset = self.dataset.validation
        batches = rank_shard(subset.indices, self.recipe.train.batch_size, self.rank, self.world)
        states, entropies = self.evaluator.diagnose(self.loaders["validation"].batches(0, batches))
        if self.rank == 0:
            networks = {name: NetworkDiagnosis(state.compute(), state.reliability()) for name, state in states.items()}
            self.observer.evaluated(EvalLog(self.step, self.epoch, networks, entropies))

    def _save(self) -> Path:
        """Checkpoint the run as it stands between two steps."""
        rows = self._read_pending()
        if self.pair.past is not None:
            self.pair.past.exchange()
        if not bool(torch.stack([p.isfinite().all() for p in self.pair.parameters()]).all()):
            raise Diverged(
                f"a weight is not finite after step {self.step}, though the losses were",
                "train again under another run.name with a lower optimizer.lr or with optimizer.clip_grad_norm",
            )
        if self.rank == 0:
            patiently(self.observer.flush, self.checkpoints.warn, self.checkpoints.pause)
            path = self.checkpoints.save(self.step, self._state(rows))
        else:
            path = self.checkpoints.folder
        return path

    def _state(self, rows: Tensor) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            **self.stepper.state_dict(),
            "history": rows,
            "recipe": self.recipe.to_dict(),
            "data_fingerprint": self.dataset.fingerprint,
            "versions": {"bdkd-dist": __version__, "torch": str(torch.__version__)},
        }

    def _load(self, state: dict[str, Any]) -> None:
        if state["data_fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"{self.checkpoints.name(self.checkpoints.folder)} was trained on other data (fingerprint "
                f"{state['data_fingerprint'][:12]}, now {self.dataset.fingerprint[:12]}); choose another run.name"
            )
        self.step, self.epoch, self.step_in_epoch = state["step"], state["epoch"], state["step_in_epoch"]
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        self.stepper.load_state_dict(state)
        rows = state["history"]
        if rows.numel():
            self.history = torch.zeros(
                self.recipe.train.log_every_steps, rows.shape[1], dtype=torch.float64, device=self.device
            )
            self.history[: len(rows)] = rows
            self._averaged = len(rows)
