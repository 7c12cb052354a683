"""The records of a search's trials while Ray Tune runs them, and what a person sees of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune import Callback, Stopper

from bdkd_dist.errors import UserError
from bdkd_dist.launch import cluster
from bdkd_dist.launch.tune.algorithms import Plan
from bdkd_dist.launch.tune.folder import SearchFolder
from bdkd_dist.launch.tune.places import SearchCluster
from bdkd_dist.launch.vigil import WorkersLost
from bdkd_dist.records.progress import duration
from bdkd_dist.records.search_progress import SearchProgress
from bdkd_dist.records.trials import Report, Trial

SHOWN_EVERY_S = 0.5
WAITING_SAID_EVERY_S = 30.0


class OnWish(Stopper):
    """Stops the search once somebody wants that."""

    def __init__(self, wished: Callable[[], bool]):
        self._wished = wished

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """See Ray's ``Stopper``."""
        return False

    def stop_all(self) -> bool:
        """See Ray's ``Stopper``."""
        return self._wished()

    def __getstate__(self) -> dict[str, Any]:  # Ray notes it down; nothing is read from there
        return {}


class Ledger(Callback):
    """Keeps the record of every trial, and shows them.

    Attributes:
        cause: Why the search is to end before its trials have: there was no room for any of them for
            ``launch.wait_timeout_s``, or a node lacks what trials need, and would end one after the other.
    """

    def __init__(
        self,
        folder: SearchFolder,
        plan: Plan,
        trials: dict[int, Trial],
        there: SearchCluster,
        progress: SearchProgress,
        warn: Callable[[str], None],
        pressed: Callable[[], bool],
    ):
        self.folder, self.plan, self.trials, self.there = folder, plan, trials, there
        self.progress, self.warn, self.pressed = progress, warn, pressed
        self.cause: Exception | None = None
        self._shown_s = 0.0
        self._idle_since_s = self._waiting_said_s = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:  # as above
        return {}

    def ends(self) -> bool:
        """Whether the search is to end before its trials have."""
        return self.pressed() or self.cause is not None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray's ``Callback``."""
        given = trial.config["trial"]
        number = given["number"]
        if number not in self.trials:
            self.trials[number] = _new(given)
            self.folder.record(self.trials[number])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Ray's ``Callback``."""
        record = self.trials[trial.config["trial"]["number"]]
        for line in result["warnings"]:
            self.warn(f"trial {record.number:04d}: {line}")
        record.values = result["values"]
        if result.get("of_node"):
            self.cause = UserError(f"{result['failed']}; the same command goes on")
        elif "failed" in result:
            record.status, record.reason = "failed", result["failed"]
        else:
            taken = trial.config["trial"].get("taken")
            if taken is not None and taken != record.taken:
                record.take_over(self.trials[taken["number"]], taken["epoch"])
            self._report(record, result)
        self.folder.record(record)
        self._show(trials, at_once=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray's ``Callback``."""
        record = self.trials.get(trial.config["trial"]["number"])
        if record is not None and record.status == "running" and not self.ends():
            record.status = "stopped"
            self.folder.record(record)
            self._show(trials, at_once=True)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray's ``Callback``."""
        self.warn(f"trial {trial.config['trial']['number']:04d} lost a process or node; it goes on from its checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray's ``Callback``."""
        given = trial.config["trial"]
        record = self.trials.setdefault(given["number"], _new(given))
        times = self.there.launch.max_failures
        last = str(trial.get_error() or "").strip().splitlines()[-1:]
        record.status = "failed"
        record.reason = ": ".join([f"given up after launch.max_failures={times} losses", *last])
        self.folder.record(record)
        self._show(trials, at_once=True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """See Ray's ``Callback``."""
        self._show(trials)

    def _report(self, record: Trial, result: dict[str, Any]) -> None:
        epoch = result["epoch"]
        if not record.reports or record.reports[-1].epoch < epoch:
            record.reports.append(Report(epoch, result["metrics"], result["values"], result["wall_s"]))
            record.device_s += result["wall_s"] * self.there.devices
        if result["finished"]:
            record.status = "finished"

    def _show(self, trials: Sequence[Any], at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._shown_s < SHOWN_EVERY_S:
            return
        self._shown_s = now
        training = {trial.config["trial"]["number"] for trial in trials if trial.status == "RUNNING"}
        # Ray's word for a trial that has just ended comes a moment later.
        running = sum(record.status == "running" for number, record in self.trials.items() if number in training)
        waiting = self._waiting(now) if not running else ""
        if running:
            self._idle_since_s = now
        self.progress.update(sorted(self.trials.values(), key=lambda t: t.number), running, waiting)

    def _waiting(self, now_s: float) -> str:
        """Return what the search waits for, once that is worth a word; every half minute it is said in a line."""
        waited_s, bundle, launch = now_s - self._idle_since_s, self.there.bundle, self.there.launch
        if waited_s < WAITING_SAID_EVERY_S:
            return ""
        waiting = f"{cluster.wanted(launch, bundle)} since {duration(waited_s)}; {cluster.free(bundle)}"
        if waited_s > launch.wait_timeout_s:
            self.cause = WorkersLost(
                f"launch.wait_timeout_s={launch.wait_timeout_s:g}: gave up waiting for {waiting}; "
                "the state is kept, the same command goes on"
            )
        elif now_s - self._waiting_said_s > WAITING_SAID_EVERY_S:
            self._waiting_said_s = now_s
            self.warn(f"waiting for {waiting}")
        return f"waiting for {waiting}"


def _new(given: dict[str, Any]) -> Trial:
    return Trial(given["number"], given["name"], given["values"], unused=given.get("unused", {}))
