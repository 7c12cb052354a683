"""``bdkd tune``: a search over a recipe, by Ray Tune, that goes on where it was cut off."""

import shlex
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError
from rich.console import Console

from bdkd_dist import config
from bdkd_dist.config import Recipe, with_absolute_paths
from bdkd_dist.data.node_folder import node_folder
from bdkd_dist.errors import Interruption, UserError, unknown
from bdkd_dist.launch import preflight
from bdkd_dist.launch.local import stop_on_signal
from bdkd_dist.launch.run import check_fits, prepared
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.tune.algorithms import (
    LISTED,
    SCHEDULERS,
    SEARCHES,
    Plan,
    asked_for,
    check_domains,
    listed,
    scheduler_of,
)
from bdkd_dist.launch.tune.folder import SearchFolder
from bdkd_dist.launch.tune.ledger import Ledger, OnWish
from bdkd_dist.launch.tune.outcome import Found, evaluate_on_test
from bdkd_dist.launch.tune.places import SearchCluster
from bdkd_dist.launch.tune.space import load_space
from bdkd_dist.launch.tune.trial import TrialProcess
from bdkd_dist.launch.vigil import WorkersLost
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.printing import warner
from bdkd_dist.records.search_progress import SearchProgress
from bdkd_dist.records.search_tables import chosen
from bdkd_dist.records.trials import Trial
from bdkd_dist.uris import is_uri

NUM_TRIALS = 20
DEFAULTS = {"goal": "nll", "search": "tpe", "test": "best"}
TESTED = ("best", "all")
STATES_KEPT = 4
"""Of a trial, for others to take over."""


@dataclass(frozen=True)
class Asked:
    """What the command line says; None leaves it to the space's own defaults, and then to this file's."""

    goal: str | None = None
    subject_to: tuple[str, ...] = ()
    search: str | None = None
    scheduler: str | None = None
    num_trials: int | None = None
    seed: int = 0
    test: str | None = None


def default_name(space_path: str, recipe: str) -> list[str]:
    """Return what a search's run is called unless its user says so."""
    return [f"run.name={config.load(recipe).run.name}-{Path(space_path).stem}"]


def search(space_path: str, recipe: Recipe, asked: Asked, console: Console, address: str | None = None) -> Found:
    """Search over a recipe, going on where the folder ``run.storage/run.name`` holds the same search.

    Args:
        space_path: A file with a ``search_space()``.
        recipe: What its values are put into.
        asked: How to search.
        console: Where progress goes.
        address: Of the Ray cluster whose nodes train; without one this machine does.

    Raises:
        UserError: Something that the user can mend; of a node that is not fit what was found is kept.
        SearchInterrupted: Ctrl-C; what was found is kept.
        WorkersLost: There was no room for a trial for ``launch.wait_timeout_s``; what was found is kept.
    """
    plan, test = _planned(space_path, recipe, asked)
    warn, command = warner(console), shlex.join(["bdkd", *sys.argv[1:]])
    run = RunFolder.of(recipe)
    folder = SearchFolder(run, warn)
    first = listed(plan)[0]["values"] if plan.search in LISTED else plan.space.draws(1, plan.seed)[0]
    example = config.replace(recipe, first)
    preflight.check(example, run, on_cluster=address is not None)
    with run.locked(warn):
        identity = {
            "space_name": plan.space.name,
            "goal": plan.goal_name,
            "subject_to": list(asked.subject_to),
            "search": plan.search,
            "scheduler": plan.scheduler,
            "seed": plan.seed,
            "space": plan.space.text,
            # Its relative paths are of the folder that the search was begun in.
            **({"paths": list(places)} if (places := plan.space.absolute_paths) else {}),
        }
        folder.check_owner(recipe, identity)
        trials = {trial.number: trial for trial in folder.trials()}
        folder.describe(recipe, identity)
        left = plan.num_trials - sum(trial.status != "running" for trial in trials.values())
        if left < 0:
            warn(f"--num-trials {plan.num_trials}: {folder} holds {plan.num_trials - left} already")
        if left > 0:
            check_fits(example, prepared(example.data, console))
            console.print(
                _beginning(plan, recipe, folder, done=plan.num_trials - left), highlight=False, soft_wrap=True
            )
        with SearchCluster(address, recipe) as there:
            if left > 0:
                there.connect()
                _run_trials(folder, plan, recipe, trials, there, console, warn)
                folder.describe(recipe, identity, "GPU" if there.cuda else "CPU")
            ordered = [trials[number] for number in sorted(trials)]
            found = Found(folder, plan, recipe, ordered, chosen(ordered, plan.goal))
            wanted = found.chosen if test == "best" else [trial for trial in ordered if trial.status == "finished"]
            if untested := [trial for trial in wanted if not folder.run(trial).finished]:
                console.print(f"evaluating {len(untested)} trial(s) on the test split", highlight=False)
                there.connect()
            try:
                evaluate_on_test(folder, untested, there, warn)
            except (UserError, WorkersLost, RayTaskError):  # the others' results are there
                with suppress(UserError):
                    found.write(command)
                raise
            found.write(command)
    return found


