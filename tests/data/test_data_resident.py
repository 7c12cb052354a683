"""The resident loader gives the torch loader's batches, from images it keeps on the device."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_samples import jpeg, make
from PIL import Image

from bdkd_dist.config.sections import Resize
from bdkd_dist.data import resident_loader
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.data.loader import Batch, DataError, open_loader
from bdkd_dist.data.order import epoch_order, rank_batches
from bdkd_dist.errors import UserError

COUNT = 70
SIZES = [(32, 32), (40, 56)]
DEVICES = ["cpu", "gpu code on the cpu", *["cuda"] * torch.cuda.is_available()]


def picture(index: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(index)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + generator.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def write(path: Path, height: int, width: int, encoded: bool) -> Path:
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            pixels = picture(index, height, width)
            if encoded:
                writer.append_jpeg(jpeg(pixels), height, width, index % 7)
            else:
                writer.append_raw(pixels, index % 7)
    return path


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, bool], Beton]:
    folder = tmp_path_factory.mktemp("one_size")
    return {
        (height, width, encoded): Beton(write(folder / f"{height}_{width}_{encoded}.beton", height, width, encoded))
        for height, width in SIZES
        for encoded in (False, True)
    }


def read(
    kind: Any, beton: Beton, transform: Transform, epoch: int, batches: list[np.ndarray], device: str = "cpu"
) -> list[Batch]:
    """Read batches; of the resident loader's two ways of making them, the GPU's runs on the CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "gpu code on the cpu":
            patch.setattr(resident_loader, "_is_cpu", lambda device: False)
            device = "cpu"
        loader = open_loader(kind, beton, transform, 1, device=torch.device(device))
        try:
            return list(loader.batches(epoch, batches))
        finally:
            loader.close()


def unpacked(beton: Beton, folder: Path) -> Beton:
    """The same images as raw pixels: the torch loader decodes JPEGs at half size where boxes are twice the output's."""
    with BetonWriter(folder / "raw.beton", COUNT) as writer:
        for index in range(COUNT):
            writer.append_raw(beton.pixels(index), int(beton.labels[index]))
    return Beton(folder / "raw.beton")


