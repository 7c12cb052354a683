import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_sources import data, encode, noise, smooth, write_folder, write_shard
from PIL import Image, ImageOps
from realdata import CIFAR100, CLOTHING, needs_cifar100, needs_clothing

from bdkd_dist.config import Data
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.prepare import Prepared, Stored, prepare, store, verify
from bdkd_dist.errors import UserError

SMALL = {"train": {"a": 3, "b": 4}, "test": {"a": 1, "b": 2}}
JPEG_NOISE = 6  # mean difference that JPEG at quality 90 leaves in a smooth picture, at most


@pytest.fixture
def folder(tmp_path: Path) -> Data:
    write_folder(tmp_path / "pictures", SMALL)
    return data(root=str(tmp_path / "pictures"), cache=str(tmp_path / "cache"))


def keep(image: bytes | np.ndarray, max_side_px: int = 512) -> Stored:
    return store(image, max_side_px, jpeg_quality=90)


def decoded(stored: Stored) -> np.ndarray:
    if isinstance(stored.content, bytes):
        image = Image.open(io.BytesIO(stored.content))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        pixels = np.asarray(image)
    else:
        pixels = stored.content
    assert pixels.shape == (stored.height, stored.width, 3)
    return pixels.astype(float)


def quantisation_and_sampling(stored: Stored) -> tuple[object, tuple[int, int]]:
    image = Image.open(io.BytesIO(stored.content))  # type: ignore[arg-type]
    return image.quantization, image.layer[0][1:3]  # type: ignore[attr-defined]


