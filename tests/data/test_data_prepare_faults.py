"""Preparation that is broken off goes on; images that cannot be decoded are accounted for; nothing half is taken."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_sources import encode, noise
from prepare_samples import (
    IMAGES,
    WHOLE,
    Cut,
    cut_after,
    identity,
    into,
    names,
    picture,
    prepare_made,
    read,
    source_of,
    write_shards,
)
from small_disk import small_disk

from bdkd_dist.config import Data
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.converting import Rules
from bdkd_dist.data.dataset import load_dataset
from bdkd_dist.data.prepare import prepare
from bdkd_dist.data.prepared import MANIFEST, read_manifest, sha256_of, verify
from bdkd_dist.data.sources import SourceSplit, find_source, labelled
from bdkd_dist.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Data:
    return write_shards(tmp_path)


# --- going on


def test_pieces_become_files_and_the_folder_holds_nothing_else(shards: Data, tmp_path: Path) -> None:
    prepared = into(tmp_path / "out", shards)
    assert names(tmp_path / "out") == WHOLE
    assert prepared == read_manifest(tmp_path / "out")
    verify(prepared)
    beton = Beton(*prepared.paths("train"))
    assert [part.samples for part in prepared.splits["train"]] == [IMAGES] * 3
    for index, sample in enumerate(find_source(shards).splits["train"].iterate()):
        assert (beton.encoded(index).tobytes(), beton.labels[index]) == (sample.image, sample.label)


def test_whole_pieces_are_kept_and_half_ones_done_again(shards: Data, tmp_path: Path) -> None:
    fresh = into(tmp_path / "fresh", shards)
    out, building = tmp_path / "out", tmp_path / "out.building"
    with pytest.raises(Cut):
        into(out, shards, progress=cut_after(3 * IMAGES), threads=1)
    assert not out.exists()
    records = {name.removesuffix(".json") for name in names(building) if name.endswith(".json")}
    assert len(records) in (2, 3)  # the pieces under way at once, without the one that was cut
    before = {name: identity(building / name) for name in records}
    calls: list[tuple[str, int, int]] = []
    prepared = into(out, shards, progress=lambda *call: calls.append(call))
    assert {name: identity(out / name) for name in records} == before
    assert prepared.content == fresh.content
    assert names(out) == WHOLE
    new = Counter(split for split, _, _ in calls)
    assert new == Counter({"train": 3, "test": 1})  # kept or new, each piece is told of once
    assert max(done for split, done, _ in calls if split == "train") == 3 * IMAGES


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.unlink(),
        lambda path: path.with_name(path.name + ".json").unlink(),
        lambda path: path.with_name(path.name + ".json").write_text('{"part": '),
        lambda path: path.with_name(path.name + ".json").write_text("[]"),
    ],
    ids=["cut", "gone", "no record", "half a record", "no such record"],
)
def test_what_is_not_whole_is_not_kept(shards: Data, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    out = tmp_path / "out"
    with pytest.raises(Cut):
        into(out, shards, progress=cut_after(3 * IMAGES), threads=1)
    one = next(
        path for path in (tmp_path / "out.building").glob("*.beton") if path.with_name(path.name + ".json").exists()
    )
    damage(one)
    (tmp_path / "out.building" / ".train-00001.beton-0.partial").write_text("half")
    assert into(out, shards).content == into(tmp_path / "fresh", shards).content
    assert names(out) == WHOLE


@pytest.mark.parametrize("change", ["source", "quality", "check"])
def test_pieces_of_other_settings_are_not_kept(shards: Data, tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    rules = Rules(check="headers" if change == "check" else "full")
    with pytest.raises(Cut):
        into(out, shards, rules, cut_after(3 * IMAGES), threads=1)
    kept = {path.name: identity(path) for path in (tmp_path / "out.building").glob("*.beton")}
    assert kept
    if change == "source":
        os.utime(tmp_path / "in" / "test-00000.parquet", ns=(0, 0))
    changed = shards.model_copy(update={"jpeg_quality": 80}) if change == "quality" else shards
    into(out, changed, Rules())
    assert not {name for name, was in kept.items() if identity(out / name) == was}


def test_a_full_check_stands_for_one_of_headers(shards: Data, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        into(tmp_path / "out", shards, Rules(), cut_after(3 * IMAGES), threads=1)
    kept = {path.name: identity(path) for path in (tmp_path / "out.building").glob("*.beton")}
    prepared = into(tmp_path / "out", shards, Rules(check="headers"))
    assert [name for name, was in kept.items() if identity(tmp_path / "out" / name) == was]
    assert prepared.check == "headers"


CHILD = textwrap.dedent("""
    import sys, time
    from bdkd_dist.config import Data
    from bdkd_dist.data.prepare import prepare

    def tell(split, done, total):
        if split == "train" and done == total:
            print("all read", flush=True)
            time.sleep(600)

    prepare(Data(dataset="files", num_classes=2, image_px=32, threads=1, root=sys.argv[1], prepared=sys.argv[2]), tell)
