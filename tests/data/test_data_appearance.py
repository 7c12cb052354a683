"""Colour jitter, RandAugment and cutout on batches, beside torchvision's on single images."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import RandAugment
from torchvision.transforms.v2 import functional as F

from bdkd_dist.config import Data
from bdkd_dist.data import image_ops
from bdkd_dist.data.appearance import RAND_OPS, Appearance
from bdkd_dist.data.randomness import uniform

COUNT = 12
FILL = [124, 116, 104]  # of the default data.mean
SHAPES = [(32, 32), (23, 41)]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def pictures(height: int = 32, width: int = 32, count: int = COUNT) -> Tensor:
    """Smooth ones, noise, and ones on which operations divide by nothing."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    images = smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    images[1] = torch.randint(0, 256, (height, width, 3), generator=generator)
    images[2] = 77  # one grey
    images[3] = torch.tensor([200, 10, 10])  # one colour
    images[4] = images[4, ..., :1]  # greys
    images[5] = images[5] // 4 + 90  # low contrast
    images[6, ..., 0] = 0
    images[7] = torch.where(images[7] > 128, 255, 0)
    return images


def singly(operation: Callable[..., Tensor], images: Tensor, *amounts: Any) -> Tensor:
    """Apply a function of torchvision's, which takes (3, H, W), to each image with its own amounts."""
    each = [operation(image.permute(2, 0, 1), *(a[n] for a in amounts)) for n, image in enumerate(images)]
    return torch.stack(each).permute(0, 2, 3, 1)


def distance(got: Tensor, want: Tensor) -> int:
    assert (got.dtype, got.shape) == (torch.uint8, want.shape)
    return int((got.cpu().int() - want.int()).abs().max())


def appearance(**augment: Any) -> Appearance:
    return Appearance.training(Data(dataset="digits", num_classes=10, image_px=32, augment=augment), seed=5)


def drawn(draws: Any, epoch: int = 2, count: int = COUNT) -> np.ndarray:
    return uniform(5, epoch, np.arange(count)[:, None], draws)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness", "hue"])
def test_adjustments_are_torchvisions(name: str, shape: tuple[int, int], device: str) -> None:
    images = pictures(*shape)
    range_ = (-0.5, 0.5) if name == "hue" else (0.0, 2.0)
    for seed in range(4):
        amounts = np.random.default_rng(seed).uniform(*range_, COUNT).astype(np.float32)
        amounts[:2] = range_
        want = singly(getattr(F, f"adjust_{name}"), images, amounts.tolist())
        got = getattr(image_ops, f"adjust_{name}")(images.to(device), torch.from_numpy(amounts).to(device))
        assert distance(got, want) <= 1
        assert (got.cpu() == want).double().mean() > 0.99
        assert distance(images, want) > 20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_operations_without_amounts_are_torchvisions(name: str, shape: tuple[int, int], device: str) -> None:
    images = pictures(*shape)
    want = singly(getattr(F, name), images)
    assert distance(getattr(image_ops, name)(images.to(device)), want) <= (1 if name == "autocontrast" else 0)
    assert distance(images, want) > 20


@pytest.mark.parametrize("device", DEVICES)
def test_posterize_and_solarize_are_torchvisions(device: str) -> None:
    images = pictures()
    for bits in range(4, 9):
        assert (
            distance(image_ops.posterize(images.to(device), bits), singly(lambda i, b=bits: F.posterize(i, b), images))
            == 0
        )
    for threshold in (0.0, 1.0, 127.5, 255.0):
        want = singly(lambda i, t=threshold: F.solarize(i, t), images)
        assert distance(image_ops.solarize(images.to(device), threshold), want) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width", "count"), [(32, 32, 2), (224, 224, 2), (24, 41, 2), (32, 32, 9)])
