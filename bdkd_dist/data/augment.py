"""Augmentation, defined once for all loaders: where each sample's pixels come from, as whole numbers.

The loaders only carry out these placements (:func:`bdkd_dist.data.kernels.render`), so they cannot disagree on a box
or a flip.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import numpy.typing as npt

from bdkd_dist.data.order import Indices
from bdkd_dist.data.randomness import uniform

if TYPE_CHECKING:
    from bdkd_dist.config import Data
    from bdkd_dist.config.sections import Resize

TRIES = 10
MAX_RAND_OPS = 8

# Every draw of augmentation (see `randomness`); no number stands for two things.
FLIP_DRAW, TOP_DRAW, LEFT_DRAW = 1, 2, 3
AREA_DRAWS = np.arange(4, 4 + 2 * TRIES, 2)  # the draws of a try stand side by side
ASPECT_DRAWS = AREA_DRAWS + 1
BRIGHTNESS_DRAW, CONTRAST_DRAW, SATURATION_DRAW, HUE_DRAW = 100, 101, 102, 103
CUTOUT_ROW_DRAW, CUTOUT_COLUMN_DRAW = 104, 105
MIX_KIND_DRAW, MIX_SHARE_DRAW, CUTMIX_ROW_DRAW, CUTMIX_COLUMN_DRAW = 110, 111, 112, 113
RAND_OP_DRAWS = np.arange(120, 120 + 2 * MAX_RAND_OPS, 2)
RAND_SIGN_DRAWS = RAND_OP_DRAWS + 1

Placements = npt.NDArray[np.int32]
"""(N, 7): top, left, height and width of a box in the stored image, which is resized to the output's size; then the
shifts down and right of the output's window on it (zeros where it sticks out); then 1 to mirror left and right."""


@dataclass(frozen=True)
class Transform:
    """From stored images to square ones of ``image_px``; see :class:`bdkd_dist.config.Augmentation` for the fields."""

    image_px: int
    crop: Literal["none", "pad", "resized"]
    pad_px: int
    min_area: float
    max_aspect: float
    flip: bool
    eval_crop: float
    seed: int
    resize: "Resize | None" = None

    @classmethod
    def training(cls, data: "Data", seed: int) -> Self:
        """Return the recipe's augmentation, drawn from ``seed``."""
        augment = data.augment
        return cls(
            data.image_px,
            augment.crop,
            augment.pad_px,
            augment.min_area,
            augment.max_aspect,
            augment.flip,
            data.eval_crop,
            seed,
            data.resize,
        )

    @classmethod
    def evaluation(cls, data: "Data") -> Self:
        """Return the central crop alone, at ``image_px`` in every epoch."""
        return cls(data.image_px, "none", 0, 1.0, 1.0, False, data.eval_crop, 0)

    def px(self, epoch: int) -> int:
        """Return the side of this epoch's images: ``image_px``, or as ``data.resize`` says.

        It grows by a straight line from ``start_px`` at ``from_epoch`` to ``end_px`` at ``to_epoch``, rounded to the
        nearest multiple of ``multiple_px``, halves up. Boxes in the stored images do not depend on it; ``pad_px``
        counts pixels of this size.
        """
        if (resize := self.resize) is None:
            return self.image_px
        span = resize.to_epoch - resize.from_epoch
        done = min(max(epoch - resize.from_epoch, 0), span)
        line = resize.start_px * (span - done) + resize.end_px * done  # times span
        step = span * resize.multiple_px
        return (2 * line + step) // (2 * step) * resize.multiple_px

    def placements(self, epoch: int, indices: Indices, heights: Indices, widths: Indices) -> Placements:
        """Return the placement of each of N samples, given their stored sizes in pixels."""

        def draw(number: int) -> npt.NDArray[np.float64]:
            return uniform(self.seed, epoch, indices, number)

        placed = np.zeros((len(indices), 7), np.int32)
        if self.crop == "resized":
            box_heights, box_widths, tried = self._random_sizes(epoch, indices, heights, widths)
            free_rows, free_columns = heights - box_heights, widths - box_widths
            placed[:, 0] = np.where(tried, draw(TOP_DRAW) * (free_rows + 1), free_rows // 2)
            placed[:, 1] = np.where(tried, draw(LEFT_DRAW) * (free_columns + 1), free_columns // 2)
            placed[:, 2], placed[:, 3] = box_heights, box_widths
        else:
            side = np.rint(self.eval_crop * np.minimum(heights, widths)).clip(min=1).astype(np.int64)
            placed[:, 0], placed[:, 1] = (heights - side) // 2, (widths - side) // 2
            placed[:, 2] = placed[:, 3] = side
        if self.crop == "pad":
            placed[:, 4] = np.floor(draw(TOP_DRAW) * (2 * self.pad_px + 1)) - self.pad_px
            placed[:, 5] = np.floor(draw(LEFT_DRAW) * (2 * self.pad_px + 1)) - self.pad_px
        if self.flip:
            placed[:, 6] = draw(FLIP_DRAW) < 0.5
        return placed

    def _random_sizes(
        self, epoch: int, indices: Indices, heights: Indices, widths: Indices
    ) -> tuple[Indices, Indices, npt.NDArray[np.bool_]]:
        """Return heights and widths of Inception's random boxes, and whether a try gave them.

        A box's area is uniform in [min_area, 1] of the image's and its aspect ratio log-uniform in
        [1/max_aspect, max_aspect]; the first of ten tries that fits the image is taken, otherwise the largest box
        of an allowed ratio (torchvision's ``RandomResizedCrop``).
        """
        box_heights = np.minimum(heights, np.rint(widths * self.max_aspect)).clip(min=1).astype(np.int64)
        box_widths = np.minimum(widths, np.rint(heights * self.max_aspect)).clip(min=1).astype(np.int64)
        tried = np.zeros(len(indices), np.bool_)
        left = np.arange(len(indices))  # nine of ten are done after the first try
        for area_draw, aspect_draw in zip(AREA_DRAWS, ASPECT_DRAWS, strict=True):
            high, wide = heights[left], widths[left]
            share = self.min_area + (1 - self.min_area) * uniform(self.seed, epoch, indices[left], area_draw)
            log_aspect = np.log(self.max_aspect) * (2 * uniform(self.seed, epoch, indices[left], aspect_draw) - 1)
            area, aspect = share * (high * wide), np.exp(log_aspect)
            width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
            fits = (width > 0) & (width <= wide) & (height > 0) & (height <= high)
            done = left[fits]
            box_heights[done], box_widths[done], tried[done] = height[fits], width[fits], True
            left = left[~fits]
            if not len(left):
                break
        return box_heights, box_widths, tried