""")


@pytest.mark.slow  # another interpreter
def test_a_killed_preparation_leaves_its_whole_pieces_and_nothing_that_is_used(shards: Data) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(shards.root), shards.prepared],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "all read\n"
    (building,) = Path(shards.prepared).glob("*.building")
    deadline = time.monotonic() + 30
    while not (records := sorted(path.name for path in building.glob("train-*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = {record: identity(building / record.removesuffix(".json")) for record in records}
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert [path.suffix for path in Path(shards.prepared).iterdir() if path.is_dir()] == [".building"]
    prepared = prepare(shards)
    assert names(prepared.folder) == WHOLE
    verify(prepared)
    assert {record: identity(prepared.folder / record.removesuffix(".json")) for record in records} == before


# --- what is there already


def test_the_same_again_is_left_alone(shards: Data, tmp_path: Path) -> None:
    first = into(tmp_path / "out", shards)
    before = {name: identity(tmp_path / "out" / name) for name in WHOLE}
    assert into(tmp_path / "out", shards) == first
    assert into(tmp_path / "out", shards, Rules(check="headers", undecodable="leave-out")) == first
    assert {name: identity(tmp_path / "out" / name) for name in WHOLE} == before


@pytest.mark.parametrize(
    ("settings", "rules", "complaint"),
    [
        ({"max_side_px": 64}, Rules(64), "was prepared from another source, or with another --max-side or --quality"),
        ({}, Rules(check="full"), "was prepared with --check headers"),
    ],
)
def test_other_settings_are_refused(
    shards: Data, tmp_path: Path, settings: dict[str, int], rules: Rules, complaint: str
) -> None:
    into(tmp_path / "out", shards, Rules(check="headers"))
    before = {name: identity(tmp_path / "out" / name) for name in WHOLE}
    with pytest.raises(UserError, match=f"{tmp_path}/out {complaint}: give another folder, or delete it"):
        into(tmp_path / "out", shards.model_copy(update=settings), rules)
    assert {name: identity(tmp_path / "out" / name) for name in WHOLE} == before


def test_a_folder_of_other_things_is_refused(shards: Data, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="out exists and is no prepared data set: give a new folder"):
        into(tmp_path / "out", shards)
    assert names(tmp_path / "out") == ["thesis.txt"]
    with pytest.raises(UserError, match=r"thesis\.txt exists and is no prepared data set"):
        into(tmp_path / "out" / "thesis.txt", shards)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_is_taken(shards: Data, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    verify(into(tmp_path / "out", shards))


# --- the source


def test_a_source_that_vanishes_midway_is_named_and_what_is_whole_kept(shards: Data, tmp_path: Path) -> None:
    last = tmp_path / "in" / "train-00002.parquet"

    def vanish(split: str, done: int, total: int) -> None:
        if last.exists():
            last.rename(tmp_path / "hidden")

    with pytest.raises(UserError, match=r"in/train-00002\.parquet cannot be read: "):
        into(tmp_path / "out", shards, progress=vanish, threads=1)
    assert not (tmp_path / "out").exists()
    (tmp_path / "hidden").rename(last)
    records = [name for name in names(tmp_path / "out.building") if name.endswith(".json")]
    assert records
    before = {name: identity(tmp_path / "out.building" / name.removesuffix(".json")) for name in records}
    verify(into(tmp_path / "out", shards))
    assert {name: identity(tmp_path / "out" / name.removesuffix(".json")) for name in records} == before


@pytest.mark.parametrize("images", [1, 3])
def test_a_source_with_other_images_than_it_said_is_refused(tmp_path: Path, images: int) -> None:
    source = source_of({"train": [[picture(0)] * 2]})
    piece = replace(source.splits["train"].pieces[0], iterate=partial(read, [picture(0)] * images, "train"))
    source = replace(source, splits={"train": SourceSplit((piece,))})
    line = f"train, piece piece 0: {images} images came instead of 2: the source has changed"
    with pytest.raises(UserError, match=line):
        prepare_made(source, tmp_path / "out", Rules())
    assert names(tmp_path / "out.building") == []


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
def test_labels_outside_the_classes_are_named(labels: list[int]) -> None:
    source = source_of({"train": [[picture(0)] * 2]})
    piece = replace(source.splits["train"].pieces[0], labels=np.array(labels))
    with pytest.raises(UserError, match=r"made: train image \d has label (2|-1) \(allowed: 0 to 1\)"):
        labelled(replace(source, splits={"train": SourceSplit((piece,))}))


def test_a_split_without_labels_is_left_out() -> None:
    source = source_of({"train": [[picture(0)] * 2], "test": [[picture(0)] * 2], "validation": []})
    piece = replace(source.splits["test"].pieces[0], labels=np.array([-1, -1]))
    splits = source.splits | {"test": SourceSplit((piece,))}
    assert list(labelled(replace(source, splits=splits)).splits) == ["train"]
    with pytest.raises(UserError, match="made holds no images with labels"):
        labelled(replace(source, splits={"test": splits["test"]}))


# --- the disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size_mib=4) as folder:
        yield folder


def test_a_disk_that_fills_up_midway_is_said_and_the_same_goes_on(shards: Data, tmp_path: Path, disk: Path) -> None:
    ballast, told = disk / "ballast", 0

    def fill(split: str, done: int, total: int) -> None:
        nonlocal told
        told += 1
        if told == 2:
            with ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass

    with pytest.raises(
        UserError, match=rf"{disk}/out: the disk is full; what is whole is kept: make room, and the same"
    ):
        into(disk / "out", shards, progress=fill, threads=1)
    assert not (disk / "out").exists()
    assert not [name for name in names(disk / "out.building") if name.startswith(".")]
    ballast.unlink()
    prepared = into(disk / "out", shards)
    verify(prepared)
    assert prepared.content == into(tmp_path / "fresh", shards).content


def test_too_small_a_disk_is_said_before_writing(tmp_path: Path, disk: Path) -> None:
    source = source_of({"train": [[encode(noise(300, 300, seed), "JPEG", quality=95) for seed in range(60)]]})
    assert source.splits["train"].encoded_bytes > 5e6
    with pytest.raises(UserError, match=rf"{disk}/out: needs 0\.0 GB, 0\.0 GB free"):
        prepare_made(source, disk / "out", Rules())
    assert names(disk / "out.building") == []


def test_a_disk_of_its_own_is_refused(shards: Data, disk: Path) -> None:
    with pytest.raises(UserError, match=f"{disk} is a disk of its own: give a folder in it"):
        into(disk, shards)


# --- training from what was prepared


def test_what_was_prepared_is_trained_from(shards: Data, tmp_path: Path) -> None:
    into(tmp_path / "out", shards)
    dataset = load_dataset(shards.model_copy(update={"root": str(tmp_path / "out")}))
    assert (len(dataset.train) + len(dataset.validation), len(dataset.test)) == (3 * IMAGES, IMAGES)


def flip(path: Path) -> None:
    content = np.fromfile(path, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(path)


def other_version(path: Path) -> None:
    """A whole file, as the manifest has it, of another version."""
    content = np.fromfile(path, np.uint8)
    content[0] = 3
    content.tofile(path)
    manifest = json.loads((path.parent / MANIFEST).read_text())
    for parts in manifest["splits"].values():
        for part in parts:
            part["sha256"] = sha256_of(path.parent / part["file"])
    (path.parent / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), r"train-00001\.beton is truncated or grown"),
        (flip, r"train-00001\.beton was altered"),
        (lambda path: path.unlink(), r"train-00001\.beton is missing"),
        (other_version, r"train-00001\.beton is not a beton file of version 2"),
        (lambda path: (path.parent / MANIFEST).unlink(), r"out holds none of these|manifest\.json is missing"),
    ],
    ids=["cut", "byte", "gone", "version", "manifest"],
)
def test_damage_is_one_line_when_training_begins(
    shards: Data, tmp_path: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    prepared = into(tmp_path / "out", shards)
    damage(prepared.folder / "train-00001.beton")
    with pytest.raises(UserError, match=complaint):
        load_dataset(shards.model_copy(update={"root": str(tmp_path / "out")}))