# --- how one image is stored


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_small_lossless_images_keep_their_pixels(kind: str) -> None:
    pixels = noise(64, 64) if kind != "GIF" else np.repeat(noise(64, 64)[..., :1] // 16 * 16, 3, axis=-1)
    stored = keep(encode(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert isinstance(stored.content, np.ndarray)
    np.testing.assert_array_equal(stored.content, pixels)


def test_arrays_are_stored_like_lossless_files() -> None:
    np.testing.assert_array_equal(keep(noise(32, 100)).content, noise(32, 100))
    assert isinstance(keep(smooth(65, 64)).content, bytes)


def test_small_jpegs_are_stored_as_pixels() -> None:
    jpeg = encode(smooth(64, 64), "JPEG")
    np.testing.assert_array_equal(keep(jpeg).content, np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 30}, {"subsampling": "4:4:4"}, {"keep_rgb": True}]
)
def test_jpegs_within_the_limit_keep_their_bytes(options: dict[str, object]) -> None:
    jpeg = encode(smooth(200, 512), "JPEG", **options)
    assert keep(jpeg) == Stored(jpeg, 200, 512)


def test_grey_jpegs_keep_their_bytes() -> None:
    jpeg = encode(Image.fromarray(smooth(200, 300)).convert("L"), "JPEG")
    assert keep(jpeg) == Stored(jpeg, 200, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side_px", [48, 120])
def test_images_turned_by_their_exif_are_stored_upright(orientation: int, side_px: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = encode(smooth(side_px, side_px - 8), "JPEG", quality=95, exif=exif)
    stored = keep(jpeg)
    turn = [  # what each value means, by the EXIF standard: where row 0 and column 0 of the file lie
        lambda x: x,
        lambda x: x[:, ::-1],
        lambda x: x[::-1, ::-1],
        lambda x: x[::-1],
        lambda x: x.transpose(1, 0, 2),
        lambda x: np.rot90(x, -1),
        lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        lambda x: np.rot90(x, 1),
    ][orientation - 1]
    upright = turn(smooth(side_px, side_px - 8)).astype(float)
    assert np.abs(decoded(stored) - upright).mean() < JPEG_NOISE
    passed = isinstance(stored.content, bytes) and stored.content == jpeg
    assert passed == (orientation == 1 and side_px > 64)


def test_cmyk_jpegs_become_rgb() -> None:
    cmyk = encode(Image.fromarray(smooth(100, 120)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decoded(keep(cmyk)) - smooth(100, 120)).mean() < JPEG_NOISE


def test_large_jpegs_shrink_to_the_limit() -> None:
    stored = keep(encode(smooth(900, 1200), "JPEG"), max_side_px=300)
    assert (stored.height, stored.width) == (225, 300)
    assert np.abs(decoded(stored) - smooth(225, 300)).mean() < JPEG_NOISE
    assert keep(encode(smooth(3000, 40), "JPEG"), max_side_px=300)[1:] == (300, 4)
    assert isinstance(keep(encode(smooth(900, 1200), "JPEG"), max_side_px=64).content, np.ndarray)


def test_lossless_photographs_become_jpegs_with_whole_chroma() -> None:
    quality_90 = Image.open(io.BytesIO(encode(smooth(80, 100), "JPEG", quality=90)))
    stored = keep(encode(smooth(80, 100), "PNG"))
    assert np.abs(decoded(stored) - smooth(80, 100)).mean() < JPEG_NOISE
    assert quantisation_and_sampling(stored) == (quality_90.quantization, (1, 1))
    assert quantisation_and_sampling(keep(encode(smooth(80, 600), "JPEG")))[1] == (2, 2)


def test_transparency_is_dropped() -> None:
    alpha = np.dstack([noise(20, 20), np.arange(400, dtype=np.uint16).reshape(20, 20).astype(np.uint8)])
    np.testing.assert_array_equal(keep(encode(alpha)).content, noise(20, 20))
    grey_alpha = np.dstack([noise(20, 20)[..., 0], np.zeros((20, 20), np.uint8)])
    np.testing.assert_array_equal(keep(encode(grey_alpha)).content, np.repeat(noise(20, 20)[..., :1], 3, axis=-1))


@pytest.mark.filterwarnings("error")
def test_palette_images_show_their_colours() -> None:
    palette = noise(1, 16).reshape(-1)
    picture = Image.fromarray(noise(20, 20)[..., 0] % 16).convert("P")
    picture.putdata((noise(20, 20)[..., 0] % 16).reshape(-1).tolist())
    picture.putpalette(palette.tolist())
    expected = palette.reshape(16, 3)[noise(20, 20)[..., 0] % 16]
    np.testing.assert_array_equal(keep(encode(picture)).content, expected)
    np.testing.assert_array_equal(keep(encode(picture, transparency=bytes(range(16)))).content, expected)


def test_16_bit_images_keep_their_upper_8_bits() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (20, 20), dtype=np.uint16)
    expected = np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(keep(encode(Image.fromarray(values))).content, expected)
    np.testing.assert_array_equal(keep(encode(Image.fromarray(values), "TIFF")).content, expected)


def test_black_and_white_images_become_rgb() -> None:
    bits = noise(20, 20)[..., 0] > 127
    expected = np.repeat(np.where(bits, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(keep(encode(Image.fromarray(bits))).content, expected)


# --- a data set


def test_files_and_manifest(folder: Data) -> None:
    calls: list[tuple[str, int, int]] = []
    prepared = prepare(folder, lambda *call: calls.append(call))
    assert sorted(p.name for p in prepared.folder.iterdir()) == ["manifest.json", "test.beton", "train.beton"]
    assert prepared.folder.name == f"pictures-{prepared.fingerprint[:12]}"
    assert calls == [("test", 3, 3), ("train", 7, 7)]
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["class_names"] == ["a", "b"]
    assert manifest["splits"]["train"]["samples"] == 7
    assert manifest["splits"]["train"]["bytes"] == prepared.path("train").stat().st_size
    assert sorted(manifest) == ["class_names", "created", "fingerprint", "format", "splits"]
    beton = Beton(prepared.path("train"))
    assert beton.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    for index, seed in enumerate((0, 1, 2, 0, 1, 2, 3)):
        np.testing.assert_array_equal(beton.pixels(index), noise(16, 16, seed))
    verify(prepared)


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
    np.testing.assert_array_equal(Beton(second.path("train")).pixels(1), noise(16, 16, seed=99))
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
    settings = {"root": str(tmp_path / "large"), "cache": str(tmp_path / "cache")}
    whole, shrunk = (prepare(data(max_side_px=px, **settings)) for px in (512, 80))
    assert Beton(whole.path("train")).widths.tolist() == [100, 100]
    assert Beton(shrunk.path("train")).widths.tolist() == [80, 80]


@pytest.mark.parametrize(
    "content",
    [b"no image", encode(noise(20, 20))[:600], encode(smooth(300, 300), "JPEG")[:2000], b""],
    ids=["text", "truncated PNG", "truncated JPEG", "empty"],
)
def test_an_image_that_cannot_be_decoded_is_named(folder: Data, content: bytes) -> None:
    (Path(str(folder.root)) / "train" / "b" / "2.png").write_bytes(content)
    with pytest.raises(UserError, match=r"train image 5 \(train/b/2\.png\) cannot be decoded"):
        prepare(folder)
    assert not [path for path in Path(folder.cache).iterdir() if path.is_dir()]


def test_an_undecodable_row_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", [encode(noise(8, 8))] * 40 + [b"?"], [0, 1] * 20 + [0])
    write_shard(tmp_path / "test.parquet", [encode(noise(8, 8))], [0])
    with pytest.raises(UserError, match=r"train image 40 \(train\.parquet row 40\) cannot be decoded"):
        prepare(data(root=str(tmp_path), cache=str(tmp_path / "cache")))


def test_a_full_disk_is_seen_before_writing(folder: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 7000})())
    with pytest.raises(UserError, match=r"data\.cache=.*: needs 0\.0 GB, 0\.0 GB free"):  # 10 images of 768 bytes
        prepare(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 9000})())
    prepare(folder)


def test_a_cache_that_cannot_be_made_is_named(folder: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache=.*/file/cache: "):
        prepare(folder.model_copy(update={"cache": str(tmp_path / "file" / "cache")}))


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
    damage(prepared.path(split))
    with pytest.raises(UserError, match=rf"{split}\.beton {complaint}.*; delete the folder {prepared.folder}"):
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
    os.truncate(first.path("train"), 5)
    verify(prepare(folder))


# --- several processes

CHILD = textwrap.dedent("""
    import sys, time
    from bdkd_dist.config import Data
    from bdkd_dist.data.prepare import prepare, verify

    def tell(split, done, total):
        print(split, done, total, flush=True)
        time.sleep(float(sys.argv[3]))

    data = Data(dataset="files", num_classes=2, image_px=32, root=sys.argv[1], cache=sys.argv[2])
    verify(prepare(data, tell))
    print("ready", flush=True)
""")


def start(folder: Data, pause_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder.root), folder.cache, str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow  # two more interpreters
def test_of_two_processes_one_prepares_and_the_other_waits(folder: Data) -> None:
    children = [start(folder, pause_s=1.0) for _ in range(2)]
    lines = [child.communicate(timeout=120)[0].split("\n")[:-1] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(lines) == [["ready"], ["test 3 3", "train 7 7", "ready"]]
    verify(prepare(folder))


@pytest.mark.slow  # another interpreter
def test_a_killed_preparation_leaves_nothing_that_is_used(folder: Data) -> None:
    child = start(folder, pause_s=600)
    assert child.stdout is not None
    assert child.stdout.readline() == "test 3 3\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    cache = Path(folder.cache)
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".building"]
    prepared = prepare(folder)
    verify(prepared)
    assert [path for path in cache.iterdir() if path.is_dir()] == [prepared.folder]


# --- real images


@needs_cifar100
def test_cifar100_is_stored_bit_for_bit(tmp_path: Path) -> None:
    table = pq.ParquetFile(CIFAR100 / "test-00000-of-00001.parquet").read_row_group(0)
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    settings = data(dataset="cifar100", num_classes=100, root=str(tmp_path), cache=str(tmp_path / "cache"))
    beton = Beton(prepare(settings).path("test"))
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
    settings = data(num_classes=10, root=str(tmp_path), cache=str(tmp_path / "cache"), max_side_px=1024)
    beton = Beton(prepare(settings).path("test"))
    rows = table.to_pylist()
    passed = 0
    for index, row in enumerate(rows):
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        upright = ImageOps.exif_transpose(picture)
        assert (beton.widths[index], beton.heights[index]) == upright.size
        passed += beton.encoded(index).tobytes() == row["image"]["bytes"]
    assert passed == sum(Image.open(io.BytesIO(r["image"]["bytes"])).getexif().get(0x0112, 1) == 1 for r in rows)
    assert passed > 300
