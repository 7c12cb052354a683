import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_sources import FILE, PNGS, data, images, refuse, write_shard, write_splits
from realdata import CIFAR100, CLOTHING, needs_cifar100, needs_clothing

from bdkd_dist.data.prepare import prepare
from bdkd_dist.data.sources import open_source
from bdkd_dist.errors import UserError


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train-0.parquet", "validation-0.parquet", "test-0.parquet"),
        ("train.parquet", "val_0.parquet", "test.parquet"),
        ("data/train-0.parquet", "data/valid-0.parquet", "data/test-0.parquet"),
        ("train/0000.parquet", "val/0000.parquet", "test/0000.parquet"),
        ("my-train-0.parquet", "my-val-0.parquet", "my-test-0.parquet"),
        ("train/test_a.parquet", "val/train_a.parquet", "test/val_a.parquet"),
    ],
)
def test_shards_are_found_by_the_name_of_their_split(tmp_path: Path, train: str, validation: str, test: str) -> None:
    write_shard(tmp_path / train, PNGS[:3], [0, 1, 0])
    write_shard(tmp_path / validation, PNGS[3:4], [1])
    write_shard(tmp_path / test, PNGS[4:], [1, 0])
    source = open_source(data(root=str(tmp_path)))
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 1, 0],
        "validation": [1],
        "test": [1, 0],
    }
    assert images(source, "train") + images(source, "validation") + images(source, "test") == PNGS
    assert source.class_names == ("0", "1")
    assert source.name == tmp_path.name


def test_shards_of_a_split_follow_by_name(tmp_path: Path) -> None:
    for shard in (2, 0, 1):
        write_shard(tmp_path / f"train-{shard}.parquet", PNGS[2 * shard : 2 * shard + 2], [shard % 2, shard % 2])
    write_splits(tmp_path, test=[0])
    source = open_source(data(root=str(tmp_path)))
    assert source.splits["train"].labels.tolist() == [0, 0, 1, 1, 0, 0]
    samples = list(source.splits["train"].iterate())
    assert [sample.image for sample in samples] == PNGS
    assert [sample.label for sample in samples] == [0, 0, 1, 1, 0, 0]
    assert samples[3].origin == "train-1.parquet row 1"


def test_a_plain_binary_column_holds_images_too(tmp_path: Path) -> None:
    for split in ("train", "test"):
        table = pa.table({"name": ["x", "y"], "png": pa.array(PNGS[:2], pa.binary()), "class": [1, 0]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    source = open_source(data(root=str(tmp_path)))
    assert images(source, "train") == PNGS[:2]
    assert source.splits["train"].labels.tolist() == [1, 0]


def test_fine_label_is_read_where_there_is_no_label(tmp_path: Path) -> None:
    image = pa.array([{"bytes": png, "path": None} for png in PNGS[:2]], FILE)
    for split in ("train", "test"):
        table = pa.table({"img": image, "coarse_label": [5, 5], "fine_label": [0, 1]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    assert open_source(data(root=str(tmp_path))).splits["train"].labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "metadata",
    [
        {"class_names": json.dumps(["cat", "dog"])},
        {
            "huggingface": json.dumps(
                {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
            )
        },
    ],
)
def test_class_names_come_from_the_schema(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_splits(tmp_path, train=[0, 1], test=[0])
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    assert open_source(data(root=str(tmp_path))).class_names == ("cat", "dog")


def test_a_validation_split_is_the_test_split_where_no_other_has_labels(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1], validation=[1, 1, 0])
    without = open_source(data(root=str(tmp_path)))
    write_splits(tmp_path, test=[-1, -1])
    unlabelled = open_source(data(root=str(tmp_path)))
    for source in (without, unlabelled):
        assert sorted(source.splits) == ["test", "train"]
        assert source.splits["test"].labels.tolist() == [1, 1, 0]


def test_an_unlabelled_validation_split_is_refused(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1], validation=[-1, -1], test=[1, 0])
    refuse("validation image 0 has label -1", root=str(tmp_path))
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    refuse("test image 0 has label -1", root=str(tmp_path))


def test_images_stream_from_a_shard(tmp_path: Path) -> None:
    contents = [os.urandom(100_000) for _ in range(400)]
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.parquet", contents, [0, 1] * 200, write_batch_size=4, compression="none")
    before = pa.total_allocated_bytes()
    source = open_source(data(root=str(tmp_path)))
    most, total = 0, 0
    for sample in source.splits["train"].iterate():
        most, total = max(most, pa.total_allocated_bytes() - before), total + len(sample.image)
    assert total == 40_000_000
    assert most < total / 4
    assert total <= source.splits["train"].encoded_bytes < 1.1 * total


@needs_cifar100
def test_cifar100_shards() -> None:
    source = open_source(data(dataset="cifar100", root=str(CIFAR100), num_classes=100))
    assert source.name == "cifar100"
    assert np.bincount(source.splits["train"].labels).tolist() == [500] * 100
    assert np.bincount(source.splits["test"].labels).tolist() == [100] * 100
    assert source.class_names[:2] == ("apple", "aquarium_fish")
    rows = pq.ParquetFile(CIFAR100 / "test-00000-of-00001.parquet").read_row_group(0).to_pylist()
    stream = source.splits["test"].iterate()
    for row in rows[:50]:
        sample = next(stream)
        assert (sample.image, sample.label) == (row["img"]["bytes"], row["label"])


@needs_clothing
def test_clothing_shards_have_three_splits() -> None:
    source = open_source(data(root=str(CLOTHING), num_classes=10))
    assert {name: len(split) for name, split in source.splits.items()} == {
        "train": 3068,
        "validation": 341,
        "test": 372,
    }
    assert source.class_names[-1] == "t-shirt"


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [0, 1], "text": ["a", "b"]}), tmp_path / "train.parquet")
    refuse(r"train\.parquet has no image column", root=str(tmp_path))
    two = {"a": pa.array(PNGS[:2], pa.binary()), "b": pa.array(PNGS[:2], pa.binary())}
    pq.write_table(pa.table({**two, "label": [0, 1]}), tmp_path / "train.parquet")
    refuse(r"2 image columns \(a, b\)", root=str(tmp_path))
    pq.write_table(pa.table({"a": two["a"], "x": [0, 1], "y": [0, 1]}), tmp_path / "train.parquet")
    refuse(r"no label column.*columns: a, x, y", root=str(tmp_path))


