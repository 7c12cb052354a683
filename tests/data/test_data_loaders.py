import importlib.util
import io
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from realdata import CLOTHING, needs_clothing

from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.data.kernels import decode_and_render
from bdkd_dist.data.loader import Batch, DataError, Loader, open_loader
from bdkd_dist.errors import UserError

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
every_loader = pytest.mark.parametrize("kind", ["torch", pytest.param("ffcv", marks=needs_ffcv)])
COUNT = 60


def make(crop: Any, image_px: int, **changes: Any) -> Transform:
    fields = {
        "pad_px": 4,
        "min_area": 0.08,
        "max_aspect": 4 / 3,
        "flip": True,
        "eval_crop": 1.0,
        "seed": 3,
    }
    return Transform(image_px=image_px, crop=crop, **(fields | changes))


def picture(index: int) -> np.ndarray:
    """A smooth image, as photographs are, of a size of its own."""
    generator = np.random.default_rng(index)
    height, width = generator.integers(90, 160, 2)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jpegs") / "jpegs.beton"
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            pixels = picture(index)
            writer.append_jpeg(jpeg(pixels), *pixels.shape[:2], label=index % 7)
    return path


@pytest.fixture(scope="module")
def raws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32×32 images without loss."""
    path = tmp_path_factory.mktemp("raws") / "raws.beton"
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            writer.append_raw(pixels, label=index % 7)
    return path


@pytest.fixture(scope="module")
def large_raws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without loss, of several sizes."""
    path = tmp_path_factory.mktemp("large") / "raws.beton"
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            writer.append_raw(picture(index), label=index % 7)
    return path


def order(batch_size: int = 16, count: int = COUNT) -> list[np.ndarray]:
    shuffled = np.random.default_rng(1).permutation(count)
    return [shuffled[start : start + batch_size] for start in range(0, count, batch_size)]


def read(kind: Any, path: Path, transform: Transform, epoch: int = 0, threads: int = 1, **options: Any) -> list[Batch]:
    loader = open_loader(kind, path, transform, threads)
    try:
        return list(loader.batches(epoch, order(**options)))
    finally:
        loader.close()


