import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_sources import PNGS, data, images, noise, refuse, write_cifar100, write_folder, write_splits
from PIL import Image

from bdkd_dist.data.sources import find_source, open_source

SMALL = {"train": {"a": 2, "b": 1}, "test": {"b": 2}}


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
        "train": [sample.label for sample in source.splits["train"].iterate()],
        "validation": [0],
        "test": [1, 1],
    }
    samples = list(source.splits["train"].iterate())
    assert {sample.origin: sample.label for sample in samples} == {
        "train/a/0.png": 0,
        "train/a/1.png": 0,
        "train/a/deep/x.JPG": 0,
        "train/b/0.png": 1,
    }
    assert all(sample.image == (tmp_path / sample.origin).read_bytes() for sample in samples)
    assert source.splits["train"].encoded_bytes == sum(len(sample.image) for sample in samples)


def test_training_images_mix_classes_in_an_order_that_stays_and_others_follow_by_name(tmp_path: Path) -> None:
    counts = dict.fromkeys("abcd", 40)
    write_folder(tmp_path, {"train": counts, "val": counts, "test": counts}, side_px=1)
    by_name = sorted(f"{c}/{n}.png" for c in "abcd" for n in range(40))
    first, again = (open_source(data(root=str(tmp_path), num_classes=4)) for _ in range(2))
    origins = {name: [sample.origin for sample in split.iterate()] for name, split in first.splits.items()}
    assert origins["validation"] == [f"val/{name}" for name in by_name]
    assert origins["test"] == [f"test/{name}" for name in by_name]
    assert origins["train"] != sorted(origins["train"]) == [f"train/{name}" for name in by_name]
    assert [sample.origin for sample in again.splits["train"].iterate()] == origins["train"]
    for start in range(0, 160, 40):  # hypergeometric: 10 of each class, standard deviation 2.4
        assert np.bincount(first.splits["train"].labels[start : start + 40], minlength=4).min() >= 2


@pytest.mark.parametrize(("most", "lengths"), [("files", [3, 3, 3, 1]), ("bytes", [2, 2, 2, 2, 2])])
def test_an_image_folder_is_cut_into_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str, lengths: list[int]
) -> None:
    for n in range(10):
        for split in ("train", "test"):
            path = tmp_path / split / "ab"[n % 2] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes([n]) * 1000)
    whole = open_source(data(root=str(tmp_path))).splits["train"]
    limit = ("SMALL_PIECE_FILES", 3) if most == "files" else ("SMALL_PIECE_BYTES", 2999)
    monkeypatch.setattr(f"bdkd_dist.data.sources.folders.{limit[0]}", limit[1])
    split = open_source(data(root=str(tmp_path))).splits["train"]
    assert [len(piece) for piece in split.pieces] == lengths
    assert [piece.encoded_bytes for piece in split.pieces] == [1000 * length for length in lengths]
    assert list(split.iterate()) == list(whole.iterate())


def test_a_test_folder_without_classes_is_unlabelled(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": {"a": 1, "b": 1}, "val": {"b": 3}})
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(PNGS[0])
    assert open_source(data(root=str(tmp_path))).splits["test"].labels.tolist() == [1, 1, 1]


def test_images_without_classes_are_a_test_split_where_asked_for(tmp_path: Path) -> None:
    for n in (1, 0):
        (tmp_path / f"{n}.png").write_bytes(PNGS[n])
    (tmp_path / "._0.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image either")
    source = find_source(data(root=str(tmp_path)), without_classes=True)
    assert list(source.splits) == ["test"]
    assert images(source, "test") == PNGS[:2]
    assert source.splits["test"].labels.tolist() == [0, 0]
    refuse("holds none of these", root=str(tmp_path))
    write_folder(tmp_path, SMALL)
    assert sorted(find_source(data(root=str(tmp_path)), without_classes=True).splits) == ["test", "train"]


def test_libraries_are_loaded_when_a_source_needs_them() -> None:
    heavy = "{'pyarrow', 'torchvision', 'sklearn', 'filelock', 'PIL'}"
    code = f"import sys, bdkd_dist.data.sources; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- digits and CIFAR


def test_digits_are_found_without_loading_scikit_learn() -> None:
    code = (
        "import sys; from bdkd_dist.config import Data; from bdkd_dist.data.sources import open_source; "
        "open_source(Data(dataset='digits', num_classes=10, image_px=32)); assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
    assert open_source(data(prepared=str(cifar100.root), **settings)).fingerprint == source.fingerprint


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
        prepared=str(tmp_path),
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
    refuse(
        r"data\.root is not set: give a folder of Parquet shards .* an image folder \(train/<class>/\.\.\.\) or "
        r"a folder of tars \(train\*\.tar: of class folders, a WebDataset, or train/<class>\.tar\)$"
    )
    refuse(r"data\.root is not set: .*, or data\.download=true$", dataset="cifar10", prepared=str(tmp_path))
    refuse(r"data\.root=/no/where does not exist", root="/no/where")
    refuse(r"data\.root=.* holds none of these", root=str(tmp_path))
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
