import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_sources import data, encode, noise, smooth, write_folder, write_shard
from PIL import Image, ImageOps
from realdata import CIFAR100, CLOTHING, needs_cifar100, needs_clothing

from bdkd_dist.config import Data
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.converting import BrokenImage, Rules, Task, convert_all
from bdkd_dist.data.dataset import load_dataset
from bdkd_dist.data.prepare import in_this_process, prepare, prepare_into
from bdkd_dist.data.prepared import Prepared, verify
from bdkd_dist.data.sources import Piece, Sample, find_source, open_source
from bdkd_dist.errors import UserError

SMALL = {"train": {"a": 3, "b": 4}, "test": {"a": 1, "b": 2}}


@pytest.fixture
def folder(tmp_path: Path) -> Data:
    write_folder(tmp_path / "pictures", SMALL)
    return data(root=str(tmp_path / "pictures"), prepared=str(tmp_path / "cache"))


# --- a data set


def test_files_and_manifest(folder: Data) -> None:
    calls: list[tuple[str, int, int]] = []
    prepared = prepare(folder, lambda *call: calls.append(call))
    names = ["manifest.json", "test-00000.beton", "train-00000.beton"]
    assert sorted(p.name for p in prepared.folder.iterdir()) == names
    assert prepared.folder.name == f"pictures-{prepared.fingerprint[:12]}"
    assert sorted(calls) == [("test", 3, 3), ("train", 7, 7)]
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["class_names"] == ["a", "b"]
    assert (manifest["left_out"], manifest["check"]) == ({}, "full")
    (train,) = manifest["splits"]["train"]
    assert (train["file"], train["samples"]) == ("train-00000.beton", 7)
    assert train["bytes"] == prepared.paths("train")[0].stat().st_size
    verify(prepared)


def test_images_and_labels_are_those_of_the_source_in_its_order(folder: Data) -> None:
    beton = Beton(*prepare(folder).paths("train"))
    origins = [sample.origin for sample in open_source(folder).splits["train"].iterate()]
    assert sorted(origins) == [f"train/{c}/{n}.png" for c, count in SMALL["train"].items() for n in range(count)]
    for index, origin in enumerate(origins):
        _, name, file = origin.split("/")
        assert beton.labels[index] == "ab".index(name)
        np.testing.assert_array_equal(beton.pixels(index), noise(16, 16, int(file.removesuffix(".png"))))


def stamps(prepared: Prepared) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in prepared.folder.iterdir()}


def test_a_prepared_set_is_reused(folder: Data) -> None:
    first = prepare(folder)
    before = stamps(first)
    assert prepare(folder) == first
    assert stamps(first) == before


def test_an_edited_source_is_prepared_anew(folder: Data) -> None:
    first = prepare(folder)
    (Path(str(folder.root)) / "train" / "a" / "1.png").write_bytes(encode(noise(16, 16, seed=99)))
    second = prepare(folder)
    assert second.folder != first.folder
    pixels = [image.tobytes() for image in map(Beton(*second.paths("train")).pixels, range(7))]
    assert pixels.count(noise(16, 16, seed=99).tobytes()) == 1
    assert second.splits["test"] == first.splits["test"]
    assert second.content != first.content


def test_the_content_is_the_same_wherever_it_is_prepared(folder: Data) -> None:
    first = prepare(folder)
    some = Path(str(folder.root)) / "test" / "a" / "0.png"
    os.utime(some, ns=(0, 0))
    second = prepare(folder)
    assert second.fingerprint != first.fingerprint
    assert second.content == first.content


def test_settings_of_the_storage_make_other_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "large", {"train": {"a": 1, "b": 1}, "test": {"a": 1}}, side_px=100)
    settings = {"root": str(tmp_path / "large"), "prepared": str(tmp_path / "cache")}
    whole, shrunk = (prepare(data(max_side_px=px, **settings)) for px in (512, 80))
    assert Beton(*whole.paths("train")).widths.tolist() == [100, 100]
    assert Beton(*shrunk.paths("train")).widths.tolist() == [80, 80]


