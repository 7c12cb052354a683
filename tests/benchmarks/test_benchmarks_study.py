"""A study stops in time, keeps what is finished, and makes no row of runs that differ in more than their seeds."""

import dataclasses
import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bdkd_dist import config

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
trainings = importlib.import_module("study")
study = importlib.import_module("cifar100_study")

Process = subprocess.Popen[str]


def write_weighting(folder: Path) -> Path:
    path = folder / "best.yaml"
    path.write_text("objective: {name: bdkd, temperature: 2.0}\n")
    return path


def start(script: str) -> Process:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_a_study_is_packed_after_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, parts = [], tmp_path / "parts"

    def training(out: Path, run: Any) -> Process:
        seen.append({path.name[:9] for path in parts.glob("part-*")})
        (out / run.name).mkdir(parents=True)
        (out / run.name / "recipe.yaml").write_text("{}")
        (out / run.name / "results.json").write_text("{}")
        return start("")

    monkeypatch.setattr(trainings, "_start", training)
    monkeypatch.setattr(study, "report", lambda *arguments, **options: "")
    scale = dataclasses.replace(study.SCALES["full"], methods=("dml", "kdcl", study.TUNED))
    monkeypatch.setitem(study.SCALES, "full", scale)
    monkeypatch.setattr(study, "SEEDS", (0,))
    options = {"cifar100": tmp_path, "weighting": write_weighting(tmp_path), "carry": parts, "out": tmp_path / "out"}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["cifar100_study.py", "--scale", "full", "--pairs", "cifar100_r56_r20", *given])
    monkeypatch.setattr(study, "end_with_children", lambda: None)
    study.main()
    assert seen == [set(), {"part-0001"}, {"part-0002"}]


def test_what_does_not_stop_in_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "STOP_S", 1.0)
    ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    going: list[Process] = []

    def training(out: Path, run: Any) -> Process:
        going.append(start(ignoring))
        assert going[-1].stdout is not None
        going[-1].stdout.readline()
        return going[-1]

    monkeypatch.setattr(trainings, "_start", training)
    end = time.monotonic() + 3
    with pytest.raises(trainings.OutOfTimeError):
        trainings.train_all(tmp_path, [trainings.Run("dml-0", ())], side_by_side=1, end=end)
    assert going[0].poll() is not None
    assert end <= time.monotonic() < end + 10


def test_nothing_begins_when_what_is_left_is_for_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    monkeypatch.setattr(trainings, "_start", lambda out, run: begun.append(run))
    monkeypatch.setattr(study, "run", begun.append)
    end = time.monotonic() + trainings.STOP_S - 1
    with pytest.raises(trainings.OutOfTimeError):
        trainings.train_all(tmp_path, [trainings.Run("dml-0", ())], side_by_side=1, end=end)
    with pytest.raises(trainings.OutOfTimeError):
        study.search(tmp_path, ["digits"], study.SCALES["small"], end)
    assert not begun
    (tmp_path / "weighting").mkdir()
    assert study.search(tmp_path, ["digits"], study.SCALES["small"], end + 60) == tmp_path / "weighting/best.yaml"
    write_weighting(tmp_path / "weighting")
    study.search(tmp_path, ["digits"], study.SCALES["small"], end)  # found already
    assert len(begun) == 1


def test_runs_of_two_weightings_are_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[list[str]] = []
    monkeypatch.setattr(study, "run", compared.append)
    monkeypatch.setattr(study, "row", lambda out, title, names, network="student": "")
    methods = ["ce", "kd", study.TUNED]
    tuned = study.parameters(write_weighting(tmp_path))
    for run in study.runs(tmp_path, ["digits"], tuned, dict.fromkeys(methods, ())):
        place = [f"run.storage={tmp_path}", f"run.name={run.name}"]
        recipe = config.load(run.arguments[0], [*run.arguments[1:], *place])
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "recipe.yaml").write_text(recipe.to_yaml())
    study.report(tmp_path, "digits", study.SCALES["small"], tuned, methods, searched=True)
    assert len(compared) == 1

    name = study.name_of(study.TUNED, 1)
    path = tmp_path / name / "recipe.yaml"
    path.write_text(config.load(str(path), ["objective.temperature=3"]).to_yaml())
    with pytest.raises(SystemExit, match=rf"objective.temperature is 2.0 in bdkd_tuned-0 and 3.0 in {name}"):
        study.report(tmp_path, "digits", study.SCALES["small"], tuned, methods, searched=True)
    assert len(compared) == 1
