"""Whole runs by the real command line: what a run folder holds, going on after kills, one and several workers."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import (
    BDKD,
    assert_equal_runs,
    assert_same_weights,
    break_off,
    command,
    event_points,
    execute,
    final_state,
    metric_lines,
    reached,
)

pytestmark = pytest.mark.slow
LOADERS = ["torch", "ffcv"]


@pytest.fixture(scope="module", params=LOADERS)
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "ffcv":
        pytest.importorskip("ffcv")
    return request.param


@pytest.fixture(scope="module")
def unbroken(loader: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never interrupted, of one process."""
    storage = tmp_path_factory.mktemp("unbroken")
    done = execute(command(cache, storage, f"data.loader={loader}"))
    assert "T-scaled" in done.stdout
    assert "tensorboard --logdir" in done.stdout
    return storage / "run"


def test_the_run_folder_holds_everything(unbroken: Path) -> None:
    for name in ("recipe.yaml", "environment.json", "results.json", "metrics.jsonl", "predictions/test.parquet"):
        assert (unbroken / name).stat().st_size > 0, name
    assert (unbroken / "figures/reliability_test.png").read_bytes()[:4] == b"\x89PNG"
    assert list(unbroken.glob("checkpoints/*.partial")) == []


def test_results_follow_from_the_per_sample_predictions(unbroken: Path) -> None:
    table = pq.read_table(unbroken / "predictions/test.parquet")
    results = json.loads((unbroken / "results.json").read_text())
    labels = table["label"].to_numpy()
    assert len(labels) == results["test"]["student"]["raw"]["count"]
    for network in ("teacher", "student"):
        raw = results["test"][network]["raw"]
        top = np.array([row[0] for row in table[f"{network}_top5"].to_pylist()])
        confidence = table[f"{network}_confidence"].to_numpy()
        assert raw["top1"] == pytest.approx(np.mean(top == labels), abs=1e-12)
        assert raw["nll"] == pytest.approx(table[f"{network}_nll"].to_numpy().mean(), rel=1e-6)
        assert raw["gap"] == pytest.approx(confidence.mean() - np.mean(top == labels), abs=1e-6)
        bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
        ece = sum(
            abs((top == labels)[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
            for b in np.unique(bins)
        )
        assert raw["ece"] == pytest.approx(ece, abs=1e-6)


def test_curves_of_both_networks_are_there_once_a_step(unbroken: Path) -> None:
    points = event_points(unbroken)
    assert set(points.values()) == {1}
    tags = {tag for tag, _ in points}
    for network in ("teacher", "student"):
        for metric in ("top1", "top5", "ece", "adaece", "classwise_ece", "mce", "nll", "brier", "gap"):
            assert {step for tag, step in points if tag == f"val/{network}/{metric}"} == {5, 10}
        assert f"train/{network}/loss" in tags
        assert f"train/{network}/entropy" in tags
        assert f"lr/{network}" in tags
        assert f"val/{network}/reliability" in tags
    assert "val/student/entropy_against_teacher" in tags
    assert {"train/student/boosted_forward", "train/student/boosted_reverse"} <= tags
    assert any(tag.startswith("recipe") for tag in tags)


def test_the_same_command_again_shows_the_finished_run_and_changes_nothing(unbroken: Path, cache: Path) -> None:
    before = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file() and path.name != "run.lock"}
    done = execute(command(cache, unbroken.parent))
    assert "is finished" in done.stdout
    for path, content in before.items():
        assert path.read_bytes() == content, path


def test_evaluate_repeats_the_results(unbroken: Path) -> None:
    before = json.loads((unbroken / "results.json").read_text())
    execute([str(BDKD), "evaluate", str(unbroken)])
    after = json.loads((unbroken / "results.json").read_text())
    assert after == before


def test_killed_inside_an_epoch_it_ends_with_the_same_bits(
    unbroken: Path, loader: str, cache: Path, tmp_path: Path
) -> None:
    arguments = command(cache, tmp_path, f"data.loader={loader}")
    status, _ = break_off(arguments, reached(tmp_path / "run", 3), signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "run/results.json").exists()
    execute(arguments)
    assert_equal_runs(tmp_path / "run", unbroken)
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", unbroken)]
    assert results[0] == results[1]


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(
    unbroken: Path, loader: str, cache: Path, tmp_path: Path
) -> None:
    arguments = command(cache, tmp_path, f"data.loader={loader}")
    status, output = break_off(arguments, reached(tmp_path / "run", 3), signal.SIGINT)
    assert status == 130, output
    assert "go on with: bdkd train digits" in output
    step = final_state(tmp_path / "run")["step"]
    assert 3 <= step < 10
    execute([str(BDKD), "evaluate", str(tmp_path / "run")])  # looks at it as it stands, and does not end it
    assert (tmp_path / f"run/evaluations/step-{step:08d}/results.json").is_file()
    execute(arguments)
    assert_equal_runs(tmp_path / "run", unbroken)


def test_images_kept_on_the_device_train_alike(cache: Path, unbroken: Path, tmp_path: Path) -> None:
    done = execute(command(cache, tmp_path, "data.loader=resident"))
    assert "loader resident" in done.stdout
    assert_same_weights(tmp_path / "run", unbroken)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


@pytest.mark.ray
class TestTwoWorkers:
    """At a rate at which rounding differences do not grow (at the recipe's own they double every step or two), and
    without the hard gate, at whose edge rounding decides on which side a sample falls."""

    gentle = ("optimizer.lr=0.001", "objective.gate=soft")

    @pytest.fixture(scope="class")
    def two(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        storage = tmp_path_factory.mktemp("two")
        execute(command(cache, storage, "launch.workers=2", *self.gentle))
        return storage / "run"

    @pytest.fixture(scope="class")
    def one(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        storage = tmp_path_factory.mktemp("one")
        execute(command(cache, storage, *self.gentle))
        return storage / "run"

    def test_they_equal_one_process_within_float_tolerance(self, two: Path, one: Path) -> None:
        ours, expected = final_state(two), final_state(one)
        assert ours["step"] == expected["step"]
        for name, network in expected["networks"].items():
            for key, value in network.items():
                torch.testing.assert_close(
                    ours["networks"][name][key], value, rtol=1e-2, atol=1e-3, msg=lambda text, k=key: f"{k}: {text}"
                )
        for line, other in zip(metric_lines(two), metric_lines(one), strict=True):
            assert (line["step"], line["epoch"]) == (other["step"], other["epoch"])
            for tag, value in line.get("train", {}).items():
                # Shares of samples on one side of that edge; quantiles of each worker's part of the batch.
                if "boosted" not in tag and "entropy_gap" not in tag:
                    assert value == pytest.approx(other["train"][tag], rel=1e-3, abs=1e-4)

    def test_each_sample_counts_once(self, two: Path, one: Path) -> None:
        ours, expected = (json.loads((folder / "results.json").read_text()) for folder in (two, one))
        for split in ("validation", "test"):
            for network in ("teacher", "student"):
                raw, other = ours[split][network]["raw"], expected[split][network]["raw"]
                assert raw["count"] == other["count"]
                assert raw["nll"] == pytest.approx(other["nll"], rel=1e-3)
                assert raw["brier"] == pytest.approx(other["brier"], rel=1e-3)
        index = pq.read_table(two / "predictions/test.parquet")["index"].to_numpy()
        assert len(np.unique(index)) == len(index) == ours["test"]["student"]["raw"]["count"]

    def test_killed_inside_an_epoch_they_end_with_the_same_bits(self, two: Path, cache: Path, tmp_path: Path) -> None:
        arguments = command(cache, tmp_path, "launch.workers=2", *self.gentle)
        break_off(arguments, reached(tmp_path / "run", 3), signal.SIGKILL)
        execute(arguments)
        assert_same_weights(tmp_path / "run", two)
        assert (tmp_path / "run/metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
        assert event_points(tmp_path / "run") == event_points(two)


@pytest.mark.ray
def test_ctrl_c_stops_two_workers_at_one_step_and_ray_goes_with_them(cache: Path, tmp_path: Path) -> None:
    # Ray's workers run in another directory: a relative place must be the driver's.
    # Longer than the word takes to the workers, 1.5 s, on a fast machine too.
    arguments = command(Path(os.path.relpath(cache)), tmp_path, "launch.workers=2", "train.epochs=12")
    status, output = break_off(arguments, reached(tmp_path / "run", 3), signal.SIGINT)
    assert status == 130, output
    assert "go on with: bdkd train digits" in output
    assert "Traceback" not in output
    stopped = final_state(tmp_path / "run")["step"]
    assert 3 <= stopped < 60
    done = execute(arguments)
    assert final_state(tmp_path / "run")["step"] == 60
    assert "T-scaled" in done.stdout
    assert set(event_points(tmp_path / "run").values()) == {1}
