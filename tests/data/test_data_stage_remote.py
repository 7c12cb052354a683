"""Prepared files in a bucket: known for what they are, copied near, whole or not there."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_s3 import Bucket, serve
from fake_sources import data
from prepare_samples import IMAGES, into, write_shards

from bdkd_dist.config import Data
from bdkd_dist.data.dataset import find_prepared, load_dataset, open_dataset
from bdkd_dist.data.prepared import MANIFEST, VERIFIED, Prepared, sha256_of
from bdkd_dist.errors import UserError

BIG = "train-00001.beton"
"""8 MiB and more, as every beton: read by two requests."""


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return into(tmp_path / "bucket" / "prepared", write_shards(tmp_path))


@pytest.fixture
def s3(tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with serve(tmp_path / "bucket") as bucket:
        yield bucket


def settings(s3: Bucket, tmp_path: Path, **changed: object) -> Data:
    near: dict[str, object] = {"stage": "local", "stage_folder": str(tmp_path / "near")}
    return data(**{"root": s3.uri("prepared"), "prepared": str(tmp_path / "cache")} | near | changed)


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.beton")}


def copy_of(prepared: Prepared, tmp_path: Path) -> Path:
    return tmp_path / "near" / prepared.content[:16]


def refused(settings: Data) -> str:
    with pytest.raises(UserError) as told:
        load_dataset(settings)
    line = str(told.value)
    assert "\n" not in line
    assert "hidden" not in line
    return line


@pytest.mark.parametrize("near", ["local", "memory"])
def test_what_lies_in_a_bucket_is_copied_and_opened(
    s3: Bucket, prepared: Prepared, tmp_path: Path, near: str, caplog: pytest.LogCaptureFixture
) -> None:
    there = load_dataset(settings(s3, tmp_path, stage=near))
    here = load_dataset(data(root=str(prepared.folder)))
    assert there.fingerprint == here.fingerprint
    assert there.train.beton.paths[0].parent == copy_of(prepared, tmp_path)
    for one, other in ((there.train, here.train), (there.validation, here.validation), (there.test, here.test)):
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_array_equal(one.labels, other.labels)
        for index in one.indices.tolist():
            np.testing.assert_array_equal(one.beton.pixels(index), other.beton.pixels(index))
    assert sums(copy_of(prepared, tmp_path)) == sums(prepared.folder)
    assert f"GB of images from s3://images/prepared to {copy_of(prepared, tmp_path)}" in caplog.text
    assert "hidden" not in caplog.text
    assert not (tmp_path / "cache").exists()  # nothing was prepared


def test_a_whole_copy_needs_only_the_manifest_of_the_bucket(s3: Bucket, tmp_path: Path) -> None:
    first = load_dataset(settings(s3, tmp_path))
    s3.requests.clear()
    assert load_dataset(settings(s3, tmp_path)).fingerprint == first.fingerprint
    assert {key for method, key, _ in s3.requests if method == "GET"} == {f"prepared/{MANIFEST}"}


def test_sizes_and_labels_are_known_without_the_images(s3: Bucket, prepared: Prepared, tmp_path: Path) -> None:
    wanted = load_dataset(data(root=str(prepared.folder)))
    s3.requests.clear()
    found = find_prepared(settings(s3, tmp_path))
    dataset = open_dataset(found, settings(s3, tmp_path))
    for one, other in ((dataset.train, wanted.train), (dataset.validation, wanted.validation)):
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert len(dataset.test) == IMAGES
    assert dataset.fingerprint == wanted.fingerprint
    assert sum(sent for _, _, sent in s3.requests) < sum(part.bytes for part in prepared.parts) / 100
    assert not (tmp_path / "near").exists()


def test_a_file_that_is_no_beton_is_named_where_it_lies(s3: Bucket, prepared: Prepared, tmp_path: Path) -> None:
    with (prepared.folder / BIG).open("r+b") as file:
        file.write(b"\x03")
    found = find_prepared(settings(s3, tmp_path))
    with pytest.raises(UserError, match=f"^s3://images/prepared/{BIG} is not a beton file of version 2$"):
        open_dataset(found, settings(s3, tmp_path))


def test_a_bucket_cannot_be_read_in_place(s3: Bucket, tmp_path: Path) -> None:
    assert refused(settings(s3, tmp_path, stage="shared")) == (
        "data.root=s3://images/prepared cannot be read in place: set data.stage=local, or memory, and each node "
        "copies it"
    )


def test_a_file_uri_is_read_in_place_or_copied(prepared: Prepared, tmp_path: Path) -> None:
    root = f"file://{prepared.folder}"
    assert load_dataset(data(root=root)).train.beton.paths == prepared.paths("train")
    staged = load_dataset(data(root=root, stage="local", stage_folder=str(tmp_path / "near")))
    assert staged.train.beton.paths[0].parent == copy_of(prepared, tmp_path)


# --- faults


def change_a_byte(path: Path) -> None:
    content = np.fromfile(path, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(path)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change_a_byte, rf"^s3://images/prepared/{BIG} was altered: its SHA-256 is not the manifest's$"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), rf"^s3://images/prepared/{BIG} cannot be read: "),
        (lambda path: path.unlink(), rf"^s3://images/prepared/{BIG} cannot be read: "),
        (
            lambda path: (path.parent / MANIFEST).unlink(),
            r"^s3://images/prepared/manifest\.json is missing: s3://images/prepared is no prepared data set",
        ),
        (
            lambda path: (path.parent / MANIFEST).write_text("{"),
            r"^s3://images/prepared/manifest\.json cannot be read; delete the folder s3://images/prepared to prepare",
        ),
    ],
    ids=["byte", "cut", "gone", "no manifest", "half a manifest"],
)
def test_damage_in_the_bucket_is_one_line_and_mended_there_it_goes_on(
    s3: Bucket, prepared: Prepared, tmp_path: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    shutil.copytree(prepared.folder, tmp_path / "mended")
    damage(prepared.folder / BIG)
    assert re.search(complaint, refused(settings(s3, tmp_path)))
    copy = copy_of(prepared, tmp_path)
    assert not (copy / BIG).exists()
    assert not (copy / MANIFEST).exists()
    assert not list(copy.glob("*.partial"))
    kept = {path.name: path.stat().st_ino for path in copy.glob("*.beton")}
    shutil.copytree(tmp_path / "mended", prepared.folder, dirs_exist_ok=True)
    load_dataset(settings(s3, tmp_path))
    assert sums(copy) == sums(prepared.folder)
    assert kept.items() <= {path.name: path.stat().st_ino for path in copy.glob("*.beton")}.items()


class Midway(list[tuple[str, str, int]]):
    """What is asked of a bucket; calls a function when the first bytes of the big file are on their way."""

    def __init__(self, then: Callable[[], object]):
        super().__init__()
        self._then, self._done = then, False

    def append(self, request: tuple[str, str, int]) -> None:
        super().append(request)
        _, key, sent = request
        if key.endswith(BIG) and sent > 2**22 and not self._done:
            self._done = True
            self._then()


@pytest.mark.parametrize("fault", ["forbidden", pytest.param("unplugged", marks=pytest.mark.slow), "cut", "byte"])
def test_a_bucket_that_fails_midway_is_named_and_whole_files_are_kept(
    s3: Bucket, prepared: Prepared, tmp_path: Path, fault: str
) -> None:
    shutil.copytree(prepared.folder, tmp_path / "mended")
    big = prepared.folder / BIG
    effects: dict[str, Callable[[], object]] = {
        "cut": lambda: os.truncate(big, 2**23 + 100),
        "byte": lambda: big.write_bytes(big.read_bytes()[: 2**23] + bytes(big.stat().st_size - 2**23)),
    }
    s3.requests = asked = Midway(effects.get(fault, lambda: setattr(s3, fault, True)))
    line = refused(settings(s3, tmp_path))
    reason = "(was altered|is truncated)" if fault in effects else "cannot be read: "
    assert re.match(rf"s3://images/prepared/t.*\.beton {reason}", line)
    assert sum(key.endswith(BIG) and sent > 0 for _, key, sent in asked) >= 1
    copy = copy_of(prepared, tmp_path)
    assert not (copy / BIG).exists()
    assert not (copy / MANIFEST).exists()
    assert not list(copy.glob("*.partial"))
    kept = {path.name: path.stat().st_ino for path in copy.glob("*.beton")}
    if fault in effects:
        shutil.copytree(tmp_path / "mended", prepared.folder, dirs_exist_ok=True)
    else:
        setattr(s3, fault, False)
    load_dataset(settings(s3, tmp_path))
    assert sums(copy) == sums(prepared.folder)
    assert kept.items() <= {path.name: path.stat().st_ino for path in copy.glob("*.beton")}.items()
    assert (copy / VERIFIED).exists()


def test_other_things_in_a_bucket_are_no_prepared_set(s3: Bucket, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "in", tmp_path / "bucket" / "shards")
    (tmp_path / "bucket" / "shards" / MANIFEST).write_text('{"files": []}')
    dataset = load_dataset(settings(s3, tmp_path, root=s3.uri("shards")))  # shards, prepared on the way
    assert len(dataset.test) == IMAGES
    assert list((tmp_path / "cache").glob("shards-*"))
    assert refused(settings(s3, tmp_path, root=s3.uri("nowhere"))).startswith(
        "data.root=s3://images/nowhere does not exist: give"
    )