@pytest.mark.parametrize("magnitude", [0, 1, 9, 10, 17, 30])
def test_each_randaugment_operation_is_torchvisions(
    magnitude: int, height: int, width: int, count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = RandAugment(fill=FILL)
    assert set(RAND_OPS) == set(theirs._AUGMENTATION_SPACE)
    ours = appearance(rand_ops=1, rand_magnitude=magnitude)
    if count == 9:
        monkeypatch.setattr(image_ops, "MAX_AFFINE_PIXELS", 2 * height * width)
    images = pictures(height, width)[torch.arange(count) % 2]
    for number, name in enumerate(RAND_OPS):
        magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
        table = magnitudes(31, height, width)
        amount = 0.0 if table is None else float(table[magnitude])
        signs = np.where(np.arange(count) % 2, 1.0, -1.0)
        got = images.to(device, copy=True)
        ours._apply(got, np.full(count, number), signs, torch.tensor(FILL, dtype=torch.uint8, device=device))
        for n, sign in enumerate(signs):
            own = images[n].permute(2, 0, 1)
            want = theirs._apply_image_or_video_transform(
                own, name, amount * (sign if signed else 1), theirs.interpolation, theirs._fill
            ).permute(1, 2, 0)
            if name in RAND_OPS[1:6]:  # nearest pixels: those half way between two may round to either
                same = (got[n].cpu() == want).all(-1).double().mean()
                assert same >= (1 if magnitude == 0 or name.startswith("Translate") else 0.99), name
            else:
                assert distance(got[n], want) <= 1, name


def test_signed_operations_go_both_ways() -> None:
    images = pictures()[:2]
    ours, fill = appearance(rand_ops=1, rand_magnitude=20), torch.tensor(FILL, dtype=torch.uint8)
    for number, name in enumerate(RAND_OPS):
        results = []
        for sign in (-1.0, 1.0):
            got = images.clone()
            ours._apply(got, np.full(2, number), np.full(2, sign), fill)
            results.append(got)
        signed = RandAugment._AUGMENTATION_SPACE[name][1]
        assert torch.equal(*results) != signed, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rand_ops", [1, 2, 8])
def test_each_sample_gets_its_own_operations_in_its_own_order(rand_ops: int, device: str) -> None:
    count = 100
    images = pictures(count=count)
    ours = appearance(rand_ops=rand_ops, rand_magnitude=17)
    got = ours(images.to(device), torch.arange(count), 2).cpu()
    fill = torch.tensor(FILL, dtype=torch.uint8)
    operations = np.floor(14 * drawn(120 + 2 * np.arange(rand_ops), count=count)).astype(int)
    signs = np.where(drawn(121 + 2 * np.arange(rand_ops), count=count) < 0.5, -1.0, 1.0)
    for index in range(count):
        one = images[index : index + 1].clone()
        for operation, sign in zip(operations[index], signs[index], strict=True):
            # One operation on one image was compared with torchvision's above.
            ours._apply(one, np.array([operation]), np.array([sign]), fill)
        assert distance(got[index], one[0]) <= (0 if device == "cpu" else 1)
    assert len(np.unique(operations)) == 14


def test_operations_and_signs_come_evenly() -> None:
    count = 14_000
    draws = drawn(np.arange(120, 136), count=count)
    for number in range(8):
        operations = np.floor(14 * draws[:, 2 * number]).astype(int)
        assert stats.chisquare(np.bincount(operations, minlength=14)).pvalue > 1e-3
        assert stats.binomtest(int((draws[:, 2 * number + 1] < 0.5).sum()), count).pvalue > 1e-3
        assert abs(stats.spearmanr(draws[:, 2 * number], draws[:, 2 * number + 1]).statistic) < 0.04


@pytest.mark.parametrize("device", DEVICES)
def test_jitter_is_torchvisions_four_adjustments_in_order(device: str) -> None:
    images = pictures()
    ours = appearance(brightness=0.4, contrast=0.3, saturation=0.9, hue=0.2)
    got = ours(images.to(device), torch.arange(COUNT), 2)
    brightness, contrast, saturation, hue = drawn([100, 101, 102, 103]).T
    want = singly(F.adjust_brightness, images, (0.6 + 0.8 * brightness).tolist())
    want = singly(F.adjust_contrast, want, (0.7 + 0.6 * contrast).tolist())
    want = singly(F.adjust_saturation, want, (0.1 + 1.8 * saturation).tolist())
    want = singly(F.adjust_hue, want, (-0.2 + 0.4 * hue).tolist())
    # A level's difference after one adjustment may grow in the next ones.
    assert (got.cpu() == want).double().mean() > 0.98
    assert distance(got, want) <= 4


@pytest.mark.parametrize(("name", "draw"), [("brightness", 100), ("contrast", 101), ("saturation", 102), ("hue", 103)])
def test_one_jitter_alone_is_that_adjustment(name: str, draw: int) -> None:
    images = pictures()
    amount = 0.5 if name == "hue" else 1.0
    got = appearance(**{name: amount})(images, torch.arange(COUNT), 2)
    factors = (0 if name == "hue" else 1) + amount * (2 * drawn([draw])[:, 0] - 1)
    assert distance(got, singly(getattr(F, f"adjust_{name}"), images, factors.tolist())) <= 1


def cut(image: np.ndarray, row: float, column: float, side: int) -> np.ndarray:
    height, width, _ = image.shape
    result = image.copy()
    top, left = math.floor(row * height) - side // 2, math.floor(column * width) - side // 2
    for i in range(top, top + side):
        for j in range(left, left + side):
            if 0 <= i < height and 0 <= j < width:
                result[i, j] = FILL
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [1, 8, 9, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_cutout_fills_a_square_that_may_stick_out(shape: tuple[int, int], side: int, device: str) -> None:
    images = pictures(*shape, count=40)
    got = appearance(cutout_px=side)(images.to(device), torch.arange(40), 2).cpu().numpy()
    for image, result, (row, column) in zip(images.numpy(), got, drawn([104, 105], count=40), strict=True):
        assert np.array_equal(result, cut(image, row, column, side))


def test_cutouts_centre_lies_anywhere() -> None:
    images = torch.zeros(3000, 8, 8, 3, dtype=torch.uint8)
    filled = appearance(cutout_px=1)(images, torch.arange(3000), 0)[..., 0] == FILL[0]
    assert stats.chisquare(filled.sum(0).flatten().numpy()).pvalue > 1e-3
    assert filled.sum() == 3000


def test_randaugment_comes_first_and_cutout_last() -> None:
    images = pictures()
    whole = appearance(rand_ops=2, brightness=0.5, hue=0.3, cutout_px=10)(images, torch.arange(COUNT), 2)
    step = images
    for part in ({"rand_ops": 2}, {"brightness": 0.5, "hue": 0.3}, {"cutout_px": 10}):
        step = appearance(**part)(step, torch.arange(COUNT), 2)
    assert torch.equal(whole, step)


EVERYTHING = {"rand_ops": 3, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.1, "cutout_px": 8}


def test_an_image_does_not_depend_on_its_batch() -> None:
    images, ours = pictures(count=50), appearance(**EVERYTHING)
    whole = ours(images, torch.arange(50), 2)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for part in (shuffled, shuffled[:1], shuffled[3:17]):
        assert torch.equal(ours(images[part], part, 2), whole[part])


def test_appearance_changes_with_epoch_seed_and_index_alone() -> None:
    images, indices = pictures()[:1].expand(COUNT, -1, -1, -1).contiguous(), torch.arange(COUNT)
    ours = appearance(**EVERYTHING)
    here = ours(images, indices, 2)
    assert torch.equal(ours(images, indices, 2), here)
    other = Appearance.training(Data(dataset="digits", num_classes=10, image_px=32, augment=EVERYTHING), seed=6)
    for there in (ours(images, indices, 3), other(images, indices, 2), ours(images, indices + COUNT, 2)):
        assert not (there == here).flatten(1).all(1).any()
    assert len(torch.unique(here, dim=0)) == COUNT


def test_the_given_images_stay_and_no_global_generator_is_drawn_from() -> None:
    images = pictures()
    kept, state = images.clone(), torch.get_rng_state()
    for augment in (EVERYTHING, {"rand_ops": 1}, {"brightness": 1.0}, {"cutout_px": 5}):
        got = appearance(**augment)(images, torch.arange(COUNT), 0)
        assert got.is_contiguous()
        assert not torch.equal(got, images)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_value_is_read_back_from_the_device() -> None:
    images = pictures(count=60).to("meta")  # which has none
    got = appearance(**EVERYTHING)(images, torch.arange(60), 0)
    assert (got.device.type, got.shape, got.dtype) == ("meta", images.shape, torch.uint8)


def test_nothing_asked_for_gives_the_images_themselves() -> None:
    images = pictures()
    assert not appearance().active
    assert appearance()(images, torch.arange(COUNT), 0) is images
    for key, value in EVERYTHING.items():
        assert appearance(**{key: value}).active
    assert len(appearance(**EVERYTHING)(images[:0], torch.arange(0), 0)) == 0
