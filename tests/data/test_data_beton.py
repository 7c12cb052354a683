import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from fake_sources import encode, noise, smooth

from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.errors import UserError

PAGE = 2**21


def write(path: Path, images: list[np.ndarray], page_bytes: int = PAGE) -> None:
    with BetonWriter(path, len(images), page_bytes) as writer:
        for label, image in enumerate(images):
            writer.append_raw(image, label)


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    write(tmp_path / "some.beton", [noise(20, 30, seed) for seed in range(5)])
    return tmp_path / "some.beton"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    images = [noise(h, w, seed=h) for h, w in ((1, 1), (7, 300), (128, 64))]
    jpeg = encode(smooth(90, 120), "JPEG")
    with BetonWriter(path, 4) as writer:
        for label, image in zip((3, -1, 2**40), images, strict=True):
            writer.append_raw(image, label)
        writer.append_jpeg(jpeg, 90, 120, 7)
        assert not path.exists()
    beton = Beton(path)
    assert len(beton) == 4
    assert beton.labels.tolist() == [3, -1, 2**40, 7]
    assert beton.heights.tolist() == [1, 7, 128, 90]
    assert beton.widths.tolist() == [1, 300, 64, 120]
    assert beton.is_jpeg.tolist() == [False, False, False, True]
    for index, image in enumerate(images):
        np.testing.assert_array_equal(beton.pixels(index), image)
    assert beton.encoded(3).tobytes() == jpeg
    assert np.abs(beton.pixels(3).astype(int) - smooth(90, 120)).mean() < 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.beton"]
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_file_has_the_layout_of_the_docstring(beton: Path) -> None:
    content = beton.read_bytes()

    def number(offset: int, size: int) -> int:
        return int.from_bytes(content[offset : offset + size], "little")

    assert [number(0, 2), number(2, 2), number(4, 4), number(8, 8)] == [2, 2, PAGE, 5]
    assert (content[24], content[25:31]) == (2, b"image\0")
    assert (content[24 + 1041], content[24 + 1042 : 24 + 1048]) == (1, b"label\0")
    third = 24 + 2 * 1041 + 2 * 24
    assert [number(third, 1), number(third + 1, 2), number(third + 3, 2), number(third + 16, 8)] == [1, 30, 20, 2]
    offset = number(third + 5, 8)
    assert offset == PAGE + 2 * 1800
    assert content[offset : offset + 1800] == noise(20, 30, 2).tobytes()
    table = number(16, 8)
    assert len(content) == table + 5 * 24
    assert [number(table + 48, 8), number(table + 56, 8), number(table + 64, 8)] == [2, offset, 1800]


