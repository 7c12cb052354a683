"""Trainings leave records that `bdkd compare` reads; what is recorded is not repeated, and nothing else is left out."""

import importlib
import io
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bdkd_dist import config
from bdkd_dist.errors import UserError
from bdkd_dist.launch.compare import compare
from bdkd_dist.records.comparison import Run

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
trainings = importlib.import_module("recorded_trainings")

Process = subprocess.Popen[str]
SETTINGS = (
    *("digits", "models.teacher=resnet8", "models.student=resnet8", "data.train_limit=64", "data.image_px=16"),
    *("data.loader=torch", "data.threads=1", "train.epochs=1", "schedule.warmup_epochs=0"),
)


def training(objective: str, *overrides: str, teacher: Any = None) -> Any:
    return trainings.Training(f"{objective}-0", (*SETTINGS, f"objective.name={objective}", *overrides), teacher)


CE = training("ce")
KD = training("kd", teacher=CE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A repository's folder with ``records`` of ce and of kd, which learnt from it, and their ``runs``."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "ROOT", root)
        trainings.train_all([KD], root / "records", root / "runs", side_by_side=2)
        yield root


def start(script: str) -> Process:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of trainings that are started, which compute nothing."""
    names: list[str] = []

    def training(out: Path, training: Any) -> Process:
        names.append(training.name)
        return start("")

    monkeypatch.setattr(trainings, "_start", training)
    return names


@pytest.fixture
def replayed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of trainings that are started, which finish at once as those of ``trained`` did."""
    names: list[str] = []

    def training(out: Path, training: Any) -> Process:
        names.append(training.name)
        shutil.copytree(trained / "runs" / training.name, out / training.name)
        return start("")

    monkeypatch.setattr(trainings, "_start", training)
    return names


@pytest.mark.slow
def test_a_record_says_what_its_run_says(trained: Path) -> None:
    for name in ("ce-0", "kd-0"):
        run, record = (
            Run.read(
                name,
                config.load(str(folder / "recipe.yaml")),
                folder / "results.json",
                folder / "predictions/test.parquet",
            )
            for folder in (trained / "runs" / name, trained / "records" / name)
        )
        assert record.results == run.results
        assert record.test_fingerprint == run.test_fingerprint
        assert record.class_names == run.class_names
        assert np.array_equal(record.index, run.index)
        assert np.array_equal(record.label, run.label)
        assert record.said.keys() == {"student", "teacher"}
        for network, said in record.said.items():
            assert np.array_equal(said.correct, run.said[network].correct)
            for what in ("confidence", "nll"):
                np.testing.assert_allclose(getattr(said, what), getattr(run.said[network], what), atol=2**-14 + 1e-7)
            assert said.nll.mean() == pytest.approx(run.results[network]["raw"]["nll"], abs=2e-5)


@pytest.mark.slow
def test_records_compare_and_hold_nothing_of_their_machine(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = trained / "records"
    monkeypatch.chdir(trained)
    shown = Console(file=io.StringIO(), width=100)
    compare(["records/ce-0", "records/kd-0"], trained / "comparison", shown)
    assert "told from other runs" not in shown.file.getvalue()  # type: ignore[attr-defined]  # its teacher's record is found
    kd = config.load(str(records / "kd-0/recipe.yaml"))
    assert kd.models.teacher_checkpoint == "records/ce-0"
    files = [path for path in records.rglob("*") if path.is_file()]
    assert len(files) == 8
    for path in files:
        for secret in (str(trained), str(Path.home()), "hostname"):
            assert secret.encode() not in path.read_bytes()
    (kept,) = json.loads((records / "ce-0/environment.json").read_text())
    (whole,) = json.loads((trained / "runs/ce-0/environment.json").read_text())
    assert whole["hostname"] == socket.gethostname()
    assert kept == {key: whole[key] for key in ("started", "python", "packages", "code", "hardware")}


@pytest.mark.slow
def test_a_record_for_a_choice_holds_no_test_images(trained: Path, tmp_path: Path) -> None:
    trainings.keep(CE, trained / "runs/ce-0", tmp_path / "ce-0", validation_only=True)
    assert {path.name for path in (tmp_path / "ce-0").iterdir()} == {"recipe.yaml", "environment.json", "results.json"}
    kept, whole = (json.loads((folder / "ce-0/results.json").read_text()) for folder in (tmp_path, trained / "records"))
    assert kept == {key: value for key, value in whole.items() if key != "test"}


@pytest.mark.slow
def test_what_is_recorded_is_not_repeated(trained: Path, tmp_path: Path, started: list[str]) -> None:
    trainings.train_all([CE, KD], trained / "records", tmp_path / "elsewhere", side_by_side=2)
    assert not started


@pytest.mark.slow
def test_a_teacher_whose_run_is_gone_is_trained_again(
    trained: Path, tmp_path: Path, replayed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "ROOT", tmp_path)
    records = tmp_path / "records"
    shutil.copytree(trained / "records/ce-0", records / "ce-0")
    mark = records / "ce-0/predictions/test.parquet"
    mark.write_text("its record stays")
    trainings.train_all([CE, KD], records, tmp_path / "runs", side_by_side=2)
    assert replayed == ["ce-0", "kd-0"]
    assert mark.read_text() == "its record stays"
    assert trainings.finished(records / "kd-0")

    shutil.rmtree(records)  # what was finished before it could be recorded is recorded
    trainings.train_all([CE, KD], records, tmp_path / "runs", side_by_side=2)
    assert replayed == ["ce-0", "kd-0"]
    assert trainings.finished(records / "ce-0")
    assert trainings.finished(records / "kd-0")


@pytest.mark.parametrize("place", ["records", "runs"])
@pytest.mark.slow
def test_what_another_recipe_left_is_refused(trained: Path, tmp_path: Path, started: list[str], place: str) -> None:
    shutil.copytree(trained / place / "ce-0", tmp_path / place / "ce-0")
    other = training("ce", "optimizer.lr=0.3")
    with pytest.raises(UserError, match=rf"{place}/ce-0: optimizer.lr is 0.1 there and 0.3 now; delete that folder"):
        trainings.train_all([other], tmp_path / "records", tmp_path / "runs", side_by_side=1)
    assert not started


def test_a_recipe_with_a_mistake_is_refused_before_anything_is_trained(tmp_path: Path, started: list[str]) -> None:
    with pytest.raises(UserError, match=r"unknown objective.name 'focul'"):
        trainings.train_all([CE, training("focul")], tmp_path / "records", tmp_path / "runs", side_by_side=1)
    assert not started


def test_what_does_not_stop_in_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "STOP_S", 1.0)
    ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    going: list[Process] = []

    def training(out: Path, training: Any) -> Process:
        going.append(start(ignoring))
        assert going[-1].stdout is not None
        going[-1].stdout.readline()
        return going[-1]

    monkeypatch.setattr(trainings, "_start", training)
    end = time.monotonic() + 3
    with pytest.raises(trainings.OutOfTimeError):
        trainings.train_all([CE], tmp_path / "records", tmp_path / "runs", side_by_side=1, end=end)
    assert going[0].poll() is not None
    assert end <= time.monotonic() < end + 10


def test_nothing_begins_when_what_is_left_is_for_stopping(tmp_path: Path, started: list[str]) -> None:
    end = time.monotonic() + trainings.STOP_S - 1
    with pytest.raises(trainings.OutOfTimeError):
        trainings.train_all([CE], tmp_path / "records", tmp_path / "runs", side_by_side=1, end=end)
    assert not started


def test_a_run_that_fails_ends_the_study_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def training(out: Path, training: Any) -> Process:
        out.mkdir(parents=True)
        (out / f"{training.name}.log").write_text("the disk is full\n")
        return start("raise SystemExit(1)")

    monkeypatch.setattr(trainings, "_start", training)
    with pytest.raises(SystemExit, match="ce-0 failed:\nthe disk is full"):
        trainings.train_all([CE], tmp_path / "records", tmp_path / "runs", side_by_side=1)


def write_images(folder: Path, split: str, labels: list[int], shards: int = 1) -> list[bytes]:
    """Write shards as CIFAR-100's, and return the images, each of which says where it stands."""
    folder.mkdir(exist_ok=True)
    images = [f"{split}-{n}-of-class-{label}".encode() for n, label in enumerate(labels)]
    for shard, rows in enumerate(np.array_split(np.arange(len(labels)), shards)):
        table = pa.table(
            {"img": [{"bytes": images[n], "path": None} for n in rows], "label": [labels[n] for n in rows]}
        )
        names = {"class_names": json.dumps(["apple", "bear", "crab"])}
        pq.write_table(table.replace_schema_metadata(names), folder / f"{split}-0000{shard}-of-0000{shards}.parquet")
    return images


def test_a_subset_takes_each_class_in_the_official_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = {"train": rng.permutation([0, 1, 2] * 8).tolist(), "test": rng.permutation([0, 1, 2] * 4).tolist()}
    images = {split: write_images(tmp_path / "source", split, of, shards=2) for split, of in labels.items()}
    subset = trainings.Subset(classes=2, train=3, validation=2, test_of_train=2, test_of_test=1)
    subset.write(tmp_path / "source", tmp_path / "subset")

    want: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    for split, of in labels.items():
        seen = [0, 0, 0]
        for image, label in zip(images[split], of, strict=True):
            place, seen[label] = seen[label], seen[label] + 1
            if label < 2 and split == "train" and place < 7:
                want["train" if place < 3 else "val" if place < 5 else "test"].append(image)
            elif label < 2 and split == "test" and place < 1:
                want["test"].append(image)
    for split, of_split in want.items():
        table = pq.read_table(tmp_path / f"subset/{split}-00000-of-00001.parquet")
        assert [image["bytes"] for image in table["img"].to_pylist()] == of_split
        assert table["label"].to_pylist() == [int(image.decode()[-1]) for image in of_split]
        assert table.column_names == ["img", "label"]
        assert json.loads(table.schema.metadata[b"class_names"]) == ["apple", "bear"]


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "train", [0, 0, 1, 1])
    write_images(tmp_path, "test", [0, 1])
    subset = trainings.Subset(classes=2, train=1, validation=2, test_of_train=0, test_of_test=1)
    with pytest.raises(UserError, match="--cifar100: 2 of 4 images are there"):
        subset.write(tmp_path, tmp_path / "subset")
    with pytest.raises(UserError, match=r"--cifar100 .*: no train-\*.parquet is there"):
        subset.write(tmp_path / "subset", tmp_path / "other")