def images(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def assert_equal(got: list[Batch], want: list[Batch]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        for name in Batch._fields:
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@every_loader
def test_batches_are_those_asked_for(kind: str, jpegs: Path) -> None:
    batches = read(kind, jpegs, make("resized", 48))
    assert [batch.indices.tolist() for batch in batches] == [indices.tolist() for indices in order()]
    for batch in batches:
        assert batch.images.shape == (len(batch.indices), 48, 48, 3)
        assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert batch.images.is_contiguous()
        assert batch.labels.tolist() == [index % 7 for index in batch.indices.tolist()]


@every_loader
def test_padded_crops_are_exact(kind: str, raws: Path) -> None:
    transform, beton = make("pad", 32), Beton(raws)
    shifts = set()
    for batch in read(kind, raws, transform, epoch=2):
        placements = transform.placements(
            2, batch.indices.numpy(), np.full(len(batch.indices), 32), np.full(len(batch.indices), 32)
        )
        for index, placed, got in zip(batch.indices.tolist(), placements.tolist(), batch.images.numpy(), strict=True):
            *_, down, right, mirror = placed
            padded = np.pad(beton.pixels(index), ((4, 4), (4, 4), (0, 0)))
            want = padded[4 + down : 36 + down, 4 + right : 36 + right]
            assert np.array_equal(got, want[:, ::-1] if mirror else want)
            shifts.add((down, right, mirror))
    assert len(shifts) > 20


@every_loader
def test_images_of_the_right_size_come_as_they_are(kind: str, raws: Path) -> None:
    beton = Beton(raws)
    for batch in read(kind, raws, make("none", 32, flip=False)):
        for index, got in zip(batch.indices.tolist(), batch.images.numpy(), strict=True):
            assert np.array_equal(got, beton.pixels(index))


@needs_ffcv
@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_loaders_agree_bit_for_bit_without_loss(crop: str, raws: Path, large_raws: Path) -> None:
    # Equal pixels of lossless images mean equal boxes and flips.
    for path in (raws, large_raws):
        transform = make(crop, 32, eval_crop=0.875)
        assert_equal(read("ffcv", path, transform, epoch=4), read("torch", path, transform, epoch=4))


@needs_ffcv
@pytest.mark.parametrize("crop", ["none", "resized"])
def test_loaders_agree_on_jpegs_but_for_the_decoders_rounding(crop: str, jpegs: Path) -> None:
    transform = make(crop, 64, eval_crop=0.875)
    assert_close(read("ffcv", jpegs, transform), read("torch", jpegs, transform))


@needs_ffcv
@needs_clothing
@pytest.mark.parametrize("crop", ["none", "resized"])
def test_loaders_agree_on_photographs(crop: str, clothing: Path) -> None:
    transform = make(crop, 224, eval_crop=0.875)
    options: dict[str, Any] = {"batch_size": 32, "count": 128}
    assert_close(read("ffcv", clothing, transform, **options), read("torch", clothing, transform, **options))


def assert_close(one: list[Batch], other: list[Batch]) -> None:
    """FFCV decodes with libjpeg-turbo's fast transform, Pillow with its exact one.

    Measured on photographs: 0.98 levels on average, 3 at the 99.9th percentile, 4 at most.
    """
    difference = (images(one).int() - images(other).int()).abs().numpy()
    assert difference.mean() < 1.1
    assert np.quantile(difference, 0.999) <= 4
    assert difference.max() <= 8


@pytest.fixture(scope="module")
def clothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clothing") / "clothing.beton"
    rows = pq.read_table(next(CLOTHING.glob("validation-*.parquet"))).slice(0, 128).to_pylist()
    with BetonWriter(path, len(rows)) as writer:
        for row in rows:
            content = row["image"]["bytes"]
            with Image.open(io.BytesIO(content)) as image:
                writer.append_jpeg(content, image.height, image.width, row["label"])
    return path


@needs_ffcv
def test_threads_do_not_change_ffcvs_batches(jpegs: Path) -> None:
    transform = make("resized", 48)
    one = read("ffcv", jpegs, transform)
    for threads in (2, 4):
        assert_equal(read("ffcv", jpegs, transform, threads=threads), one)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_processes_do_not_change_torchs_batches(jpegs: Path) -> None:
    transform = make("resized", 48)
    one = read("torch", jpegs, transform)
    for threads in (2, 4):
        assert_equal(read("torch", jpegs, transform, threads=threads), one)


@every_loader
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_goes_through_epochs_resumes_and_can_be_left_midway(kind: Any, threads: int, jpegs: Path) -> None:
    loader = open_loader(kind, jpegs, make("resized", 48), threads)
    first = list(loader.batches(0, order()))
    second = list(loader.batches(1, order()))
    assert not torch.equal(images(first), images(second))
    assert_equal(list(loader.batches(0, order())), first)
    assert_equal(list(loader.batches(1, order()[2:])), second[2:])
    assert list(loader.batches(1, [])) == []
    for _ in range(3):
        left = loader.batches(0, order(batch_size=2))
        next(left)
        left.close()
    assert_equal(list(loader.batches(1, order())), second)
    loader.close()


@every_loader
def test_no_batch_is_written_to_again(kind: Any, jpegs: Path) -> None:
    loader = open_loader(kind, jpegs, make("resized", 48), 1)
    kept, copies = [], []
    for batch in loader.batches(0, order(batch_size=4)):
        kept.append(batch)
        copies.append(Batch(*(part.clone() for part in batch)))
    list(loader.batches(1, order(batch_size=4)))
    assert_equal(kept, copies)
    loader.close()


@every_loader
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_leaving_and_closing_end_threads_and_processes(kind: Any, threads: int, jpegs: Path) -> None:
    before = set(threading.enumerate())
    children = set(multiprocessing.active_children())
    loader = open_loader(kind, jpegs, make("resized", 48), threads)
    left = loader.batches(0, order(batch_size=1))
    next(left)
    left.close()
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "_Epoch"]
    loader.close()
    del left
    wait_until(lambda: set(threading.enumerate()) <= before)
    wait_until(lambda: set(multiprocessing.active_children()) <= children)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def damaged(source: Path, target: Path, index: int, start: int, content: bytes) -> Path:
    """Copy a beton and overwrite bytes inside one of its JPEGs."""
    whole = bytearray(source.read_bytes())
    place = whole.find(Beton(source).encoded(index).tobytes()) + start
    whole[place : place + len(content)] = content
    target.write_bytes(whole)
    return target


NOISE = np.random.default_rng(0).integers(0, 256, 1200, dtype=np.uint8).tobytes()


@every_loader
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("start", "content"), [(0, bytes(64)), (650, NOISE), (20, bytes(1200))], ids=["header", "noise", "zeros"]
)
def test_a_damaged_jpeg_is_named(
    kind: Any, threads: int, start: int, content: bytes, jpegs: Path, tmp_path: Path
) -> None:
    path = damaged(jpegs, tmp_path / "damaged.beton", 17, start, content)
    loader = open_loader(kind, path, make("resized", 48), threads)
    with pytest.raises(DataError, match=r"damaged\.beton: sample 17 cannot be decoded") as caught:
        list(loader.batches(0, order()))
    assert "\n" not in str(caught.value)
    sound = [indices[indices != 17] for indices in order()[:1]]
    assert len(list(loader.batches(0, sound))) == 1
    loader.close()


