"""Recipes end to end on a few hundred real images: CIFAR-100's lossless ones and photographs at 224."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from realdata import CIFAR100, CLOTHING, needs_cifar100, needs_clothing
from runs import BDKD, command, execute

from bdkd_dist.data.beton import Beton

pytestmark = pytest.mark.slow


def few(source: Path, folder: Path, rows: dict[str, int]) -> Path:
    """Write the first rows of each split as shards of the same layout."""
    folder.mkdir()
    for split, count in rows.items():
        first = min(source.glob(f"{split}-*.parquet"))
        pq.write_table(
            pq.ParquetFile(first).read_row_group(0).slice(0, count), folder / f"{split}-00000-of-00001.parquet"
        )
    return folder


def results(run: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return json.loads((run / "results.json").read_text())


@needs_cifar100
def test_cifar100_from_parquet(cache: Path, tmp_path: Path) -> None:
    root = few(CIFAR100, tmp_path / "source", {"train": 400, "test": 100})
    overrides = [f"data.root={root}", "models.teacher=resnet20", "train.epochs=1"]
    done = execute(command(cache, tmp_path, *overrides, recipe="cifar100_r56_r20"))
    assert (
        "schedule.milestones=[150, 180, 210]: none comes within train.epochs=1, the learning rate stays" in done.stdout
    )
    test = results(tmp_path / "run")["test"]["student"]["raw"]
    assert test["count"] == 100
    assert 3.5 < test["nll"] < 9  # ln 100 = 4.6: hardly trained, and a probability all the same


@needs_cifar100
def test_objectives_change_by_one_word(cache: Path, tmp_path: Path) -> None:
    root = few(CIFAR100, tmp_path / "source", {"train": 200, "test": 50})
    common = [f"data.root={root}", "models.teacher=resnet14", "models.student=resnet8", "train.epochs=1"]
    common += ["schedule.kind=cosine", "train.precision=bf16", "train.ema_decay=0.9", "optimizer.clip_grad_norm=1"]
    for objective in ("bdkd", "dml", "ce"):
        arguments = [*common, f"objective.name={objective}"]
        execute(command(cache, tmp_path, *arguments, name=objective, recipe="cifar100_r56_r20"))
        assert set(results(tmp_path / objective)["test"]) == {"teacher", "student", "student_ema"}


@needs_clothing
def test_photographs_at_224(tmp_path: Path) -> None:
    root = few(CLOTHING, tmp_path / "source", {"train": 64, "validation": 32, "test": 32})
    overrides = [f"data.root={root}", "train.epochs=2", "train.batch_size=16", "schedule.warmup_epochs=1"]
    execute(command(tmp_path / "cache", tmp_path, *overrides, recipe="clothing_r34_r18"))
    assert results(tmp_path / "run")["test"]["student"]["raw"]["count"] == 32
    (prepared,) = (tmp_path / "cache").glob("source-*/train-00000.beton")
    assert Beton(prepared).is_jpeg.all()


@needs_clothing
def test_an_image_folder_trains_and_is_evaluated_elsewhere(cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    names = json.loads(pq.read_schema(CLOTHING / "test-00000-of-00001.parquet").metadata[b"class_names"])
    for split, count in {"train": 96, "test": 48}.items():
        table = pq.ParquetFile(min(CLOTHING.glob(f"{split}-*.parquet"))).read_row_group(0).slice(0, count)
        for number, row in enumerate(table.to_pylist()):
            folder = root / split / names[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.jpg").write_bytes(row["image"]["bytes"])
    classes = len(list((root / "train").iterdir()))
    small = ["models.teacher=resnet20", "models.student=resnet8", "data.image_px=64", "train.epochs=2"]
    small += ["train.batch_size=16", "schedule.warmup_epochs=1", f"data.root={root}", f"data.num_classes={classes}"]
    execute(command(cache, tmp_path, *small, recipe="clothing_r34_r18"))
    before = results(tmp_path / "run")
    moved = root.rename(tmp_path / "moved")
    places = [f"data.root={moved}", f"data.prepared={tmp_path}/other"]
    done = execute([str(BDKD), "evaluate", str(tmp_path / "run"), *places])
    assert "top-1" in done.stdout
    after = results(tmp_path / "run")
    assert after["test"]["student"]["raw"] == pytest.approx(before["test"]["student"]["raw"], rel=1e-6)