@pytest.mark.parametrize(
    "content",
    [b"no image", encode(noise(20, 20))[:600], encode(smooth(300, 300), "JPEG")[:2000], b""],
    ids=["text", "truncated PNG", "truncated JPEG", "empty"],
)
def test_an_image_that_cannot_be_decoded_is_named(folder: Data, content: bytes) -> None:
    (Path(str(folder.root)) / "train" / "b" / "2.png").write_bytes(content)
    origins = [sample.origin for sample in open_source(folder).splits["train"].iterate()]
    position = origins.index("train/b/2.png")
    where = rf"train image {position} \(train/b/2\.png, piece train files 0 to 6\)"
    with pytest.raises(UserError, match=rf"{where} cannot be decoded: ."):
        prepare(folder)
    assert not [path for path in Path(folder.prepared).iterdir() if path.is_dir()]


def test_an_undecodable_row_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", [encode(noise(8, 8))] * 40 + [b"?"], [0, 1] * 20 + [0])
    write_shard(tmp_path / "test.parquet", [encode(noise(8, 8))], [0])
    with pytest.raises(UserError, match=r"train image 40 \(train\.parquet row 40\) cannot be decoded"):
        prepare(data(root=str(tmp_path), prepared=str(tmp_path / "cache")))


def test_a_full_disk_is_seen_before_writing(folder: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 7000})())
    with pytest.raises(UserError, match=r"data\.prepared=.*: needs 0\.0 GB, 0\.0 GB free"):  # 10 images of 768 bytes
        prepare(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 9000})())
    prepare(folder)


