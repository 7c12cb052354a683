"""The way of a large data set, end to end on photographs: prepared, staged, quasi-random, augmented, on two workers."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from realdata import CLOTHING, needs_clothing
from runs import BDKD, command, execute

pytestmark = [pytest.mark.slow, needs_clothing]
WAY = [
    "models.teacher=resnet14",
    "models.student=resnet8",
    "data.image_px=32",
    "data.stage=local",
    "data.order=quasi_random",
    "data.cache=process",
    "data.loader=ffcv",
    "data.resize={start_px: 16, end_px: 32, to_epoch: 1, multiple_px: 16}",
    "data.augment={crop: resized, rand_ops: 2, cutout_px: 8, mixup_alpha: 0.2, cutmix_alpha: 1.0, hue: 0.1}",
    "train.batch_size=16",
    "train.epochs=2",
    "train.log_every_steps=1",
    "schedule.warmup_epochs=0",
]
ROWS = {"train": 90, "validation": 20, "test": 20}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of training images, and one of each other split, by the command."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out") / "clothing"
    for split, rows in ROWS.items():
        images = pq.ParquetFile(min(CLOTHING.glob(f"{split}-*.parquet"))).read_row_group(0).slice(0, rows)
        shards = 3 if split == "train" else 1
        for shard in range(shards):
            part = images.slice(shard * rows // shards, rows // shards)
            pq.write_table(part, source / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    done = execute([str(BDKD), "prepare", str(source), str(out)])
    assert "train 90 = 90 stored + 0 left out" in done.stdout
    files = ["test-00000", "train-00000", "train-00001", "train-00002", "validation-00000"]
    assert sorted(path.stem for path in out.glob("*.beton")) == files
    return out


def test_two_workers_train_from_a_staged_copy_and_from_the_files_in_place_alike(prepared: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    root = [f"data.root={prepared}", "launch.workers=2"]
    staged = [*root, *WAY, f"data.stage_folder={near}"]
    execute(command(tmp_path / "unused", tmp_path, *staged, name="staged", recipe="clothing_r34_r18"))
    place = [*root, *WAY, "data.stage=shared", "data.cache=os"]
    execute(command(tmp_path / "unused", tmp_path, *place, name="in_place", recipe="clothing_r34_r18"))
    assert not (tmp_path / "unused").exists()
    (copy,) = (path for path in near.iterdir() if path.is_dir())
    assert Counter(path.suffix for path in copy.iterdir())[".beton"] == 5
    one, other = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("staged", "in_place"))
    assert [json.loads(line) for line in one] == [json.loads(line) for line in other]
    assert max(json.loads(line)["step"] for line in one) == 12  # ⌈90 / 16⌉ steps in each of two epochs
    results = json.loads((tmp_path / "staged" / "results.json").read_text())
    assert results["test"]["student"]["raw"]["count"] == ROWS["test"]


def test_a_damaged_prepared_file_is_one_line_before_training(prepared: Path, tmp_path: Path) -> None:
    whole = (prepared / "train-00001.beton").read_bytes()
    try:
        place = 2**23 + 500  # in the first image
        (prepared / "train-00001.beton").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        arguments = [f"data.root={prepared}", *WAY, f"data.stage_folder={tmp_path / 'near'}"]
        for changes in (["data.stage=shared"], ["data.stage=local"]):
            run = command(tmp_path / "unused", tmp_path, *arguments, *changes, recipe="clothing_r34_r18")
            done = execute(run, status=2)
            (line,) = done.stderr.splitlines()[-1:]
            assert f"{prepared / 'train-00001.beton'} was altered" in line
    finally:
        (prepared / "train-00001.beton").write_bytes(whole)
