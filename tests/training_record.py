"""A record, made in the workers themselves, of which samples were trained on in which step."""

import json
from collections import Counter
from pathlib import Path

RECORDER = '''
import importlib.machinery, json, sys, time


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
                try:
                    with open({slow!r}) as slow:
                        time.sleep(float(slow.read()))
                except FileNotFoundError:
                    pass

            module.Trainer._train_step = recorded

        spec.loader.exec_module = execute_and_wrap
        return spec


sys.meta_path.insert(0, Finder())
'''


class Record:
    """Which samples each step was trained on; of a step that was done again, the last time counts."""

    def __init__(self, folder: Path):
        self.path = folder / "record.jsonl"
        self._slow = folder / "slow"
        recorder = RECORDER.replace("{record!r}", repr(str(self.path))).replace("{slow!r}", repr(str(self._slow)))
        (folder / "sitecustomize.py").write_text(recorder)
        self.environment = {"PYTHONPATH": str(folder)}

    def slow_down(self, step_s: float) -> None:
        """Let every step take so long at least, so that there is time for what is to happen amid them."""
        written = self._slow.with_suffix(".partial")
        written.write_text(str(step_s))
        written.replace(self._slow)

    def speed_up(self) -> None:
        """Let steps take what they take again."""
        self._slow.unlink()

    def assert_each_sample_once(self, epochs: int, steps: int) -> None:
        """Check that each epoch was trained on every sample, once, in so many steps altogether."""
        done = self.steps()
        assert list(done) == list(range(steps))
        counts: dict[int, Counter[int]] = {}
        for epoch, _, samples in done.values():
            counts.setdefault(epoch, Counter()).update(samples)
        assert list(counts) == list(range(epochs))
        for of_epoch in counts.values():
            assert of_epoch.keys() == counts[0].keys()
            assert set(of_epoch.values()) == {1}

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