def assert_close(got: list[Batch], want: list[Batch], levels: int) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.images.is_contiguous()
        assert (one.images.dtype, one.images.shape) == (torch.uint8, other.images.shape)
        assert (one.images.cpu().int() - other.images.int()).abs().max() <= levels
        assert one.labels.dtype == torch.int64
        assert torch.equal(one.labels.cpu(), other.labels)
        assert one.indices.device.type == "cpu"
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("encoded", [False, True], ids=["raw", "jpeg"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", ["none", "pad"])
def test_moved_pixels_are_the_torch_loaders(
    crop: str, flip: bool, encoded: bool, device: str, betons: dict[Any, Beton]
) -> None:
    transform, beton = make(crop, 32, flip=flip), betons[32, 32, encoded]
    for epoch in range(3):
        batches = rank_batches(epoch_order(np.arange(COUNT), 3, epoch), 16, 0, 1)
        want = read("torch", beton, transform, epoch, batches)
        assert_close(read("resident", beton, transform, epoch, batches, device), want, levels=0)


@pytest.mark.parametrize("device", DEVICES)
def test_boxes_of_the_outputs_size_inside_larger_images_are_moved_exactly(
    device: str, betons: dict[Any, Beton]
) -> None:
    batches = [np.arange(COUNT)]
    for crop in ("none", "pad"):
        transform = make(crop, 20, eval_crop=0.5)  # half of 40
        want = read("torch", betons[40, 56, False], transform, 1, batches)
        assert_close(read("resident", betons[40, 56, False], transform, 1, batches, device), want, levels=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("px", [20, 32, 45])
@pytest.mark.parametrize("key", [(32, 32, False), (40, 56, False), (40, 56, True)])
@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_resized_pixels_are_the_torch_loaders_but_for_rounding(
    crop: str, key: tuple[int, int, bool], px: int, device: str, betons: dict[Any, Beton], tmp_path: Path
) -> None:
    transform = make(crop, px, eval_crop=0.875)
    reference = unpacked(betons[key], tmp_path) if key[2] else betons[key]
    for epoch in range(2):
        batches = rank_batches(epoch_order(np.arange(COUNT), 3, epoch), 16, 0, 1)
        want = read("torch", reference, transform, epoch, batches)
        got = read("resident", betons[key], transform, epoch, batches, device)
        assert_close(got, want, levels=0 if device == "cpu" else 1)
        # Rounding differs where a mean lies half way between two levels: seldom.
        differing = [(one.images.cpu() != other.images).double().mean() for one, other in zip(got, want, strict=True)]
        assert max(differing) < 0.01


def area_mean(image: np.ndarray, top: int, left: int, height: int, width: int, px: int) -> np.ndarray:
    """Every source pixel cut into px × px: an output pixel is the plain mean of height × width such parts."""
    box = image[top : top + height, left : left + width].astype(np.float64)
    parts = box.repeat(px, axis=0).repeat(px, axis=1)
    return parts.reshape(px, height, px, width, 3).mean((1, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_resized_pixels_are_means_of_the_areas_they_cover(device: str, betons: dict[Any, Beton]) -> None:
    transform, beton = make("resized", 12), betons[40, 56, False]
    (batch,) = read("resident", beton, transform, 5, [np.arange(COUNT)], device)
    placements = transform.placements(5, np.arange(COUNT), beton.heights, beton.widths).tolist()
    for index, (top, left, height, width, _, _, mirror) in enumerate(placements):
        want = area_mean(beton.pixels(index), top, left, height, width, 12)
        want = want[:, ::-1] if mirror else want
        assert np.abs(batch.images[index].cpu().numpy() - want).max() < 0.5 + 1e-3


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_batches_do_not_depend_on_how_many_are_made_at_a_time(
    crop: str, betons: dict[Any, Beton], monkeypatch: pytest.MonkeyPatch
) -> None:
    transform, beton = make(crop, 32), betons[40, 56, False]
    batches = rank_batches(epoch_order(np.arange(COUNT), 3, 0), 9, 0, 1)
    want = read("torch", beton, transform, 0, batches)
    # One batch, some batches, a batch in parts.
    for chunk_bytes, resized_bytes in ((1, 2**25), (2**17, 2**25), (2**25, 2**15)):
        monkeypatch.setattr(resident_loader, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(resident_loader, "MAX_RESIZED_BYTES", resized_bytes)
        got = read("resident", beton, transform, 0, batches, "gpu code on the cpu")
        assert_close(got, want, levels=1)


def test_ranks_shares_put_together_are_the_whole_batches(betons: dict[Any, Beton]) -> None:
    transform, beton = make("pad", 32), betons[32, 32, False]
    order = epoch_order(np.arange(COUNT), 3, 0)
    whole = read("torch", beton, transform, 0, rank_batches(order, 16, 0, 1))
    for world in (2, 3):
        shares = [read("resident", beton, transform, 0, rank_batches(order, 16, rank, world)) for rank in range(world)]
        joined = [Batch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
        assert_close(joined, whole, levels=0)


def test_images_grow_over_the_epochs(betons: dict[Any, Beton]) -> None:
    resize = Resize(start_px=16, end_px=48, from_epoch=1, to_epoch=3, multiple_px=16)
    transform = dataclasses.replace(make("resized", 32), resize=resize)
    loader = open_loader("resident", betons[40, 56, False], transform, 1)
    shapes = [next(iter(loader.batches(epoch, [np.arange(5)]))).images.shape for epoch in range(5)]
    assert shapes == [(5, px, px, 3) for px in (16, 16, 32, 48, 48)]
    for epoch, px in enumerate((16, 16, 32, 48, 48)):
        (got,) = loader.batches(epoch, [np.arange(5)])
        fixed = dataclasses.replace(make("resized", px))
        assert_close([got], read("torch", betons[40, 56, False], fixed, epoch, [np.arange(5)]), levels=1)
    loader.close()


@pytest.mark.parametrize("px", [32, 20])
@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_no_value_is_read_back_from_the_device(crop: str, px: int, betons: dict[Any, Beton]) -> None:
    (batch,) = read("resident", betons[32, 32, False], make(crop, px), 0, [np.arange(9)], "meta")  # which has none
    assert (batch.images.device.type, batch.labels.device.type, batch.indices.device.type) == ("meta", "meta", "cpu")
    assert batch.images.shape == (9, px, px, 3)


def test_no_batch_is_written_to_again(betons: dict[Any, Beton]) -> None:
    loader = open_loader("resident", betons[32, 32, False], make("pad", 32), 1)
    kept = list(loader.batches(0, [np.arange(8), np.arange(8, 20)]))
    copies = [Batch(*(part.clone() for part in batch)) for batch in kept]
    list(loader.batches(1, [np.arange(30)]))
    for one, other in zip(kept, copies, strict=True):
        assert all(torch.equal(*parts) for parts in zip(one, other, strict=True))
    again = list(loader.batches(0, [np.arange(8), np.arange(8, 20)]))
    assert_close(again, copies, levels=0)
    assert list(loader.batches(0, [])) == []
    loader.close()


def test_loaders_of_one_beton_share_its_images_and_let_go_of_them(
    betons: dict[Any, Beton], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    fill = resident_loader._Images.__init__
    monkeypatch.setattr(resident_loader._Images, "__init__", lambda self, *a: (made.append(1), fill(self, *a))[1])
    beton = betons[32, 32, False]
    first = open_loader("resident", beton, make("pad", 32), 1)
    second = open_loader("resident", beton, make("none", 32), 1)
    assert len(made) == 1
    first.close()
    assert len(list(second.batches(0, [np.arange(4)]))) == 1
    second.close()
    open_loader("resident", beton, make("pad", 32), 1).close()
    assert len(made) == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_decode_as_are_asked_for(
    betons: dict[Any, Beton], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    seen: set[int] = set()
    all_here = threading.Barrier(threads)

    def pixels(beton: Beton, index: int, whole: Any = Beton.pixels) -> np.ndarray:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            all_here.wait(timeout=60)
        return whole(beton, index)  # type: ignore[no-any-return]

    monkeypatch.setattr(Beton, "pixels", pixels)
    open_loader("resident", betons[32, 32, True], make("pad", 32), threads).close()
    assert len(seen) == threads


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "two.beton", 3) as writer:
        for height, width in ((32, 32), (32, 32), (30, 32)):
            writer.append_raw(picture(0, height, width), 0)
    with pytest.raises(UserError, match=r"data\.loader=resident.*32x32 px and of 30x32 px.*data\.loader=auto"):
        open_loader("resident", Beton(tmp_path / "two.beton"), make("pad", 32), 1)


def test_images_that_do_not_fit_are_refused(betons: dict[Any, Beton], monkeypatch: pytest.MonkeyPatch) -> None:
    # 70 images of 3072 bytes.
    monkeypatch.setattr(resident_loader, "_free_bytes", lambda device: 200_000)
    with pytest.raises(UserError, match=r"data\.loader=resident: the 70 images .* take 0\.0 GB.*data\.loader=auto"):
        open_loader("resident", betons[32, 32, False], make("pad", 32), 1)
    monkeypatch.setattr(resident_loader, "_free_bytes", lambda device: 300_000)
    open_loader("resident", betons[32, 32, False], make("pad", 32), 1).close()


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_free_memory_is_told_in_bytes(device: str) -> None:
    free = resident_loader._free_bytes(torch.device(device))
    assert free is not None
    assert 2**24 < free < 2**44


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "good.beton", 32, 32, encoded=True).read_bytes())
    place = whole.find(Beton(tmp_path / "good.beton").encoded(5).tobytes())
    whole[place : place + 64] = bytes(64)
    (tmp_path / "bad.beton").write_bytes(whole)
    with pytest.raises(DataError, match=r"bad\.beton: sample 5 cannot be decoded"):
        open_loader("resident", Beton(tmp_path / "bad.beton"), make("pad", 32), 1)


def test_an_image_of_another_size_than_declared_is_named(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "wrong.beton", 2) as writer:
        writer.append_jpeg(jpeg(picture(0, 32, 32)), 32, 32, 0)
        writer.append_jpeg(jpeg(picture(1, 24, 32)), 32, 32, 0)
    with pytest.raises(DataError, match=r"sample 1 has 24x32 px, 32x32 were declared"):
        open_loader("resident", Beton(tmp_path / "wrong.beton"), make("pad", 32), 1)