@pytest.mark.parametrize("shapes", [[(600, 500)] * 12, [(10, 10), (1500, 1000), (10, 10), (2500, 1500), (900, 900)]])
def test_no_sample_crosses_a_page_and_pages_grow_with_samples(tmp_path: Path, shapes: list[tuple[int, int]]) -> None:
    path = tmp_path / "a.beton"
    images = [noise(*shape, seed=n) for n, shape in enumerate(shapes)]
    write(path, images)
    page = int(np.fromfile(path, "<u4", 1, offset=4)[0])
    table = np.fromfile(path, "<u8", offset=int(np.fromfile(path, "<u8", 1, offset=16)[0])).reshape(-1, 3)
    first, last = table[:, 1], table[:, 1] + table[:, 2] - 1
    np.testing.assert_array_equal(first // page, last // page)
    assert np.all(first[1:] > last[:-1])
    assert page >= max(image.nbytes for image in images)
    beton = Beton(path)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(beton.pixels(index), image)


def test_fewer_samples_than_there_was_room_for_are_a_whole_file(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a", 5) as writer:
        for seed in range(2):
            writer.append_raw(noise(20, 30, seed), seed)
    beton = Beton(tmp_path / "a")
    assert beton.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(beton.pixels(1), noise(20, 30, 1))


def test_no_sample_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sample came, 2 were declared"), BetonWriter(tmp_path / "a", 2):
        pass
    assert not list(tmp_path.iterdir())


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    shapes = {"a": [(20, 30), (40, 10)], "b": [(5, 5)], "c": [(64, 64), (1000, 2000), (8, 9)]}
    for name, sizes in shapes.items():
        with BetonWriter(tmp_path / name, len(sizes)) as writer:
            for place, (height, width) in enumerate(sizes):
                writer.append_raw(noise(height, width, height), 10 * ord(name) + place)
    joined = Beton(*(tmp_path / name for name in shapes))
    flat = [(name, place, shape) for name, sizes in shapes.items() for place, shape in enumerate(sizes)]
    assert len(joined) == len(flat) == 6
    for index, (name, place, (height, width)) in enumerate(flat):
        assert joined.labels[index] == 10 * ord(name) + place
        np.testing.assert_array_equal(joined.pixels(index), noise(height, width, height))
        assert joined.named(index) == f"{tmp_path / name}: sample {place}"
        path, offset, size = joined.page(int(joined.pages[index]))
        assert path == tmp_path / name
        assert joined.encoded(index).tobytes() in path.read_bytes()[offset : offset + size]
    assert len(set(joined.pages.tolist())) == 3  # a file each; the large image has grown the pages of its file
    copy = pickle.loads(pickle.dumps(joined))
    np.testing.assert_array_equal(copy.pixels(4), joined.pixels(4))


def test_an_error_between_samples_leaves_no_file(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with BetonWriter(tmp_path / "a", 1) as writer:
            writer.append_raw(noise(2, 2), 0)
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    assert not list(tmp_path.iterdir())


def test_more_samples_than_declared_are_refused(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a", 1) as writer:
        writer.append_raw(noise(2, 2), 0)
        with pytest.raises(UserError, match="more than the 1 declared"):
            writer.append_raw(noise(2, 2), 1)
    assert Beton(tmp_path / "a").labels.tolist() == [0]


def test_sides_beyond_the_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="70000 px"), BetonWriter(tmp_path / "a", 1) as writer:
        writer.append_raw(noise(1, 70000), 0)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda c: c[:-1], "truncated"),
        (lambda c: c[: len(c) // 2], "truncated"),
        (lambda c: c[:100], "not a beton file, or is truncated"),
        (lambda c: b"", "not a beton file"),
        (lambda c: b"\x89PNG" + c[4:], "not a beton file of version 2"),
        (lambda c: c[:24] + b"\x04" + c[25:], "two fields"),
        (lambda c: c.replace(b"label", b"bagel"), "two fields"),
        (lambda c: c[:-8] + (1799).to_bytes(8, "little"), "raw images do not have their size"),
        (lambda c: c[:-16] + (1).to_bytes(8, "little") + c[-8:], "tables do not agree"),
        (lambda c: c[:16] + bytes(8) + c[24:], "truncated"),
    ],
)
def test_a_damaged_file_is_refused_by_name(beton: Path, damage, complaint: str) -> None:  # type: ignore[no-untyped-def]
    beton.write_bytes(damage(beton.read_bytes()))
    with pytest.raises(UserError, match=rf"some\.beton .*{complaint}"):
        Beton(beton)


def test_a_jpeg_that_ends_outside_its_pages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    with BetonWriter(path, 1) as writer:
        writer.append_jpeg(encode(smooth(90, 120), "JPEG"), 90, 120, 0)
    path.write_bytes(path.read_bytes()[:-8] + (2**40).to_bytes(8, "little"))
    with pytest.raises(UserError, match="tables do not agree"):
        Beton(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.beton does not exist"):
        Beton(tmp_path / "none.beton")


def test_another_process_gets_the_path_and_not_the_bytes(beton: Path) -> None:
    pickled = pickle.dumps(Beton(beton))
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).pixels(4), noise(20, 30, 4))


# --- FFCV itself


def ffcv_write(path: Path, images: list[np.ndarray], workers: int, **field: object) -> None:
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(**field), "label": IntField()}
    writer = DatasetWriter(str(path), fields, page_size=PAGE, num_workers=workers)
    writer.from_indexed_dataset([(image, label) for label, image in enumerate(images)], chunksize=3)


