"""Contestants take turns and only their counted rounds are timed; a figure says where it comes from."""

import importlib
import itertools
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bdkd_dist import config

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
machine = importlib.import_module("machine")
step = importlib.import_module("step")


def test_contestants_take_turns_and_what_follows_each_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0.0], []
    seconds = {"a": itertools.count(1), "b": itertools.count(10)}
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def work(name: str) -> None:
        called.append(name)
        now[0] += next(seconds[name])

    def clear() -> None:
        called.append("clear")
        now[0] += 100

    found = machine.rounds({name: partial(work, name) for name in seconds}, 2, after_each=clear)
    assert found == {"a": [2, 3], "b": [11, 12]}
    assert called == ["a", "clear", "b", "clear"] * 3


def test_no_round_is_left_out_where_none_warms_up() -> None:
    assert len(machine.rounds({"a": lambda: None}, 3, warm_up=0)["a"]) == 3


def test_a_figures_head_names_the_machine_the_versions_and_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/loader.py", "--data", "/disk/my images"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = machine.header(threads=True, packages=["pillow"]).split("\n")
    versions = rf"Python 3\S+, torch {re.escape(torch.__version__)}, .*pillow \d\S+"
    threads = torch.get_num_threads()
    assert re.fullmatch(rf"date: \S+   commit: .+   hardware: .+ cores.*, {threads} CPU threads; {versions}", first)
    assert second == "command: OMP_NUM_THREADS=1 .venv/bin/python benchmarks/loader.py --data 'my images'"


def test_a_trainer_whose_batches_come_by_hand_takes_a_step() -> None:
    recipe = config.load("digits", ["models.teacher=resnet8", "models.student=resnet8", "train.batch_size=8"])
    trainer = step.trainer_of(recipe, torch.device("cpu"))
    trainer._train_step(step.random_batch(recipe, trainer.device))
    assert (trainer.step, trainer.steps_per_epoch) == (1, 10)
