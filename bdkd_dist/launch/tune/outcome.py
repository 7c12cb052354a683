"""What a search ends with: the chosen trials on the test split, the report, and what a person is told."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
import torch
from rich.table import Table

from bdkd_dist.config import Recipe
from bdkd_dist.engine.control import Control
from bdkd_dist.errors import UnfitNode, UserError
from bdkd_dist.launch.programs import beside
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.tune.algorithms import Plan
from bdkd_dist.launch.tune.folder import TRIALS, SearchFolder
from bdkd_dist.launch.tune.places import SearchCluster
from bdkd_dist.launch.worker import finish, for_evaluation, training
from bdkd_dist.records.printing import titled_table
from bdkd_dist.records.results import read_results
from bdkd_dist.records.search_report import BEST, PAGE, SearchSummary, write_report
from bdkd_dist.records.search_tables import heads, of_test
from bdkd_dist.records.trials import Trial
from bdkd_dist.records.wording import metric_text

NEEDED = ("results.json", "predictions/test.parquet")
"""What the report reads of a tested trial."""
SHOWN = 5
"""Chosen trials whose folders are named at the end."""


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    folder: SearchFolder
    plan: Plan
    recipe: Recipe
    trials: list[Trial]
    chosen: list[Trial]

    def lacking(self) -> str:
        """Say why nothing is chosen: no trial came to its end, or none meets the constraints and one comes nearest."""
        finished = [trial for trial in self.trials if trial.status == "finished"]
        if not finished:
            failed = [trial for trial in self.trials if trial.reason]
            first = f"; trial {failed[0].number:04d}: {failed[0].reason}" if failed else ""
            return f"none of the {len(self.trials)} trials in {self.folder} came to its end{first}"
        best = finished[self.plan.goal.nearest([trial.metrics for trial in finished])]
        return (
            f"no finished trial meets {' and '.join(map(str, self.plan.goal.constraints))}; the nearest is trial "
            f"{best.number:04d}: {self.plan.goal.said(best.metrics)}"
        )

    @cached_property
    def tested(self) -> list[Trial]:
        """The trials that were evaluated on the test split; asked for after that was done."""
        return [trial for trial in self.trials if self.folder.run(trial).finished]

    def table(self) -> Table:
        """Return the chosen trials' figures on both splits."""
        names = heads(self.plan.goal)
        table = titled_table("chosen on validation, then tested", ("trial", ""), names.values())
        for trial in self.chosen:
            results = f"{TRIALS}/{trial.name}/results.json"
            self.folder.folder.fetch(results)
            measured = of_test(read_results(self.folder.folder.path / results))
            for label, metrics in (("validation", trial.metrics), ("test", measured)):
                shown = f"{trial.number:04d}" if label == "validation" else ""
                table.add_row(shown, label, *(metric_text(metrics.get(name), name) for name in names))
            table.add_section()
        return table

    def lines(self) -> Iterator[str]:
        """Yield where what was found lies."""
        for trial in self.chosen[:SHOWN]:
            yield f"trial {trial.number:04d}           {self.folder.run(trial)}"
        if self.chosen:
            yield f"recipe               {self.folder.folder.name(self.folder.folder.path / BEST)}"
        if len(self.tested) > len(self.chosen):
            yield f"compare              bdkd compare {self.folder}"
        yield f"report               {self.folder.folder.name(self.folder.folder.path / PAGE)}"
        yield f"curves               {beside('tensorboard')} --logdir {self.folder.folder / TRIALS}"

    def write(self, command: str) -> None:
        """Write the report of the search as it stands into its folder."""
        folder = self.folder.folder
        folder.fetch(*(f"{TRIALS}/{trial.name}/{name}" for trial in self.tested for name in NEEDED))
        plan = self.plan
        summary = SearchSummary(
            name=folder.place.name,
            space=plan.space.name,
            space_rows=tuple((key, said_domain(domain)) for key, domain in plan.space.space.items()),
            goal=" subject to ".join((plan.goal_name, *map(str, plan.goal.constraints))),
            search=plan.search,
            scheduler=plan.scheduler,
            num_trials=plan.num_trials,
            seed=plan.seed,
            command=command,
            **self.folder.notes,
        )
        written = write_report(folder.path, summary, self.trials, plan.goal, self.recipe)
        folder.push(*written)


def evaluate_on_test(
    folder: SearchFolder, trials: Sequence[Trial], there: SearchCluster, warn: Callable[[str], None]
) -> None:
    """Evaluate trials on the test split, which no choice has seen, and write their results.

    Raises:
        UserError: A trial's checkpoints or its data are not readable; the others are evaluated all the same.
        WorkersLost: For ``launch.wait_timeout_s`` the cluster has had no node that could do it.
    """
    # Not by `.options()`: only here Ray ends a process that has used a GPU, which would use that one for the next, too.
    task = ray.remote(**there.options)(_evaluate_one)
    left = [task.remote(folder.run(trial).where, there.cuda) for trial in trials]
    failed: ray.exceptions.RayTaskError | None = None
    while left:
        done, left = there.wait(left, warn)
        for one in done:
            try:
                for line in ray.get(one):
                    warn(line)
            except ray.exceptions.RayTaskError as error:
                failed = failed or error
    if failed is not None and isinstance(failed.cause, UnfitNode):
        raise UserError(failed.cause.named) from None
    if failed is not None:
        raise failed.cause if isinstance(failed.cause, UserError) else failed from None


def _evaluate_one(where: str, cuda: bool) -> list[str]:
    folder, said = RunFolder(where), list[str]()
    recipe = for_evaluation(folder.read_recipe())
    torch.set_num_threads(max(1, int(recipe.launch.cpus_per_worker)))
    device = torch.device("cuda" if cuda else "cpu")
    with training(recipe, folder, device, (), Control(), said.append) as trainer:
        finish(trainer, folder)
    return said


def said_domain(domain: Any) -> str:
    """Return what is tried of a key, as a person says it."""
    from ray.tune.search.sample import Categorical, Domain, LogUniform, Quantized

    if isinstance(domain, dict):
        return f"each of {', '.join(map(str, domain['grid_search']))}"
    if isinstance(domain, Categorical):
        return " or ".join(map(str, domain.categories))
    if not isinstance(domain, Domain):
        return str(domain)
    sampler = domain.get_sampler()
    step = f", in steps of {sampler.q:g}" if isinstance(sampler, Quantized) else ""
    inner = sampler.sampler if isinstance(sampler, Quantized) else sampler
    return f"{domain.lower:g} to {domain.upper:g}{', logarithmic' if isinstance(inner, LogUniform) else ''}{step}"
