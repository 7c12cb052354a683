"""Both loaders give the batches asked for, the same ones, and touch nothing else."""

import io
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from loader_samples import (
    COUNT,
    assert_equal,
    every_loader,
    images,
    make,
    needs_ffcv,
    order,
    picture,
    read,
    write_jpegs,
)
from PIL import Image
from realdata import CLOTHING, needs_clothing

from bdkd_dist.config.sections import Resize
from bdkd_dist.data import jpeg as native
from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.data.kernels import decode_and_render, render
from bdkd_dist.data.loader import Batch, Loader, open_loader


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jpegs(tmp_path_factory.mktemp("jpegs") / "jpegs.beton")


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
@pytest.mark.parametrize("px", [64, 40, 20, 10])  # boxes from less than px to eight times that
@pytest.mark.parametrize("crop", ["none", "resized"])
def test_loaders_agree_on_jpegs(crop: str, px: int, jpegs: Path) -> None:
    transform = make(crop, px, eval_crop=0.875)
    assert_agree(read("ffcv", jpegs, transform), read("torch", jpegs, transform))


@needs_ffcv
@needs_clothing
@pytest.mark.parametrize("px", [224, 100])
@pytest.mark.parametrize("crop", ["none", "resized"])
def test_loaders_agree_on_photographs(crop: str, px: int, clothing: Path) -> None:
    transform = make(crop, px, eval_crop=0.875)
    options: dict[str, Any] = {"batch_size": 32, "count": 128}
    assert_agree(read("ffcv", clothing, transform, **options), read("torch", clothing, transform, **options))


def assert_agree(one: list[Batch], other: list[Batch]) -> None:
    """The native decoder gives Pillow's pixels; FFCV's, where it stands in, those of libjpeg's fast transform.

    Measured on photographs for the latter: 0.98 levels on average, 3 at the 99.9th percentile, 4 at most.
    """
    if native.available():
        assert_equal(one, other)
    difference = (images(one).int() - images(other).int()).abs().numpy()
    assert difference.mean() < 1.1
    assert np.quantile(difference, 0.999) <= 4
    assert difference.max() <= 8


@needs_clothing
@pytest.mark.parametrize(("px", "crop"), [(160, "none"), (100, "resized"), (40, "none")])
def test_reduced_decoding_stays_near_the_full_one(px: int, crop: str, clothing: Path) -> None:
    # Measured: 1.2 to 3.5 levels on average, 18 to 36 at the 99.9th percentile, 0.15 of brightness at most.
    beton, transform = Beton(clothing), make(crop, px, flip=False, eval_crop=0.875)
    (batch,) = read("torch", clothing, transform, batch_size=128, count=128)
    placements = transform.placements(0, (at := batch.indices.numpy()), beton.heights[at], beton.widths[at])
    reduced = placements[:, 2:4].min(axis=1) >= 2 * px
    assert reduced.sum() > 60
    full = np.empty((128, px, px, 3), np.uint8)
    for index, placement, out in zip(at, placements, full, strict=True):
        render(beton.pixels(int(index)), placement, out)
    assert np.array_equal(batch.images.numpy()[~reduced], full[~reduced])
    difference = batch.images.numpy()[reduced].astype(int) - full[reduced]
    assert 0.5 < np.abs(difference).mean() < 4
    assert np.quantile(np.abs(difference), 0.999) <= 40
    assert abs(difference.mean()) < 0.2


@every_loader
def test_files_joined_to_one_are_read_as_one(kind: Any, jpegs: Path, large_raws: Path) -> None:
    transform = make("none", 48, flip=False)
    parts = [images(read(kind, path, transform, batch_size=COUNT)) for path in (jpegs, large_raws)]
    loader = open_loader(kind, Beton(jpegs, large_raws), transform, 1)
    (batch,) = loader.batches(0, [np.concatenate([order(COUNT)[0], COUNT + order(COUNT)[0]])])
    loader.close()
    assert torch.equal(batch.images, torch.cat(parts))


@needs_ffcv
def test_pages_of_this_process_give_the_mapped_files_batches(jpegs: Path, large_raws: Path) -> None:
    transform = make("resized", 48)
    index_batches = order(count=2 * COUNT)
    for threads in (1, 2):
        got: list[list[Batch]] = []
        for cache in ("os", "process"):
            loader = open_loader("ffcv", Beton(jpegs, large_raws), transform, threads, cache)  # type: ignore[arg-type]
            left = loader.batches(0, index_batches)
            next(left)
            left.close()
            got += [list(loader.batches(1, index_batches)) for _ in range(2)]
            loader.close()
        for other in got[1:]:
            assert_equal(other, got[0])


@every_loader
def test_images_grow_with_the_epochs(kind: Any, jpegs: Path) -> None:
    resize = Resize(start_px=32, end_px=64, from_epoch=1, to_epoch=3, multiple_px=16)
    transform, flat = make("resized", 64, resize=resize), {}
    for epoch, px in enumerate((32, 32, 48, 64, 64)):
        got = read(kind, jpegs, transform, epoch=epoch)
        assert_equal(got, read(kind, jpegs, make("resized", px), epoch=epoch))
        flat[epoch] = images(got).shape
    assert flat[2] == (COUNT, 48, 48, 3)


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
    loader = open_loader(kind, Beton(jpegs), make("resized", 48), threads)
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
    loader = open_loader(kind, Beton(jpegs), make("resized", 48), 1)
    kept, copies = [], []
    for batch in loader.batches(0, order(batch_size=4)):
        kept.append(batch)
        copies.append(Batch(*(part.clone() for part in batch)))
    list(loader.batches(1, order(batch_size=4)))
    assert_equal(kept, copies)
    loader.close()


@every_loader
def test_torchs_thread_count_stays(kind: Any, jpegs: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader: Loader = open_loader(kind, Beton(jpegs), make("resized", 48), 1)
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
    loader = open_loader(kind, Beton(jpegs), make("resized", 48), 1)
    for epoch in range(2):
        list(loader.batches(epoch, order()))
    loader.close()
    assert states() == before


@needs_ffcv
def test_opening_imports_no_python_of_ffcvs_and_keeps_torchs_thread_count() -> None:
    code = """
import sys, torch
torch.set_num_threads(3)
import bdkd_dist.data.ffcv_loader
print(torch.get_num_threads(), "ffcv" in sys.modules, "cv2" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "3 False False\n"


@needs_ffcv
def test_without_the_native_decoder_ffcvs_stands_in_and_it_is_said(jpegs: Path, tmp_path: Path) -> None:
    code = """
import sys
from bdkd_dist.data import jpeg
jpeg.library = lambda: None
from loader_samples import images, make, read
from pathlib import Path
import numpy as np
for px in (48, 20):
    np.save(f"{sys.argv[2]}/{px}.npy", images(read("ffcv", Path(sys.argv[1]), make("resized", px), threads=2)))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    arguments = [sys.executable, "-c", code, str(jpegs), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert "the native decoder is not built here" in done.stderr
    for px in (48, 20):
        want = images(read("torch", jpegs, make("resized", px))).numpy()
        difference = np.abs(np.load(tmp_path / f"{px}.npy").astype(int) - want)
        assert 0 < difference.mean() < 1.1
        assert difference.max() <= 8


@pytest.mark.slow
@needs_ffcv
def test_later_loaders_compile_nothing(jpegs: Path) -> None:
    read("ffcv", jpegs, make("resized", 48))
    compiled = len(decode_and_render.overloads)  # to list them fails in a process in which torch has compiled
    for _ in range(3):
        read("ffcv", jpegs, make("none", 48))
    assert compiled == len(decode_and_render.overloads) > 0