def _beginning(plan: Plan, recipe: Recipe, folder: SearchFolder, done: int) -> str:
    students = recipe.models.student or " + ".join(recipe.models.students)
    return (
        f"searching {plan.space.name} over {recipe.models.teacher} → {students}: {plan.num_trials} trials of "
        f"{plan.epochs} epochs, goal {plan.goal_name}, {plan.search} with {plan.scheduler}, in {folder}"
        + (f"; {done} are done" if done else "")
    )


def _planned(space_path: str, recipe: Recipe, asked: Asked) -> tuple[Plan, str]:
    space = load_space(space_path, recipe)
    said = {key: getattr(asked, key) for key in ("goal", "search", "scheduler", "test")}
    choices = DEFAULTS | space.defaults | {key: value for key, value in said.items() if value is not None}
    size = space.grid_size()
    # What is to be compared, trial by trial, is trained to its end.
    choices.setdefault("scheduler", "none" if size is not None or choices["test"] == "all" else "asha")
    for key, allowed in {"search": SEARCHES, "scheduler": SCHEDULERS, "test": TESTED}.items():
        if choices[key] not in allowed:
            raise unknown(f"--{key}", str(choices[key]), allowed)
    search, scheduler = str(choices["search"]), str(choices["scheduler"])
    if asked.search is None and (size is not None or scheduler == "pbt"):
        search = "random" if size is None else "grid"
    if search == "tpe" and (size is not None or space.has_grid):
        raise UserError("--search tpe: the space has grids, which are tried whole; use --search grid or tune.choice")
    check_domains(search, space)
    if search == "grid" and size is None:
        raise UserError("--search grid: the space has ranges; use --search random or tpe, or tune.grid_search([…])")
    if scheduler == "pbt" and search not in LISTED:
        raise UserError(f"--search {search}: --scheduler pbt changes values itself (allowed: {', '.join(LISTED)})")
    num_trials = asked.num_trials
    if num_trials is None:
        num_trials = choices.get("num_trials") or size or NUM_TRIALS
    if num_trials < 1:
        raise UserError(f"--num-trials {num_trials} is not allowed; at least 1")
    if size is not None:
        num_trials = min(num_trials, size)
    if isinstance(recipe.launch.workers, tuple):
        raise UserError(
            f"launch.workers={list(recipe.launch.workers)}: a trial has a fixed number; the search itself takes "
            "in nodes that join"
        )
    plan = Plan(
        space=space,
        goal=Goal.parse(str(choices["goal"]), asked.subject_to, _evaluated(recipe)),
        goal_name=str(choices["goal"]),
        search=search,
        scheduler=scheduler,
        num_trials=num_trials,
        seed=asked.seed,
        epochs=recipe.train.epochs,
    )
    return plan, str(choices["test"])