def test_shards_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1], test=[0])
    second = tmp_path / "train-00001.parquet"
    write_shard(second, PNGS[:1], [0], label_column="other")
    refuse(r"train-00001\.parquet has no column 'label'", root=str(tmp_path))
    write_shard(second, PNGS[:1], [0], image_column="other")
    refuse(r"train-00001\.parquet has no column 'image'", root=str(tmp_path))
    pq.write_table(pa.table({"image": pa.nulls(1, FILE), "label": pa.array([None], pa.int64())}), second)
    refuse(r"train-00001\.parquet: label column 'label' has rows without an integer", root=str(tmp_path))
    second.write_bytes(b"no Parquet at all")
    refuse(r"train-00001\.parquet cannot be read", root=str(tmp_path))


def test_a_row_without_bytes_is_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    write_splits(tmp_path, test=[0])
    write_shard(tmp_path / "train.parquet", [PNGS[0], None, PNGS[0]], [0, 1, 1])
    settings = data(root=str(tmp_path), prepared=str(tmp_path / "cache"))
    assert images(open_source(settings), "train") == [PNGS[0], b"", PNGS[0]]
    with pytest.raises(UserError, match=r"train image 1 \(train\.parquet row 1\) cannot be decoded: it is empty"):
        prepare(settings)


def test_a_damaged_shard_is_named_while_it_streams(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1], test=[0])
    path = tmp_path / "train-00000-of-00001.parquet"
    source = open_source(data(root=str(tmp_path)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet cannot be read"):
        images(source, "train")


def test_a_shard_is_a_piece_and_a_large_one_is_cut_between_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [bytes([n]) * 1000 for n in range(20)]
    write_shard(tmp_path / "train-0.parquet", contents[:14], [0, 1] * 7, row_group_size=4)
    write_shard(tmp_path / "train-1.parquet", contents[14:], [0, 1] * 3, row_group_size=2)
    write_splits(tmp_path, test=[0])
    whole = open_source(data(root=str(tmp_path))).splits["train"]
    assert [piece.name for piece in whole.pieces] == ["train-0.parquet", "train-1.parquet"]
    group_bytes = pq.read_metadata(tmp_path / "train-0.parquet").row_group(0).column(0).total_uncompressed_size
    monkeypatch.setattr("bdkd_dist.data.sources.parquet.PIECE_BYTES", 2 * group_bytes + 100)
    split = open_source(data(root=str(tmp_path))).splits["train"]
    assert [len(piece) for piece in split.pieces] == [8, 6, 6]
    assert [piece.name for piece in split.pieces][:2] == ["train-0.parquet rows 0 to 7", "train-0.parquet rows 8 to 13"]
    assert [sample.image for sample in split.iterate()] == contents
    assert list(split.iterate()) == list(whole.iterate())
    for piece in split.pieces:
        assert [sample.label for sample in piece.iterate()] == piece.labels.tolist()
    assert next(split.pieces[1].iterate()).origin == "train-0.parquet row 8"
    assert split.encoded_bytes == whole.encoded_bytes


def test_a_piece_is_read_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_splits(tmp_path, train=[0, 1, 1], test=[0])
    monkeypatch.chdir(tmp_path)
    piece = open_source(data(root=".")).splits["train"].pieces[0]
    monkeypatch.chdir("/")
    assert [sample.image for sample in pickle.loads(pickle.dumps(piece.iterate))()] == PNGS[:3]


def test_a_shard_that_vanishes_is_named(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1], test=[0])
    source = open_source(data(root=str(tmp_path)))
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet cannot be read: .*No such file") as told:
        images(source, "train")
    assert "\n" not in str(told.value)
