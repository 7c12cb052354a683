from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_sources import data, noise, write_folder
from realdata import CLOTHING, needs_clothing

from bdkd_dist.data.beton import BetonWriter
from bdkd_dist.data.dataset import load_dataset
from bdkd_dist.data.prepared import Part, Prepared, write_manifest
from bdkd_dist.errors import UserError

DIGITS = {"dataset": "digits", "num_classes": 10, "image_px": 8}


def test_digits_split_into_three_without_a_sample_in_common(cache: Path) -> None:
    dataset = load_dataset(data(prepared=str(cache), **DIGITS))
    assert dataset.class_names == tuple("0123456789")
    assert dataset.train.beton == dataset.validation.beton != dataset.test.beton
    train, validation = set(dataset.train.indices.tolist()), set(dataset.validation.indices.tolist())
    assert not train & validation
    assert train | validation == set(range(len(dataset.train.beton)))
    assert dataset.test.indices.tolist() == list(range(len(dataset.test.beton)))
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 1797
    for subset in (dataset.train, dataset.validation, dataset.test):
        assert subset.indices.dtype == subset.labels.dtype == np.int64
        np.testing.assert_array_equal(subset.labels, subset.beton.labels[subset.indices])
        assert set(subset.labels.tolist()) == set(range(10))


def test_a_limit_leaves_validation_and_test_whole(cache: Path) -> None:
    whole = load_dataset(data(prepared=str(cache), **DIGITS))
    limited = load_dataset(data(prepared=str(cache), train_limit=100, **DIGITS))
    assert len(limited.train) == 100
    assert np.bincount(limited.train.labels).min() >= 9
    assert set(limited.train.indices.tolist()) < set(whole.train.indices.tolist())
    for one, other in ((limited.validation, whole.validation), (limited.test, whole.test)):
        np.testing.assert_array_equal(one.indices, other.indices)
    assert limited.fingerprint == whole.fingerprint
    with pytest.raises(UserError, match=r"data\.train_limit=2000: there are only 1293 training images"):
        load_dataset(data(prepared=str(cache), train_limit=2000, **DIGITS))


def test_a_validation_split_of_the_source_is_used_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"train": {"a": 3, "b": 3}, "val": {"a": 2, "b": 1}, "test": {"b": 1}})
    dataset = load_dataset(data(root=str(tmp_path / "x"), prepared=str(tmp_path / "cache")))
    assert dataset.validation.beton.paths[0].name == "validation-00000.beton"
    assert dataset.validation.labels.tolist() == [0, 0, 1]
    assert sorted(dataset.train.labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_where_validation_stands_in_for_test_training_images_are_held_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 1}})
    dataset = load_dataset(data(root=str(tmp_path / "x"), prepared=str(tmp_path / "cache"), validation_fraction=0.25))
    assert dataset.test.labels.tolist() == [0, 0, 1]
    assert dataset.validation.beton.paths[0].name == "train-00000.beton"
    assert sorted(dataset.validation.labels.tolist()) == [0, 1]
    assert sorted(dataset.train.labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_classes_of_one_image_each_cannot_be_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"train": {"a": 1, "b": 1}, "test": {"a": 1}})
    with pytest.raises(UserError, match=r"data\.validation_fraction=0\.1: no class has two training images"):
        load_dataset(data(root=str(tmp_path / "x"), prepared=str(tmp_path / "cache")))


def test_files_are_verified_before_use(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"train": {"a": 2, "b": 2}, "test": {"a": 1}})
    settings = data(root=str(tmp_path / "x"), prepared=str(tmp_path / "cache"))
    (path,) = load_dataset(settings).test.beton.paths
    path.write_bytes(path.read_bytes().replace(b"image", b"imago"))
    with pytest.raises(UserError, match=r"test-00000\.beton was altered"):
        load_dataset(settings)


def test_a_prepared_folder_is_a_root(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 1}})
    made = load_dataset(data(root=str(tmp_path / "x"), prepared=str(tmp_path / "cache"), validation_fraction=0.25))
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    read = load_dataset(data(root=str(folder), prepared=str(tmp_path / "unused"), validation_fraction=0.25))
    assert not (tmp_path / "unused").exists()
    assert read.fingerprint == made.fingerprint
    assert read.train.indices.tolist() == made.train.indices.tolist()
    with pytest.raises(UserError, match=rf"data\.num_classes=3: data\.root={folder} has 2 classes"):
        load_dataset(data(root=str(folder), num_classes=3))


def test_prepared_files_without_their_manifest_are_named(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "train-00000.beton", 1) as writer:
        writer.append_raw(noise(8, 8), 0)
    with pytest.raises(UserError, match=rf"{tmp_path}/manifest\.json is missing: .* was not prepared to its end"):
        load_dataset(data(root=str(tmp_path)))


def test_a_prepared_folder_without_training_images_is_named(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "validation-00000.beton", 1) as writer:
        writer.append_raw(noise(8, 8), 0)
    part = Part("validation-00000.beton", 1, 0, "")
    write_manifest(Prepared(tmp_path, "f", ("a", "b"), {"validation": (part,)}))
    with pytest.raises(UserError, match=r"data\.root=.* holds no train images \(it holds: validation\)"):
        load_dataset(data(root=str(tmp_path)))


@pytest.mark.parametrize("stage", ["local", "memory"])
def test_a_staged_set_is_the_same_read_from_its_copy(tmp_path: Path, stage: str) -> None:
    write_folder(tmp_path / "x", {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 1}})
    settings = {"root": str(tmp_path / "x"), "prepared": str(tmp_path / "cache")}
    shared = load_dataset(data(**settings))
    staged = load_dataset(data(stage=stage, stage_folder=str(tmp_path / "near"), **settings))
    assert staged.fingerprint == shared.fingerprint
    for one, other in ((staged.train, shared.train), (staged.test, shared.test)):
        assert one.indices.tolist() == other.indices.tolist()
        assert one.beton.paths != other.beton.paths
        for index in other.indices:
            np.testing.assert_array_equal(one.beton.pixels(int(index)), other.beton.pixels(int(index)))


@needs_clothing
def test_photographs_with_three_splits(tmp_path: Path) -> None:
    for split, rows in (("train", 100), ("validation", 50), ("test", 20)):
        pq.write_table(pq.read_table(next(CLOTHING.glob(f"{split}-*"))).slice(0, rows), tmp_path / f"{split}.parquet")
    settings = data(root=str(tmp_path), prepared=str(tmp_path / "cache"), num_classes=10, image_px=224, max_side_px=256)
    dataset = load_dataset(settings)
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [100, 50, 20]
    beton = dataset.train.beton
    assert max(beton.heights.max(), beton.widths.max()) == 256
    assert beton.is_jpeg.all()
