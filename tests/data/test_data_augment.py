import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bdkd_dist.config import Augmentation, Data
from bdkd_dist.config.sections import Resize
from bdkd_dist.data import augment
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.randomness import ORDER_DRAW

MASK = 2**64 - 1


def draw(seed: int, epoch: int, index: int, number: int) -> float:
    """The random number of this draw, in Python's unbounded integers."""
    state = 0
    for value in (seed, epoch, index, number):
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return (state >> 11) / 2**53


def random_resized_crop(
    transform: Transform, epoch: int, index: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, written out for one image with this project's draws."""
    ratio = (1 / transform.max_aspect, transform.max_aspect)
    for attempt in range(10):
        area = (
            height
            * width
            * (transform.min_area + (1 - transform.min_area) * draw(transform.seed, epoch, index, 4 + 2 * attempt))
        )
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * draw(transform.seed, epoch, index, 5 + 2 * attempt))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draw(transform.seed, epoch, index, 2) * (height - h + 1))
            left = int(draw(transform.seed, epoch, index, 3) * (width - w + 1))
            return top, left, h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def make(crop: Any, **changes: Any) -> Transform:
    fields = {
        "image_px": 64,
        "crop": crop,
        "pad_px": 4,
        "min_area": 0.08,
        "max_aspect": 4 / 3,
        "flip": True,
        "eval_crop": 0.875,
        "seed": 11,
    }
    return Transform(**(fields | changes))


def sizes(count: int) -> SimpleNamespace:
    generator = np.random.default_rng(0)
    return SimpleNamespace(
        indices=generator.permutation(100_000)[:count],
        heights=generator.integers(20, 600, count),
        widths=generator.integers(20, 600, count),
    )


@pytest.mark.parametrize("max_aspect", [1.0, 4 / 3, 3.0])
@pytest.mark.parametrize("min_area", [0.08, 0.9, 1.0])
def test_resized_boxes_are_torchvisions(min_area: float, max_aspect: float) -> None:
    transform, s = make("resized", min_area=min_area, max_aspect=max_aspect), sizes(500)
    got = transform.placements(3, s.indices, s.heights, s.widths)
    want = [
        random_resized_crop(transform, 3, int(i), int(h), int(w))
        for i, h, w in zip(s.indices, s.heights, s.widths, strict=True)
    ]
    assert got[:, :4].tolist() == [list(box) for box in want]
    assert not got[:, 4:6].any()


def test_resized_boxes_lie_inside_even_of_extreme_images() -> None:
    heights, widths = np.array([1, 1, 5000, 2, 3]), np.array([1, 5000, 1, 3, 700])
    for epoch in range(50):
        top, left, height, width = make("resized").placements(epoch, np.arange(5), heights, widths).T[:4]
        assert np.all((top >= 0) & (left >= 0) & (height > 0) & (width > 0))
        assert np.all((top + height <= heights) & (left + width <= widths))


