"""What a trial of a search costs beyond its training: ours, and a TorchTrainer nested in each trial.

    python benchmarks/trial_overhead.py                          # 6 trials each way
    python benchmarks/trial_overhead.py --trials 3 --epochs 1    # a short look

The same recipe (digits, resnet8 -> resnet8, one worker) trains with one seed after the other:

* ``bdkd tune``: a trial trains in Ray Tune's own process, which serves the next trial too.
* ``nested``: Ray Tune starts a function that runs a ``TorchTrainer`` with one worker, as Ray's guide for tuning
  trainers shows it; the worker runs the same training.

One trial at a time on a Ray cluster of this machine. A trial's cost is the wall-clock of the whole search, without
starting and ending Ray, by the number of trials, less the seconds that the same training takes in this process once
it is warm. The last line is ours by the nested. Run it on a machine that does nothing else.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import header, timed
from rich.console import Console

from bdkd_dist import config
from bdkd_dist.config import Recipe
from bdkd_dist.engine.control import Control
from bdkd_dist.engine.observer import Observers
from bdkd_dist.launch import cluster
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.tune import search
from bdkd_dist.launch.worker import training, work

WARM_RUNS = 3
THREADS = 2
"""Of torch, everywhere; a trial of ours takes one for each CPU that it claims."""
SPACE = """
from ray import tune

def search_space():
    return {{"train.seed": tune.grid_search(list(range({trials})))}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = recipe_of(folder, arguments.epochs)
        training_s = warm_training_s(recipe)
        ray_s = min(timed(start_and_end_ray) for _ in range(2))
        ours = timed(partial(tuned, recipe, folder, arguments.trials)) - ray_s
        nested = timed(partial(nested_trainers, recipe, arguments.trials)) - ray_s
    print(header())
    print(f"{arguments.trials} trials of {arguments.epochs} epochs; training alone {training_s:.2f} s, warm")
    print(f"starting and ending Ray: {ray_s:.1f} s (not counted)")
    costs = {}
    for name, seconds in {"bdkd tune": ours, "nested TorchTrainer": nested}.items():
        costs[name] = seconds / arguments.trials - training_s
        print(f"{name:20} {seconds:6.1f} s in all, {costs[name]:6.2f} s a trial beyond its training")
    print(f"bdkd tune / nested = {costs['bdkd tune'] / costs['nested TorchTrainer']:.2f}")


def recipe_of(folder: Path, epochs: int) -> Recipe:
    settings = {
        "models.teacher": "resnet8",
        "models.student": "resnet8",
        "train.epochs": epochs,
        "schedule.warmup_epochs": 0,
        "data.threads": 1,
        "launch.device": "cpu",
        "launch.cpus_per_worker": 1,
        "run.storage": folder,
    }
    return config.load("digits", [f"{key}={value}" for key, value in settings.items()])


def warm_training_s(recipe: Recipe) -> float:
    """Return the seconds of the training with its evaluations and checkpoints in a process that did it before."""
    times = []
    for number in range(WARM_RUNS + 1):
        named = config.replace(recipe, {"run.name": f"warm-{number}"})
        times.append(timed(partial(train, named)))
    return statistics.median(times[1:])


def train(recipe: Recipe) -> None:
    run = RunFolder.of(recipe)
    run.path.mkdir(parents=True)
    with training(recipe, run, torch.device("cpu"), (), Control(), print) as trainer:
        trainer.run()


def start_and_end_ray() -> None:
    with cluster.connected("local", THREADS):
        pass


def tuned(recipe: Recipe, folder: Path, trials: int) -> None:
    space = folder / "seeds.py"
    space.write_text(SPACE.format(trials=trials))
    # All CPUs of the cluster: so one trial at a time.
    alone = config.replace(recipe, {"run.name": "search"})
    alone = alone.model_copy(update={"launch": alone.launch.model_copy(update={"cpus_per_worker": float(THREADS)})})
    search.search(str(space), alone, search.Asked(scheduler="none"), Console(quiet=True))


def nested_trainers(recipe: Recipe, trials: int) -> None:
    from ray import tune

    def trial(values: dict[str, Any]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        named = {"run.name": f"nested-{values['seed']}", "train.seed": values["seed"]}
        TorchTrainer(
            worker,
            train_loop_config=config.replace(recipe, named).to_dict(),
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name=named["run.name"], storage_path=f"{recipe.run.storage}/ray-train"),
        ).fit()

    with cluster.connected("local", THREADS):
        tune.Tuner(
            tune.with_resources(trial, {"CPU": 1}),
            param_space={"seed": tune.grid_search(list(range(trials)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(name="nested", storage_path=f"{recipe.run.storage}/ray-tune", verbose=0),
        ).fit()


def worker(tree: dict[str, Any]) -> None:
    torch.set_num_threads(THREADS)
    recipe = config.from_dict(tree)
    run = RunFolder.of(recipe)
    run.path.mkdir(parents=True)
    work(recipe, run, torch.device("cpu"), Observers(), Control(), print)


if __name__ == "__main__":
    main()
