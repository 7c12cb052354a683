"""What tries values and what stops trials: Ray Tune's own, brought to where a search was cut off."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher
from ray.tune.search.sample import Categorical, Domain, Integer, LogUniform, Quantized

from bdkd_dist.errors import UserError
from bdkd_dist.launch.tune.space import Space
from bdkd_dist.launch.tune.trial import OBJECTIVES, result_of
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.trials import Trial

LISTED = ("grid", "random")
SEARCHES = (*LISTED, "tpe")
SCHEDULERS = ("none", "asha", "hyperband", "median", "pbt")
REDUCTION = 3
BRACKETS = 3
STARTUP_TRIALS = 8
"""So many trials TPE draws at random before it models."""


@dataclass(frozen=True)
class Plan:
    """What a search is to do."""

    space: Space
    goal: Goal
    goal_name: str
    """As the user gave it."""
    search: str
    scheduler: str
    num_trials: int
    seed: int
    epochs: int
    """Of a trial that is not stopped."""

    def name_of(self, number: int, values: dict[str, Any]) -> str:
        """Return the name of a trial's run folder."""
        return f"{number:04d}-{self.space.text_of(values)}".rstrip("-")


def check_domains(search: str, space: Space) -> None:
    """Raise UserError where a search cannot draw from a domain of the space: Optuna has no steps on a logarithm."""
    for key, domain in space.space.items():
        sampler = domain.get_sampler() if search == "tpe" and isinstance(domain, Domain) else None
        if isinstance(sampler, Quantized) and isinstance(sampler.sampler, LogUniform):
            kind = "randint" if isinstance(domain, Integer) else "uniform"
            raise UserError(
                f"--search tpe: {key} is tune.qlog{kind}, whose steps it does not keep; use --search random, "
                f"or tune.q{kind} or tune.log{kind}"
            )


def listed(plan: Plan) -> list[dict[str, Any]]:
    """Return the trials of a search that knows all of them before it begins."""
    return [
        {"number": number, "name": plan.name_of(number, values), "values": values}
        for number, values in enumerate(plan.space.draws(plan.num_trials, plan.seed))
    ]


def asked_for(plan: Plan, trials: Sequence[Trial]) -> tuple[Any, dict[str, Any], int]:
    """Return Ray's search algorithm, its space, and how many trials to ask it for.

    Args:
        plan: What the search is to do.
        trials: What it did before it was cut off; those that run go on.
    """
    ended = {trial.number for trial in trials if trial.status != "running"}
    running = [trial for trial in trials if trial.status == "running"]
    if plan.search in LISTED:
        changed = {trial.number: _going_on(trial) for trial in running}
        left = [trial | changed.get(trial["number"], {}) for trial in listed(plan) if trial["number"] not in ended]
        return None, {"trial": tune.grid_search(left)}, 1
    return Suggested(plan, [t for t in trials if t.number in ended], running), {}, plan.num_trials - len(ended)


class Suggested(Searcher):
    """Optuna's TPE (Bergstra et al. 2011; of several goals Ozaki et al. 2020), whose trials are numbered."""

    def __init__(self, plan: Plan, ended: Sequence[Trial], running: Sequence[Trial]):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pareto = plan.goal.is_pareto
        metrics, modes = (list(OBJECTIVES), ["min", "min"]) if pareto else ("goal", "min")
        super().__init__(metric=metrics, mode=modes)
        self.plan = plan
        domains = {key: value for key, value in plan.space.space.items() if isinstance(value, Domain)}
        self._constants = {key: value for key, value in plan.space.space.items() if key not in domains}
        points = [{key: (trial.values | trial.unused)[key] for key in domains} for trial in (*ended, *running)]
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS,
            multivariate=True,
            constant_liar=True,  # trials under way are taken for bad ones, so that others look elsewhere
            seed=(plan.seed + len(points)) % 2**32,  # else going on would draw the first trials' values again
        )
        self._inner = OptunaSearch(
            OptunaSearch.convert_search_space(domains),
            metric=metrics,
            mode=modes,
            points_to_evaluate=points,
            sampler=sampler,
        )
        self._numbers = _numbers(ended, running)
        self._running = {trial.number: trial for trial in running}
        for trial in ended:
            self._inner.suggest(trial.name)
            failed = trial.status == "failed" or not trial.reports
            result = {} if failed else result_of(plan.goal, trial.reports[-1].metrics)
            self.on_trial_complete(trial.name, result, error=failed)

    def __getstate__(self) -> dict[str, Any]:  # Ray notes it down; nothing is read from there
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """See Ray's ``Searcher``."""
        suggested = self._inner.suggest(trial_id)
        if suggested is None:
            return None
        chosen = self._constants | {key: plain(value) for key, value in suggested.items()}
        values = self.plan.space.fitting(chosen)
        number = next(self._numbers)
        trial = {
            "number": number,
            "name": self.plan.name_of(number, values),
            "values": values,
            "unused": {key: value for key, value in chosen.items() if key not in values},
        }
        return {"trial": trial | (_going_on(self._running[number]) if number in self._running else {})}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See Ray's ``Searcher``; a trial that failed by itself ended without an error for Ray."""
        failed = error or not result or "failed" in result
        self._inner.on_trial_complete(trial_id, None if failed else result, error=failed)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """See Ray's ``Searcher``; TPE looks at the last result alone."""

    def save(self, checkpoint_path: str) -> None:
        """See Ray's ``Searcher``; the trials' own records are what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """See Ray's ``Searcher``."""