@pytest.mark.slow  # imports FFCV and starts its processes
def test_the_file_equals_ffcvs_own_byte_for_byte(tmp_path: Path) -> None:
    images = [noise(600 + n, 500, seed=n) for n in range(9)]
    ffcv_write(tmp_path / "theirs", images, workers=1)
    write(tmp_path / "ours", images)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_ffcvs_files_are_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "theirs"
    images = [smooth(700 + 10 * n, 600) for n in range(12)]
    ffcv_write(path, images, workers=2, write_mode=mode)
    beton = Beton(path)
    assert beton.labels.tolist() == list(range(12))
    assert beton.is_jpeg.tolist() == [mode == "jpg"] * 12
    for index, image in enumerate(images):
        np.testing.assert_allclose(beton.pixels(index).astype(int), image, atol=0 if mode == "raw" else 12)


def ffcv_decode(path: Path, index: int) -> np.ndarray:
    """Decode a sample with FFCV's reader, memory manager and JPEG decoder, without its loader's compilation."""
    pytest.importorskip("ffcv")
    from ffcv.libffcv import imdecode
    from ffcv.memory_managers.os_cache import OSCacheManager
    from ffcv.reader import Reader

    reader = Reader(str(path))
    image = reader.metadata["f0"][index]
    manager = OSCacheManager(reader)
    size = manager.ptr_to_size[image["data_ptr"]]
    content = np.fromfile(path, np.uint8, int(size), offset=int(image["data_ptr"]))
    height, width = int(image["height"]), int(image["width"])
    if image["mode"] == 1:
        return content.reshape(height, width, 3)
    pixels = np.zeros((height, width, 3), np.uint8)
    assert imdecode(content, pixels, height, width, height, width) == 0
    return pixels


def test_ffcv_decodes_every_stored_kind_to_nearly_the_same_pixels(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(smooth(101, 143))
    jpegs = {
        "4:2:0": encode(picture, "JPEG", subsampling="4:2:0"),
        "4:2:2": encode(picture, "JPEG", subsampling="4:2:2"),
        "4:4:4": encode(picture, "JPEG", subsampling="4:4:4"),
        "progressive": encode(picture, "JPEG", progressive=True),
        "RGB without YCbCr": encode(picture, "JPEG", keep_rgb=True),
        "grey": encode(picture.convert("L"), "JPEG"),
    }
    path = tmp_path / "ours"
    with BetonWriter(path, len(jpegs) + 1) as writer:
        for jpeg in jpegs.values():
            writer.append_jpeg(jpeg, 101, 143, 0)
        writer.append_raw(noise(10, 20), 1)
    beton = Beton(path)
    for index, kind in enumerate(jpegs):  # FFCV asks libjpeg-turbo for its fast, less exact inverse DCT
        difference = ffcv_decode(path, index).astype(int) - beton.pixels(index)
        assert np.abs(difference).max() <= 4, kind
        assert np.abs(difference).mean() <= 1, kind
    np.testing.assert_array_equal(ffcv_decode(path, len(jpegs)), beton.pixels(len(jpegs)))


@pytest.mark.slow  # FFCV compiles its pipeline
def test_ffcvs_loader_reads_the_file(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    images = [noise(400, 500, seed=n) for n in range(7)]
    jpeg = encode(smooth(400, 500), "JPEG")
    path = tmp_path / "ours"
    with BetonWriter(path, 8, PAGE) as writer:
        for label, image in enumerate(images):
            writer.append_raw(image, label)
        writer.append_jpeg(jpeg, 400, 500, 7)
    pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    for os_cache in (True, False):  # False: FFCV reads page by page
        order = OrderOption.SEQUENTIAL
        loader = Loader(str(path), 3, 1, os_cache, order, drop_last=False, pipelines=pipelines)
        batches = [(image.numpy().copy(), label.numpy().copy()) for image, label in loader]
        pixels = np.concatenate([image for image, _ in batches])
        np.testing.assert_array_equal(np.concatenate([label for _, label in batches])[:, 0], range(8))
        np.testing.assert_array_equal(pixels[:7], images)
        np.testing.assert_allclose(pixels[7].astype(int), Beton(path).pixels(7), atol=4)
