import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_sources import FILE, data, encode, noise, write_cifar100, write_folder, write_shard
from PIL import Image
from realdata import CIFAR100, CLOTHING, needs_cifar100, needs_clothing

from bdkd_dist.data.sources import Source, open_source
from bdkd_dist.errors import UserError

PNGS = [encode(noise(4, 4, seed)) for seed in range(6)]
SMALL = {"train": {"a": 2, "b": 1}, "test": {"b": 2}}


def write_splits(root: Path, **splits: list[int]) -> None:
    for name, labels in splits.items():
        write_shard(root / f"{name}-00000-of-00001.parquet", PNGS[: len(labels)], labels)


def refuse(complaint: str, **settings: object) -> None:
    with pytest.raises(UserError, match=complaint):
        open_source(data(**settings))


def images(source: Source, split: str) -> list[object]:
    return [sample.image for sample in source.splits[split].iterate()]


# --- Parquet


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train-0.parquet", "validation-0.parquet", "test-0.parquet"),
        ("train.parquet", "val_0.parquet", "test.parquet"),
        ("data/train-0.parquet", "data/valid-0.parquet", "data/test-0.parquet"),
        ("train/0000.parquet", "val/0000.parquet", "test/0000.parquet"),
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
        assert source.splits["test"].name == "test"
        assert source.splits["test"].labels.tolist() == [1, 1, 0]


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


# --- image folders


def test_classes_of_an_image_folder_are_those_of_train_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": {"b": 1, "a": 2}, "val": {"a": 1}, "test": {"b": 2}})
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "a" / "._0.png").write_text("no image either")
    (tmp_path / "train" / "a" / "deep").mkdir()
    (tmp_path / "train" / "a" / "deep" / "x.JPG").write_bytes(b"anything")
    source = open_source(data(root=str(tmp_path)))
    assert source.class_names == ("a", "b")
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 0, 0, 1],
        "validation": [0],
        "test": [1, 1],
    }
    samples = list(source.splits["train"].iterate())
    assert [sample.origin for sample in samples] == [
        f"train/{n}" for n in ("a/0.png", "a/1.png", "a/deep/x.JPG", "b/0.png")
    ]
    assert samples[1].image == (tmp_path / "train/a/1.png").read_bytes()
    assert source.splits["train"].encoded_bytes == sum(len(sample.image) for sample in samples)


def test_images_of_a_class_follow_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": {"a": 20, "b": 20}, "test": {"a": 1}})
    origins = [sample.origin for sample in open_source(data(root=str(tmp_path))).splits["train"].iterate()]
    assert origins == sorted(f"train/{c}/{n}.png" for c in "ab" for n in range(20))


