"""A record, made in the workers themselves, of which samples were trained on in which step."""

import json
from pathlib import Path

RECORDER = '''
import importlib.machinery, json, os, sys, time


class Finder:
    """Wraps the step of the training loop when it is imported; other Python processes notice nothing."""

    def find_spec(self, name, path, target=None):
        if name != "bdkd_dist.engine.loop":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            step = module.Trainer._train_step

            def recorded(self, batch):
                line = [self.epoch, self.step, self.world, self.rank, batch.indices.tolist()]
                with open({record!r}, "a") as file:
                    file.write(json.dumps(line) + "\\n")
                step(self, batch)
                time.sleep(float(os.environ.get("PAUSE_S", 0)))

            module.Trainer._train_step = recorded

        spec.loader.exec_module = execute_and_wrap
        return spec


sys.meta_path.insert(0, Finder())
'''


class Record:
    """Which samples each step was trained on; of a step that was done again, the last time counts."""

    def __init__(self, folder: Path):
        self.path = folder / "record.jsonl"
        (folder / "sitecustomize.py").write_text(RECORDER.replace("{record!r}", repr(str(self.path))))
        self.environment = {"PYTHONPATH": str(folder)}

    def steps(self) -> dict[int, tuple[int, int, list[int]]]:
        """Return (epoch, number of workers, samples) of every step."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        world = {step: workers for _, step, workers, _, _ in lines}
        last = {
            (step, rank): (epoch, samples) for epoch, step, workers, rank, samples in lines if workers == world[step]
        }
        steps = {}
        for step, workers in sorted(world.items()):
            shares = [last[step, rank] for rank in range(workers)]
            steps[step] = (shares[0][0], workers, [sample for _, samples in shares for sample in samples])
        return steps
