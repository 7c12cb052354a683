"""Sources elsewhere: by URI, and over the S3 protocol from a server on this machine."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_s3 import Bucket, serve
from fake_sources import PNGS, data, images, refuse, write_folder, write_shard, write_splits, write_tar

from bdkd_dist.data.sources import Source, find_source, open_source
from bdkd_dist.errors import UserError
from bdkd_dist.uris import shown


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with serve(tmp_path) as bucket:
        yield bucket


def write(root: Path, kind: str) -> Path:
    if kind == "parquet":
        write_splits(root, train=[0, 1, 1, 0], test=[1, 0])
    elif kind == "folder":
        write_folder(root, {"train": {"a": 30, "b": 30}, "val": {"a": 2}, "test": {"b": 3}})
    elif kind == "tar":
        write_tar(root / "train.tar", {f"{'ab'[n % 2]}/{n}.png": PNGS[n] for n in range(6)})
        write_tar(root / "test.tar", {f"{'ab'[n % 2]}/{n}.png": PNGS[n] for n in range(3)})
    else:
        for name in "ab":
            write_tar(root / "train" / f"{name}.tar", {f"{n}.png": os.urandom(n) for n in range(40)})
        write_tar(root / "test" / "a.tar", {"0.png": PNGS[0]})
    return root


def contents(source: Source) -> dict[str, list[tuple[object, int, str]]]:
    return {name: [tuple(sample) for sample in split.iterate()] for name, split in source.splits.items()}


@pytest.mark.parametrize("kind", ["parquet", "folder", "tar", "tar per class"])
def test_a_bucket_holds_what_a_folder_holds(tmp_path: Path, s3: Bucket, kind: str) -> None:
    here = open_source(data(root=str(write(tmp_path / "some" / "set", kind))))
    there = open_source(data(root=s3.uri("some/set")))
    assert contents(there) == contents(here)
    assert (there.name, there.class_names) == ("set", here.class_names)
    assert open_source(data(root=s3.uri("some/set/"))).fingerprint == there.fingerprint
    some = max((tmp_path / "some" / "set").rglob("*.*"))
    os.utime(some, (1, 1))
    assert open_source(data(root=s3.uri("some/set"))).fingerprint != there.fingerprint


def test_only_labels_are_read_of_a_bucket_before_images_are_asked_for(tmp_path: Path, s3: Bucket) -> None:
    for split in ("train", "test"):
        noise = [os.urandom(100_000) for _ in range(100)]
        write_shard(tmp_path / f"{split}.parquet", noise, [0, 1] * 50, compression="none")
    source = open_source(data(root=s3.uri()))
    assert sum(sent for _, _, sent in s3.requests) < 1_000_000
    s3.requests.clear()
    assert sum(len(image) for image in images(source, "train")) == 10_000_000
    assert 10_000_000 < sum(sent for _, _, sent in s3.requests) < 11_000_000


def test_shards_are_looked_at_side_by_side(tmp_path: Path, s3: Bucket) -> None:
    for n in range(32):
        write_shard(tmp_path / f"train-{n}.parquet", PNGS[:2], [0, 1])
    write_splits(tmp_path, test=[0])
    s3.together, s3.met = 8, False
    assert len(open_source(data(root=s3.uri())).splits["train"].pieces) == 32
    assert s3.met


def test_images_of_a_bucket_are_fetched_side_by_side_and_in_order(tmp_path: Path, s3: Bucket) -> None:
    here = open_source(data(root=str(write(tmp_path / "set", "folder"))))
    there = open_source(data(root=s3.uri("set")))
    s3.together, s3.met = 8, False
    assert images(there, "train") == images(here, "train")
    assert s3.met


def test_a_reader_that_stops_midway_fetches_no_more(tmp_path: Path, s3: Bucket) -> None:
    write(tmp_path / "set", "folder")
    stream = open_source(data(root=s3.uri("set"))).splits["train"].iterate()
    next(stream)
    stream.close()
    time.sleep(0.2)
    assert 0 < sum(key.startswith("set/train/") and sent > 0 for _, key, sent in s3.requests) < 45  # of 60


# --- mistakes and faults


def refused_line(root: str) -> str:
    with pytest.raises(UserError) as told:
        open_source(data(root=root))
    line = str(told.value)
    assert "hidden" not in line
    assert "\n" not in line
    return line


def test_what_is_not_there_is_told(tmp_path: Path, s3: Bucket) -> None:
    write(tmp_path / "set", "folder")
    assert refused_line(s3.uri("other")).startswith("data.root=s3://images/other does not exist: give a folder of")
    assert refused_line(s3.uri("set", bucket="image")).startswith("data.root=s3://image/set does not exist: give")
    assert refused_line(s3.uri("set/train/a")).startswith("data.root=s3://images/set/train/a holds none of these: give")
    s3.forbidden = True
    assert refused_line(s3.uri("set")).startswith("s3://images/set cannot be read: ")
    assert "ACCESS_DENIED" in refused_line(s3.uri("set"))


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told(s3: Bucket) -> None:
    s3.port = 9  # nobody listens there
    assert refused_line(s3.uri("set")).startswith("s3://images/set cannot be read: ")


@pytest.mark.parametrize("kind", ["parquet", "folder", "tar", "tar per class"])
@pytest.mark.parametrize("fault", ["deleted", "forbidden", pytest.param("unplugged", marks=pytest.mark.slow)])
def test_a_bucket_that_vanishes_midway_is_told(tmp_path: Path, s3: Bucket, kind: str, fault: str) -> None:
    write(tmp_path / "set", kind)
    source = open_source(data(root=s3.uri("set")))
    if fault == "deleted":
        for path in [path for path in (tmp_path / "set").rglob("*") if path.is_file()]:
            path.unlink()
    else:
        setattr(s3, fault, True)
    with pytest.raises(UserError, match=r"^s3://images/set/t.* cannot be read: ") as told:
        images(source, "train")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("root", "complaint"),
    [
        (
            "gs3://x/y",
            r"^data\.root=gs3://x/y: unknown file system 'gs3'; did you mean 's3'\? \(allowed: abfs, .*gs.*s3",
        ),
        ("http://host/set", r"unknown file system 'http'.* \(allowed: .*\); or give a path$"),
        ("file:///no/where", r"^data\.root=file:///no/where does not exist: give"),
        ("hdfs://localhost:1/x", r"^hdfs://localhost:1/x cannot be read: "),
    ],
)
def test_mistakes_about_uris(root: str, complaint: str) -> None:
    refuse(complaint, root=root)
    assert refused_line(root)


def test_paths_and_uris_of_this_machine_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my set", "folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    roots = ["my set", "~/my set", f"{tmp_path}/my set/", f"file://{tmp_path}/my%20set"]
    first, *others = [open_source(data(root=root)) for root in roots]
    assert {source.fingerprint for source in others} == {first.fingerprint}
    assert {source.name for source in (first, *others)} == {"my set"}
    assert all(contents(source) == contents(first) for source in others)


def test_a_name_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    write(tmp_path / "set", "folder")
    Path(os.fsdecode(os.fsencode(tmp_path / "set" / "train" / "a") + b"/\xff.png")).write_bytes(b"x")
    refuse(r"set/train/a cannot be read: .*utf-8", root=str(tmp_path / "set"))


@pytest.mark.parametrize("secret", ["plain", "a/b", "a@b", "a/b@c:d"])
def test_a_key_in_a_uri_is_never_shown(secret: str) -> None:
    assert shown(f"s3://AKEY:{secret}@bucket/images?region=x") == "s3://bucket/images"
    assert shown("s3://bucket/images") == "s3://bucket/images"
    assert shown("/data/a:b@c") == "/data/a:b@c"


def test_a_key_in_a_uri_that_cannot_be_parsed_is_not_shown() -> None:
    with pytest.raises(UserError) as caught:
        find_source(data(root="s3://AKEY:HID DEN@bucket/images"))
    assert "cannot be read" in str(caught.value)
    assert "HID" not in str(caught.value)