@needs_ffcv
def test_jpegs_that_only_pillow_reads_are_loaded_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cmyk.beton"
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            pixels = picture(index)
            writer.append_jpeg(jpeg(pixels, "CMYK" if index == 5 else "RGB"), *pixels.shape[:2], label=0)
    transform = make("resized", 48)
    with caplog.at_level(logging.WARNING):
        loader = open_loader("ffcv", path, transform, 1)
        got = [batch for epoch in range(2) for batch in loader.batches(epoch, [np.array([5])])]
        loader.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: sample 5 is a damaged or unusual JPEG; Pillow decoded it"
    ]
    twin = open_loader("torch", path, transform, 1)
    assert_equal(got, [batch for epoch in range(2) for batch in twin.batches(epoch, [np.array([5])])])


def test_a_size_that_is_not_the_declared_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "declared.beton"
    with BetonWriter(path, 1) as writer:
        writer.append_jpeg(jpeg(picture(0)), 40, 30, label=0)
    loader = open_loader("torch", path, make("none", 32), 1)
    with pytest.raises(DataError, match=r"declared\.beton: sample 0 has shape .* was declared"):
        list(loader.batches(0, [np.array([0])]))
    loader.close()


@every_loader
@pytest.mark.timeout(60)
def test_any_exception_in_the_loader_reaches_the_caller(
    kind: Any, jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("boom")

    loader = open_loader(kind, jpegs, make("resized", 48), 1)
    with monkeypatch.context() as patch:
        patch.setattr(Transform, "placements", fail)
        with pytest.raises(DataError, match=r"jpegs\.beton: .*boom"):
            list(loader.batches(0, order()))
    assert len(list(loader.batches(0, order()))) == len(order())
    loader.close()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_killed_process_reaches_the_caller(jpegs: Path) -> None:
    loader = open_loader("torch", jpegs, make("resized", 48), 2)
    reading = loader.batches(0, order(batch_size=2))
    next(reading)
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match=r"jpegs\.beton: loading failed: "):
        list(reading)
    assert len(list(loader.batches(0, order()))) == len(order())
    loader.close()


@every_loader
def test_torchs_thread_count_stays(kind: Any, jpegs: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader: Loader = open_loader(kind, jpegs, make("resized", 48), 1)
        for _ in loader.batches(0, order()):
            assert torch.get_num_threads() == 2
        loader.close()
    finally:
        torch.set_num_threads(before)


@every_loader
def test_reading_draws_from_no_global_generator(kind: Any, jpegs: Path) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    loader = open_loader(kind, jpegs, make("resized", 48), 1)
    for epoch in range(2):
        list(loader.batches(epoch, order()))
    loader.close()
    assert states() == before


@pytest.mark.slow
@needs_ffcv
def test_importing_ffcv_keeps_torchs_thread_count() -> None:
    code = "import torch; torch.set_num_threads(3); import bdkd_dist.data.ffcv_loader; print(torch.get_num_threads())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "3"


@pytest.mark.slow
@needs_ffcv
def test_later_loaders_compile_nothing(jpegs: Path) -> None:
    read("ffcv", jpegs, make("resized", 48))
    compiled = len(decode_and_render.signatures)
    for _ in range(3):
        read("ffcv", jpegs, make("none", 48))
    assert compiled == len(decode_and_render.signatures) > 0


def test_auto_takes_ffcv_where_it_is(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> str:
        return type(open_loader("auto", jpegs, make("none", 48), 1)).__name__

    assert opened() == ("TorchLoader" if importlib.util.find_spec("ffcv") is None else "FFCVLoader")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert opened() == "TorchLoader"


def test_asking_for_an_absent_ffcv_is_a_users_mistake(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bdkd_dist.data.ffcv_loader", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        open_loader("ffcv", jpegs, make("none", 48), 1)
    assert str(caught.value) == (
        "data.loader=ffcv: FFCV is not installed here (run `bdkd doctor`); data.loader=torch reads the same files"
    )


def test_an_ffcv_that_does_not_load_is_told_of(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bdkd_dist.data.ffcv_loader", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert type(open_loader("auto", jpegs, make("none", 48), 1)).__name__ == "TorchLoader"
    assert "FFCV does not load here" in caplog.text
    with pytest.raises(UserError, match=r"data\.loader=ffcv: FFCV does not load here"):
        open_loader("ffcv", jpegs, make("none", 48), 1)