def scheduler_of(plan: Plan, trials: Sequence[Trial]) -> TrialScheduler:
    """Return Ray's scheduler, told of the trials that have ended; those that go on repeat their reports themselves."""
    scheduler = _new_scheduler(plan)
    if plan.scheduler in ("none", "pbt"):
        return scheduler
    for trial in trials:
        if trial.status != "running" and trial.reports:
            past: Any = _Past(trial.name)
            scheduler.on_trial_add(past, past)
            results = [result_of(plan.goal, r.metrics) | {"epoch": r.epoch} for r in trial.reports]
            for result in results:
                if scheduler.on_trial_result(past, past, result) == TrialScheduler.STOP:
                    break
            scheduler.on_trial_complete(past, past, results[-1])
    return scheduler


class _Past:
    """A trial of before, as far as schedulers look at it; and a controller without others."""

    status = "TERMINATED"

    def __init__(self, trial_id: str):
        self.trial_id = trial_id

    def get_live_trials(self) -> list[Any]:
        """Nobody trains yet."""
        return []


class Median(MedianStoppingRule):
    """Stops what is worse than the median of the others' averages; whoever failed has none."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See Ray's ``TrialScheduler``."""
        if "goal" not in result:
            self._results.pop(trial, None)
        else:
            super().on_trial_complete(tune_controller, trial, result)


def _going_on(trial: Trial) -> dict[str, Any]:
    """Return what a trial that goes on is told besides its number."""
    return {"name": trial.name, "values": trial.values, "taken": trial.taken, "resumed": True}


def _new_scheduler(plan: Plan) -> TrialScheduler:
    # Bracket and exploitation are drawn from these.
    random.seed(plan.seed)
    np.random.seed(plan.seed % 2**32)  # noqa: NPY002
    seen: dict[str, Any] = {"time_attr": "epoch", "metric": "goal", "mode": "min"}
    # Rounded up: of 240 epochs a ninth rounded down would leave a third comparison, at 234, just before the end.
    grace = math.ceil(plan.epochs / REDUCTION**2)
    match plan.scheduler:
        case "asha" | "hyperband":
            return AsyncHyperBandScheduler(
                **seen,
                max_t=plan.epochs,
                grace_period=grace,
                reduction_factor=REDUCTION,
                brackets=1 if plan.scheduler == "asha" else brackets(plan.epochs),
            )
        case "median":
            # An endless time slice: else trials yield to each other, and each time their states are written.
            return Median(**seen, grace_period=grace, min_samples_required=3, min_time_slice=math.inf)
        case "pbt":
            return Population(
                plan.space,
                **seen,
                perturbation_interval=max(1, plan.epochs // 10),
                hyperparam_mutations={"trial": {"values": _mutations(plan.space)}},
                log_config=False,
                require_attrs=False,
            )
    return FIFOScheduler()


def brackets(epochs: int) -> int:
    """Return into how many brackets trials are drawn: each first compares a rung later, the third never."""
    return min(BRACKETS, int(np.log(epochs) / np.log(REDUCTION)) + 1)


def _mutations(space: Space) -> dict[str, Any]:
    """Return what may change in a trial; a choice moves to a neighbour in its list."""
    domains = {key: value for key, value in space.space.items() if isinstance(value, Domain)}
    return {key: list(value.categories) if isinstance(value, Categorical) else value for key, value in domains.items()}


class Population(PopulationBasedTraining):
    """Population based training (Jaderberg et al. 2017) whose values stay within the space.

    A trial that takes over another's weights and values stays the trial that it was.
    """

    def __init__(self, space: Space, **settings: Any):
        super().__init__(**settings)
        self._space = space

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See Ray's ``TrialScheduler``; a trial that goes on after a cut is not changed at its first report."""
        state, every = self._trial_state[trial], self._perturbation_interval
        if state.last_score is None and "epoch" in result:
            state.last_perturbation_time = max(state.last_perturbation_time, (result["epoch"] - 1) // every * every)
        return super().on_trial_result(tune_controller, trial, result)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        values = {key: plain(value) for key, value in config["trial"]["values"].items()}
        values = self._space.within(values)  # Ray multiplies by 0.8 or 1.2 wherever that leads
        taken = {
            "number": trial_to_clone.config["trial"]["number"],
            "epoch": self._trial_state[trial_to_clone].last_result["epoch"],
        }
        return {**config, "trial": trial.config["trial"] | {"values": values, "taken": taken}}, operations


def _numbers(ended: Sequence[Trial], running: Sequence[Trial]) -> Iterator[int]:
    yield from (trial.number for trial in running)
    number = 1 + max((trial.number for trial in (*ended, *running)), default=-1)
    while True:
        yield number
        number += 1


def plain(value: Any) -> Any:
    """Return a value without NumPy's type."""
    return value.item() if isinstance(value, np.generic) else value
