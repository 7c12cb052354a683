"""Mixup and cutmix of pairs, beside loops over samples and pixels."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import betainc

from bdkd_dist.config import Data
from bdkd_dist.data.mixing import Mixing
from bdkd_dist.data.order import epoch_order, rank_batches
from bdkd_dist.data.randomness import uniform

CLASSES = 7
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
EVERY_KIND = pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.2, "cutmix_alpha": 0.8}]
)


def mixing(**augment: Any) -> Mixing:
    return Mixing.training(Data(dataset="digits", num_classes=10, image_px=32, augment=augment), seed=5)


def batch(count: int, height: int = 12, width: int = 17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    return (
        images,
        torch.randint(0, CLASSES, (count,), generator=generator),
        torch.randperm(1000, generator=generator)[:count],
    )


def draws(index: int, epoch: int) -> list[float]:
    """The coin, the quantile of the share, and the centre's row and column."""
    return [float(uniform(5, epoch, index, number)) for number in (110, 111, 112, 113)]


def beta_quantile(alpha: float, quantile: float) -> float:
    """By bisection of the distribution function, which is symmetric."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if betainc(alpha, alpha, middle) < quantile else (low, middle)
    return low


def reference(
    images: np.ndarray, labels: list[int], indices: list[int], epoch: int, mixup_alpha: float, cutmix_alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mixed images, not yet rounded, and targets, one sample and one pixel after the other."""
    count, height, width, _ = images.shape
    mixed, targets = images.astype(np.float64), np.zeros((count, CLASSES))
    for k in range(count):
        partner = k + 1 if k % 2 == 0 else k - 1
        if partner == count:
            targets[k, labels[k]] = 1
            continue
        coin, quantile, row, column = draws(indices[k], epoch)
        cut = coin < 0.5 if mixup_alpha and cutmix_alpha else cutmix_alpha > 0
        share = beta_quantile(cutmix_alpha if cut else mixup_alpha, quantile)
        if cut:
            centre_row, centre_column = math.floor(row * height), math.floor(column * width)
            half_height, half_width = (int(math.sqrt(1 - share) * side / 2) for side in (height, width))
            pasted = 0
            for i in range(max(0, centre_row - half_height), min(height, centre_row + half_height)):
                for j in range(max(0, centre_column - half_width), min(width, centre_column + half_width)):
                    mixed[k, i, j] = images[partner, i, j]
                    pasted += 1
            share = 1 - pasted / (height * width)
        else:
            mixed[k] = share * images[k].astype(float) + (1 - share) * images[partner].astype(float)
        targets[k, labels[k]] += share
        targets[k, labels[partner]] += 1 - share
    return mixed, targets


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 5, 40])
@EVERY_KIND
def test_mixing_is_the_loops(alphas: dict[str, float], count: int, device: str) -> None:
    images, labels, indices = batch(count)
    ours = mixing(**alphas)
    got, targets = ours(images.to(device), labels.to(device), indices, 3, CLASSES)
    want, want_targets = reference(
        images.numpy(), labels.tolist(), indices.tolist(), 3, ours.mixup_alpha, ours.cutmix_alpha
    )
    assert (got.dtype, targets.dtype) == (torch.uint8, torch.float32)
    # Rounded to the nearest level; a float32 of 255 is exact to 2e-5.
    assert np.abs(got.cpu().numpy() - want).max() <= 0.5 + 1e-4
    assert np.abs(targets.cpu().numpy() - want_targets).max() < 1e-6


@EVERY_KIND
def test_targets_sum_to_one_and_name_no_other_class(alphas: dict[str, float]) -> None:
    images, labels, indices = batch(200)
    targets = mixing(**alphas)(images, labels, indices, 0, CLASSES)[1]
    assert (targets.sum(1) - 1).abs().max() < 1e-6
    assert targets.min() >= 0
    partners = labels.view(-1, 2).flip(1).flatten()
    assert torch.equal(targets.nonzero()[:, 1].unique(), labels.unique())
    both = targets.gather(1, labels[:, None]) + targets.gather(1, partners[:, None]) * (labels != partners)[:, None]
    assert (both - 1).abs().max() < 1e-6


def truncated(alpha: float) -> Callable[[np.ndarray], np.ndarray]:
    """Beta(α, α)'s distribution function between 1e-6 and 1/2."""
    low = betainc(alpha, alpha, 1e-6)
    return lambda x: (betainc(alpha, alpha, x) - low) / (0.5 - low)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    # Cutmix's shares lie on a grid and are larger where the box is cut: only those of mixup are Beta's.
    shares = mixing(mixup_alpha=alpha).mixes(np.arange(20_000), 0, 32, 32).shares.astype(np.float64)
    halves = shares[shares < 0.5], 1 - shares[shares > 0.5]
    assert stats.binomtest(len(halves[0]), 20_000).pvalue > 1e-3
    # Next to 1 many shares are one float32: there only as many as have more than that between them and 1.
    assert stats.kstest(halves[0], lambda x: 2 * betainc(alpha, alpha, x)).pvalue > 1e-3
    apart = halves[1][halves[1] > 1e-6]
    assert stats.binomtest(len(apart), len(halves[1]), 1 - 2 * betainc(alpha, alpha, 1e-6)).pvalue > 1e-3
    assert stats.kstest(apart, truncated(alpha)).pvalue > 1e-3