def _evaluated(recipe: Recipe) -> list[str]:
    """Return the networks that evaluations measure, by name."""
    students = [role for role in recipe.models.by_role if role != "teacher"]
    averages = [f"{name}_ema" for name in students] if recipe.train.ema_decay else []
    return [*students, *averages, "teacher"]


def _run_trials(
    folder: SearchFolder,
    plan: Plan,
    recipe: Recipe,
    trials: dict[int, Trial],
    there: SearchCluster,
    console: Console,
    warn: Callable[[str], None],
) -> None:
    """Have Ray Tune run the trials that are left; ``trials`` is what there is of all of them afterwards."""
    base = _for_trials(recipe, folder)
    past = list(trials.values())
    algorithm, param_space, num_samples = asked_for(plan, past)
    trainable = tune.with_resources(
        tune.with_parameters(
            TrialProcess, recipe=base.to_dict(), goal=plan.goal, replays=plan.scheduler != "pbt", cuda=there.cuda
        ),
        tune.PlacementGroupFactory([there.bundle] * recipe.launch.min_workers, recipe.launch.placement.upper()),
    )
    progress = SearchProgress(console, plan.goal, plan.num_trials)
    stopping = "stopping; the same command goes on from the trials' checkpoints"
    with stop_on_signal(warn, stopping) as pressed, _ray_notes(folder, plan) as notes:
        ledger = Ledger(folder, plan, trials, there, progress, warn, pressed)
        tuner = tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tune.TuneConfig(
                search_alg=algorithm, scheduler=scheduler_of(plan, past), num_samples=num_samples, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                **notes,
                stop=OnWish(ledger.ends),
                callbacks=[ledger],
                failure_config=tune.FailureConfig(max_failures=recipe.launch.max_failures),
                # A trial's state lies in its own folder: at its end Ray has nothing to keep, and would look for a place
                # that only this node has.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=STATES_KEPT, checkpoint_at_end=False),
                verbose=0,
            ),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuner.fit()
        finally:
            progress.close()
        done = sum(trial.status != "running" for trial in trials.values())
        if ledger.cause is not None:
            raise ledger.cause
        if pressed() and done < plan.num_trials:
            raise SearchInterrupted(f"stopped with {done} of {plan.num_trials} trials done")


class SearchInterrupted(Interruption):
    """Ctrl-C came; finished trials and the checkpoints of the others are kept."""


def _for_trials(recipe: Recipe, folder: SearchFolder) -> Recipe:
    """Return the recipe that trials vary, for processes with another working directory that share a node's cores."""
    absolute = with_absolute_paths(recipe)
    threads = absolute.data.threads or max(1, int(absolute.launch.cpus_per_worker))
    return absolute.model_copy(
        update={
            "run": absolute.run.model_copy(update={"storage": folder.trials_storage}),
            "data": absolute.data.model_copy(update={"threads": threads}),
        }
    )


@contextmanager
def _ray_notes(folder: SearchFolder, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield where Ray keeps its own notes meanwhile, and the states that trials take over from each other."""
    name = f"{folder.folder.place.name}-{uuid.uuid4().hex[:8]}"
    where = (folder.folder / "ray").where if plan.scheduler == "pbt" else str(node_folder() / "ray")
    storage: dict[str, Any] = {"storage_path": where}
    if is_uri(where):
        from pyarrow.fs import FileSystem

        system, path = FileSystem.from_uri(where)
        storage = {"storage_path": path, "storage_filesystem": system}
    try:
        yield {"name": name, **storage}
    finally:
        _forget(storage, name)
        if plan.scheduler == "pbt":
            _forget(storage, "")


def _forget(storage: dict[str, Any], name: str) -> None:
    from pyarrow.fs import LocalFileSystem

    system = storage.get("storage_filesystem", LocalFileSystem())
    with suppress(OSError):
        system.delete_dir(f"{storage['storage_path']}/{name}".rstrip("/"))