def test_a_test_folder_without_classes_is_unlabelled(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": {"a": 1, "b": 1}, "val": {"b": 3}})
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(PNGS[0])
    assert open_source(data(root=str(tmp_path))).splits["test"].labels.tolist() == [1, 1, 1]


# --- digits and CIFAR


@pytest.mark.parametrize("side_px", [8, 32])
def test_digits_are_scikit_learns_in_order(side_px: int) -> None:
    from sklearn.datasets import load_digits

    source = open_source(data(dataset="digits", num_classes=10, image_px=side_px))
    train, test = images(source, "train"), images(source, "test")
    bunch = load_digits()
    assert len(train) + len(test) == len(bunch.target)
    share = np.bincount(source.splits["test"].labels) / np.bincount(bunch.target)
    assert np.all(np.abs(share - 0.2) < 0.5 / 170)
    of_class = bunch.images[bunch.target == 3]
    found = [i for i, label in zip(test, source.splits["test"].labels, strict=True) if label == 3]
    found += [i for i, label in zip(train, source.splits["train"].labels, strict=True) if label == 3]
    expected = [np.array([[int(v * 255 / 16 + 0.5) for v in row] for row in image], np.uint8) for image in of_class]
    if side_px != 8:
        expected = [
            np.asarray(Image.fromarray(e).resize((side_px, side_px), Image.Resampling.BICUBIC)) for e in expected
        ]
    assert {image.tobytes() for image in found} == {np.dstack([e] * 3).tobytes() for e in expected}


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A small CIFAR-100 in its own layout, which torchvision takes for the real one."""
    import hashlib

    from torchvision.datasets import CIFAR100 as TORCHVISION

    train = np.stack([noise(32, 32, seed) for seed in range(120)])
    test = np.stack([noise(32, 32, 1000 + seed) for seed in range(100)])
    files = write_cifar100(tmp_path, train, test)
    md5 = {name: hashlib.md5(path.read_bytes()).hexdigest() for name, path in files.items()}
    monkeypatch.setattr(TORCHVISION, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(TORCHVISION, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(TORCHVISION, "meta", {**TORCHVISION.meta, "md5": md5["meta"]})
    return SimpleNamespace(root=tmp_path, train=train, test=test, files=files)


@pytest.mark.parametrize("download", [True, False])
def test_cifar_of_torchvision_needs_no_network_once_there(cifar100: SimpleNamespace, download: bool) -> None:
    settings = {"dataset": "cifar100", "num_classes": 100, "download": download}
    source = open_source(data(root=str(cifar100.root), **settings))
    np.testing.assert_array_equal(images(source, "train"), cifar100.train)
    np.testing.assert_array_equal(images(source, "test"), cifar100.test)
    assert source.splits["train"].labels.tolist() == [*range(100), *range(20)]
    assert source.class_names[42] == "class 42"
    (cifar100.root / "torchvision").mkdir()
    (cifar100.root / "cifar-100-python").rename(cifar100.root / "torchvision" / "cifar-100-python")
    assert open_source(data(cache=str(cifar100.root), **settings)).fingerprint == source.fingerprint


def test_an_altered_cifar_is_refused(cifar100: SimpleNamespace) -> None:
    with cifar100.files["train"].open("ab") as file:
        file.write(b"x")
    refuse("incomplete or altered", dataset="cifar100", num_classes=100, root=str(cifar100.root))


def test_without_a_network_download_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def no_network(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    refuse(
        r"data\.download=true: cannot fetch cifar100 \(.*no route to host.*set data\.root to",
        dataset="cifar100",
        num_classes=100,
        download=True,
        cache=str(tmp_path),
    )


# --- the fingerprint


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_the_fingerprint_follows_files_and_storage_but_not_the_place(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "here"
    if kind == "folder":
        write_folder(root, SMALL)
    else:
        write_splits(root, train=[0, 1], test=[0])

    def fingerprint(**settings: object) -> str:
        return open_source(data(root=str(root), **settings)).fingerprint

    first = fingerprint()
    assert fingerprint(image_px=64, validation_fraction=0.3, train_limit=1) == first
    assert len({first, fingerprint(max_side_px=100), fingerprint(jpeg_quality=50)}) == 3
    root = root.rename(tmp_path / "there")
    assert fingerprint() == first
    some = next(path for path in sorted(root.rglob("*")) if path.is_file())
    os.utime(some, ns=(0, some.stat().st_mtime_ns + 1))
    assert fingerprint() not in (first, fingerprint(max_side_px=100))


def test_the_fingerprint_of_digits_follows_their_size() -> None:
    small, large = (open_source(data(dataset="digits", num_classes=10, image_px=px)).fingerprint for px in (16, 32))
    assert small != large


# --- mistakes


def test_mistakes_about_the_root(tmp_path: Path) -> None:
    refuse(r"data\.root is not set: give a folder of Parquet shards .* or an image folder \(train/<class>/\.\.\.\)$")
    refuse(r"data\.root is not set: .*, or data\.download=true$", dataset="cifar10", cache=str(tmp_path))
    refuse(r"data\.root=/no/where does not exist", root="/no/where")
    refuse(r"data\.root=.* holds neither", root=str(tmp_path))
    write_splits(tmp_path, test=[0])
    refuse(r"has no train-\*\.parquet", root=str(tmp_path))


def test_a_source_needs_a_test_split_with_labels(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1])
    refuse("neither a test nor a validation split", root=str(tmp_path))
    write_splits(tmp_path, test=[-1])
    refuse("neither a test nor a validation split", root=str(tmp_path))


def test_class_counts_must_agree(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1, 2], test=[0])
    refuse(rf"data\.num_classes=10: the source {tmp_path} has 3 classes", root=str(tmp_path), num_classes=10)
    write_splits(tmp_path, train=[0, 0, 0])
    refuse("fewer than two classes", root=str(tmp_path))


@pytest.mark.parametrize("wrong", [-1, 2])
def test_labels_out_of_range_are_named(tmp_path: Path, wrong: int) -> None:
    write_splits(tmp_path, train=[0, 1], test=[0, wrong])
    refuse(rf"test image 1 has label {wrong} \(allowed: 0 to 1\)", root=str(tmp_path))


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
    refuse(r"train-00001\.parquet cannot be read", root=str(tmp_path))
    write_shard(second, PNGS[:1], [0], image_column="other")
    refuse(r"train-00001\.parquet has no column 'image'", root=str(tmp_path))
    pq.write_table(pa.table({"image": pa.nulls(1, FILE), "label": pa.array([None], pa.int64())}), second)
    refuse(r"train-00001\.parquet: label column 'label' has rows without an integer", root=str(tmp_path))
    second.write_bytes(b"no Parquet at all")
    refuse(r"train-00001\.parquet cannot be read", root=str(tmp_path))


def test_a_row_without_bytes_is_named(tmp_path: Path) -> None:
    write_splits(tmp_path, test=[0])
    write_shard(tmp_path / "train.parquet", [PNGS[0], None], [0, 1])
    with pytest.raises(UserError, match=r"train\.parquet row 1: column 'image' holds no image bytes"):
        images(open_source(data(root=str(tmp_path))), "train")


def test_a_damaged_shard_is_named_while_it_streams(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1], test=[0])
    path = tmp_path / "train-00000-of-00001.parquet"
    source = open_source(data(root=str(tmp_path)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet cannot be read"):
        images(source, "train")


def test_mistakes_about_class_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "c": 1}})
    refuse(r"test/c: a class that .*train does not have", root=str(tmp_path))
    write_folder(tmp_path / "2", {"train": {"a": 1}, "test": {"a": 1}})
    refuse("fewer than two classes", root=str(tmp_path / "2"))
    write_folder(tmp_path / "3", {"train": {"a": 1, "b": 0}, "test": {"a": 1}})
    refuse(r"train/b holds no images", root=str(tmp_path / "3"))
    (tmp_path / "4" / "train").mkdir(parents=True)
    refuse(r"train holds no class folders", root=str(tmp_path / "4"))
    write_folder(tmp_path / "5", {"train": {"a": 1, "b": 1}})
    refuse("neither a test nor a validation split", root=str(tmp_path / "5"))