def test_a_cache_that_cannot_be_made_is_named(folder: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.prepared=.*/file/cache: "):
        prepare(folder.model_copy(update={"prepared": str(tmp_path / "file" / "cache")}))


# --- damage


def change_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is truncated or grown"),
        (change_a_byte, "was altered"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_file_is_refused_by_name(folder: Data, split: str, damage, complaint: str) -> None:  # type: ignore[no-untyped-def]
    prepared = prepare(folder)
    damage(prepared.paths(split)[0])
    with pytest.raises(UserError, match=rf"{split}-00000\.beton {complaint}.*; delete the folder {prepared.folder}"):
        verify(prepared)


@pytest.mark.parametrize("text", ["", "[]", '{"splits": 3}', '{"splits": {}}'])
def test_a_damaged_manifest_is_refused_by_name(folder: Data, text: str) -> None:
    manifest = prepare(folder).folder / "manifest.json"
    manifest.write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read; delete the folder"):
        prepare(folder)


def test_a_folder_without_a_manifest_is_made_anew(folder: Data) -> None:
    first = prepare(folder)
    (first.folder / "manifest.json").unlink()
    os.truncate(first.paths("train")[0], 5)
    verify(prepare(folder))


@pytest.mark.parametrize("manifest", ['{"files": []}', "no JSON", "[]"])
def test_a_source_may_hold_a_manifest_of_its_own(folder: Data, manifest: str) -> None:
    (Path(str(folder.root)) / "manifest.json").write_text(manifest)
    assert len(load_dataset(folder).test) == 3


def test_files_of_others_in_the_building_folder_stay(folder: Data, tmp_path: Path) -> None:
    source, out = find_source(folder), tmp_path / "house"
    (tmp_path / "house.building").mkdir()
    (tmp_path / "house.building" / "plan.txt").write_text("mine")
    with pytest.raises(UserError, match=r"house\.building holds other files \(plan\.txt\)"):
        prepare_into(source, out, Rules(), in_this_process(folder))
    assert (tmp_path / "house.building" / "plan.txt").read_text() == "mine"


def test_a_set_with_images_left_out_is_not_one_without(folder: Data, tmp_path: Path) -> None:
    (Path(str(folder.root)) / "train" / "b" / "2.png").write_bytes(b"no image")
    source, out = find_source(folder), tmp_path / "out"
    made = prepare_into(source, out, Rules(undecodable="leave-out"), in_this_process(folder))
    assert made.left_out == {"train": 1}
    assert prepare_into(source, out, Rules(undecodable="leave-out"), in_this_process(folder)) == made
    with pytest.raises(UserError, match=r"was prepared without the images that could not be decoded"):
        prepare_into(source, out, Rules(), in_this_process(folder))


def test_a_broken_image_ends_the_pieces_that_have_not_begun(tmp_path: Path) -> None:
    count, read = 40, []

    def iterate(number: int) -> Iterator[Sample]:
        for position in range(64):
            read.append(number)
            yield Sample(b"no image" if number == 0 else encode(noise(8, 8, position)), 0, f"{number}/{position}")

    labels = np.zeros(64, np.int64)
    pieces = [Piece(f"piece {n}", labels, partial(iterate, n), 64 * 200) for n in range(count)]
    tasks = [
        Task("train", 64 * n, piece, tmp_path / f"train-{n:05d}.beton", "f", Rules()) for n, piece in enumerate(pieces)
    ]
    with pytest.raises(BrokenImage, match=r"train image 0 .*no image of a known format"):
        convert_all(tasks, 2, lambda split, images: None)
    assert len(set(read)) < count / 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- several processes

CHILD = textwrap.dedent("""
    import sys, time
    from bdkd_dist.config import Data
    from bdkd_dist.data.prepare import prepare
    from bdkd_dist.data.prepared import verify

    def tell(split, done, total):
        print(split, done, total, flush=True)
        time.sleep(float(sys.argv[3]))

    data = Data(dataset="files", num_classes=2, image_px=32, root=sys.argv[1], prepared=sys.argv[2])
    verify(prepare(data, tell))
    print("ready", flush=True)
""")


def start(folder: Data, pause_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder.root), folder.prepared, str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow  # two more interpreters
def test_of_two_processes_one_prepares_and_the_other_waits(folder: Data) -> None:
    children = [start(folder, pause_s=1.0) for _ in range(2)]
    lines = [child.communicate(timeout=120)[0].split("\n")[:-1] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(sorted(these) for these in lines) == [["ready"], ["ready", "test 3 3", "train 7 7"]]
    verify(prepare(folder))


# --- real images


@needs_cifar100
def test_cifar100_is_stored_bit_for_bit(tmp_path: Path) -> None:
    table = pq.ParquetFile(CIFAR100 / "test-00000-of-00001.parquet").read_row_group(0)
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    settings = data(dataset="cifar100", num_classes=100, root=str(tmp_path), prepared=str(tmp_path / "cache"))
    beton = Beton(*prepare(settings).paths("test"))
    rows = table.to_pylist()
    assert beton.labels.tolist() == [row["label"] for row in rows]
    assert not beton.is_jpeg.any()
    for index, row in enumerate(rows):
        picture = Image.open(io.BytesIO(row["img"]["bytes"]))
        np.testing.assert_array_equal(beton.pixels(index), np.asarray(picture))


@needs_clothing
def test_photographs_keep_their_bytes(tmp_path: Path) -> None:
    table = pq.read_table(CLOTHING / "test-00000-of-00001.parquet")
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    settings = data(num_classes=10, root=str(tmp_path), prepared=str(tmp_path / "cache"), max_side_px=1024)
    beton = Beton(*prepare(settings).paths("test"))
    rows = table.to_pylist()
    passed = 0
    for index, row in enumerate(rows):
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        upright = ImageOps.exif_transpose(picture)
        assert (beton.widths[index], beton.heights[index]) == upright.size
        passed += beton.encoded(index).tobytes() == row["image"]["bytes"]
    assert passed == sum(Image.open(io.BytesIO(r["image"]["bytes"])).getexif().get(0x0112, 1) == 1 for r in rows)
    assert passed > 300