def test_cutmix_boxes_have_the_drawn_area_and_lie_anywhere() -> None:
    count, side = 20_000, 1000
    mixes = mixing(cutmix_alpha=1.0).mixes(np.arange(count), 0, side, side)
    top, bottom, left, right = mixes.boxes
    assert np.allclose(1 - mixes.shares, (bottom - top) * (right - left) / side**2, atol=1e-6)
    whole = (top > 0) & (bottom < side) & (left > 0) & (right < side)
    drawn = uniform(5, 0, np.arange(count), 111)[whole]  # Beta(1, 1) is uniform
    assert np.abs(mixes.shares[whole] - drawn).max() < 0.005
    small = np.flatnonzero(bottom - top < side / 50)
    for start, end in ((top, bottom), (left, right)):
        assert stats.kstest((start + end)[small] / (2 * side), "uniform").pvalue > 1e-3


def test_a_coin_decides_between_mixup_and_cutmix() -> None:
    count = 10_000
    mixes = mixing(mixup_alpha=0.3, cutmix_alpha=2.0).mixes(np.arange(count), 0, 32, 32)
    mixed = (mixes.boxes == np.array([[0], [32], [0], [32]])).all(0) & (mixes.inside > 0)
    assert stats.binomtest(int(mixed.sum()), count).pvalue > 1e-3
    assert not mixes.inside[~mixed].any()
    assert stats.kstest(mixes.shares[mixed], stats.beta(0.3, 0.3).cdf).pvalue > 1e-3


@EVERY_KIND
def test_a_sample_depends_on_its_partner_alone(alphas: dict[str, float]) -> None:
    ours, (images, labels, indices) = mixing(**alphas), batch(40)
    whole, targets = ours(images, labels, indices, 1, CLASSES)
    for part in (slice(0, 2), slice(6, 30), slice(38, 40)):
        got, got_targets = ours(images[part], labels[part], indices[part], 1, CLASSES)
        assert torch.equal(got, whole[part])
        assert torch.equal(got_targets, targets[part])
    swapped = torch.arange(40).view(-1, 2).flip(1).flatten()  # partners stay partners
    got, got_targets = ours(images[swapped], labels[swapped], indices[swapped], 1, CLASSES)
    assert torch.equal(got, whole[swapped])
    assert torch.equal(got_targets, targets[swapped])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_mix_what_one_process_would(world: int) -> None:
    ours, (images, labels, _) = mixing(mixup_alpha=1.0, cutmix_alpha=1.0), batch(37)
    order = epoch_order(np.arange(37), 0, 0)

    def epoch(rank: int, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = map(torch.from_numpy, rank_batches(order, 12, rank, ranks))
        return [ours(images[b], labels[b], b, 0, CLASSES) for b in batches]

    shares = [epoch(rank, world) for rank in range(world)]
    for whole, *parts in zip(epoch(0, 1), *shares, strict=True):
        for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(pieces))


def test_mixing_changes_with_epoch_and_seed() -> None:
    ours, samples = mixing(mixup_alpha=1.0), np.arange(50)
    here = ours.mixes(samples, 0, 32, 32).shares
    other = Mixing(1.0, 0.0, seed=6)
    for there in (ours.mixes(samples, 1, 32, 32).shares, other.mixes(samples, 0, 32, 32).shares):
        assert not np.any(np.isclose(here, there, atol=1e-6))
    assert np.array_equal(here, ours.mixes(samples, 0, 32, 32).shares)


@EVERY_KIND
def test_the_given_images_stay_and_no_global_generator_is_drawn_from(alphas: dict[str, float]) -> None:
    images, labels, indices = batch(40)
    kept, state = images.clone(), torch.get_rng_state()
    got, _ = mixing(**alphas)(images, labels, indices, 0, CLASSES)
    assert got.is_contiguous()
    assert not torch.equal(got, images)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)


@EVERY_KIND
def test_no_value_is_read_back_from_the_device(alphas: dict[str, float]) -> None:
    images, labels, indices = batch(40)
    got, targets = mixing(**alphas)(images.to("meta"), labels.to("meta"), indices, 0, CLASSES)  # which has none
    assert (got.device.type, got.shape, got.dtype) == ("meta", images.shape, torch.uint8)
    assert (targets.device.type, targets.shape) == ("meta", (40, CLASSES))


def test_nothing_asked_for_gives_images_and_labels_themselves() -> None:
    images, labels, indices = batch(8)
    ours = mixing()
    got, targets = ours(images, labels, indices, 0, CLASSES)
    assert not ours.active
    assert got is images
    assert targets is labels
    assert mixing(mixup_alpha=0.1).active
    assert mixing(cutmix_alpha=0.1).active