def test_resized_boxes_have_uniform_area_and_log_uniform_aspect() -> None:
    count = 20_000
    side = np.full(count, 4_000)
    # A large image and small boxes: nearly no try is refused, and rounding does not show.
    transform = make("resized", min_area=0.2, max_aspect=1.2)
    height, width = transform.placements(0, np.arange(count), side, side).T[2:4]
    area = height * width / 4_000**2
    kept = area < 0.8  # above, boxes of extreme aspect do not fit
    assert stats.kstest(area[kept], stats.uniform(0.2, 0.6).cdf).pvalue > 1e-3
    assert stats.kstest(np.log(width / height)[kept] / math.log(1.2), stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_padded_crops_move_evenly_in_both_directions() -> None:
    count = 20_000
    side = np.full(count, 64)
    placed = make("pad", eval_crop=1.0).placements(0, np.arange(count), side, side)
    assert np.array_equal(placed[:, :4], np.tile([0, 0, 64, 64], (count, 1)))
    pairs = np.bincount((placed[:, 4] + 4) * 9 + placed[:, 5] + 4, minlength=81)
    assert len(pairs) == 81
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_padded_crops_of_other_sizes_start_from_the_evaluation_crop() -> None:
    s = sizes(200)
    padded, central = make("pad"), make("none")
    want = central.placements(0, s.indices, s.heights, s.widths)[:, :4]
    assert np.array_equal(padded.placements(0, s.indices, s.heights, s.widths)[:, :4], want)


def test_evaluation_takes_the_central_square() -> None:
    heights, widths = np.array([100, 64, 333, 5]), np.array([80, 64, 500, 2])
    transform = Transform.evaluation(DATA)
    # Shorter sides times 0.875 are 70, 56, 291.375 and 1.75.
    want = [[15, 5, 70, 70], [4, 4, 56, 56], [21, 104, 291, 291], [1, 0, 2, 2]]
    for epoch in (0, 5):
        placed = transform.placements(epoch, np.arange(4), heights, widths)
        assert placed.tolist() == [[*box, 0, 0, 0] for box in want]


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_half_of_the_images_are_mirrored(crop: str) -> None:
    count = 20_000
    side = np.full(count, 64)
    mirrored = make(crop).placements(1, np.arange(count), side, side)[:, 6]
    assert mirrored.tolist()[:50] == [int(draw(11, 1, index, 1) < 0.5) for index in range(50)]
    assert stats.binomtest(int(mirrored.sum()), count).pvalue > 1e-3
    assert not make(crop, flip=False).placements(1, np.arange(count), side, side)[:, 6].any()


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_a_placement_does_not_depend_on_its_batch(crop: str) -> None:
    transform, s = make(crop), sizes(101)
    whole = transform.placements(2, s.indices, s.heights, s.widths)
    for part in (slice(0, 1), slice(3, 40), slice(40, 101)):
        assert np.array_equal(transform.placements(2, s.indices[part], s.heights[part], s.widths[part]), whole[part])


def test_placements_change_with_epoch_and_seed() -> None:
    indices, side = np.arange(100), np.full(100, 300)
    here = make("resized").placements(0, indices, side, side)
    for other, epoch in ((make("resized"), 1), (make("resized", seed=12), 0)):
        there = other.placements(epoch, indices, side, side)
        assert np.mean(np.all(here == there, axis=1)) < 0.02


DATA = Data(
    dataset="files",
    num_classes=10,
    image_px=64,
    eval_crop=0.875,
    augment=Augmentation(crop="resized", pad_px=3, min_area=0.25, max_aspect=2.0, flip=False),
)


def test_training_transform_follows_the_recipe() -> None:
    assert Transform.training(DATA, seed=5) == Transform(64, "resized", 3, 0.25, 2.0, False, 0.875, 5)


def test_no_two_draws_have_one_number() -> None:
    numbers = [ORDER_DRAW]
    for name, value in vars(augment).items():
        if name.endswith(("_DRAW", "_DRAWS")):
            numbers += np.atleast_1d(value).tolist()
    assert len(numbers) > 40
    assert len(set(numbers)) == len(numbers)


def growing(**changes: Any) -> Transform:
    fields = {"start_px": 128, "end_px": 224, "from_epoch": 2, "to_epoch": 12, "multiple_px": 32}
    data = Data(dataset="files", num_classes=10, image_px=256, resize=Resize(**(fields | changes)))
    return Transform.training(data, seed=5)


def test_images_grow_by_a_straight_line_rounded_to_multiples() -> None:
    # 128 + 9.6 px an epoch from epoch 2 on: 128, 137.6, 147.2, 156.8, 166.4, 176, 185.6, 195.2, 204.8, 214.4, 224.
    # 176 lies half way between 160 and 192, and halves go up.
    sizes = [growing().px(epoch) for epoch in range(15)]
    assert sizes == [128, 128, 128, 128, 160, 160, 160, 192, 192, 192, 192, 224, 224, 224, 224]


def test_images_shrink_where_they_end_smaller() -> None:
    transform = growing(start_px=224, end_px=128, from_epoch=0, to_epoch=3)
    assert [transform.px(epoch) for epoch in range(5)] == [224, 192, 160, 128, 128]


@given(
    start=st.integers(8, 64), end=st.integers(8, 64), first=st.integers(0, 30), span=st.integers(1, 30), data=st.data()
)
def test_sizes_are_the_nearest_multiples_to_the_line(
    start: int, end: int, first: int, span: int, data: st.DataObject
) -> None:
    multiple = data.draw(st.sampled_from([m for m in (1, 2, 3, 5, 8) if start % m == 0 and end % m == 0]))
    transform = growing(start_px=start, end_px=end, from_epoch=first, to_epoch=first + span, multiple_px=multiple)
    for epoch in range(first + span + 5):
        share = Fraction(min(max(epoch - first, 0), span), span)
        line = start + (end - start) * share
        px = transform.px(epoch)
        assert px % multiple == 0
        assert -Fraction(multiple, 2) < px - line <= Fraction(multiple, 2)


def test_without_a_resize_and_in_evaluation_every_epoch_has_the_images_size() -> None:
    data = Data(dataset="files", num_classes=10, image_px=72, resize=Resize(start_px=32, end_px=64, to_epoch=4))
    for epoch in range(6):
        assert make("pad").px(epoch) == 64
        assert Transform.evaluation(data).px(epoch) == 72
    assert Transform.training(data, 0).px(0) == 32
