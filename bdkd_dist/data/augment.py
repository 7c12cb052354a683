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

TRIES = 10
FLIP_DRAW, TOP_DRAW, LEFT_DRAW = 1, 2, 3
AREA_DRAWS = np.arange(4, 4 + 2 * TRIES, 2)  # the draws of a try stand side by side
ASPECT_DRAWS = AREA_DRAWS + 1

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
        )

    @classmethod
    def evaluation(cls, data: "Data") -> Self:
        """Return the central crop alone."""
        return cls(data.image_px, "none", 0, 1.0, 1.0, False, data.eval_crop, 0)

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
        column = indices[:, None]
        share = self.min_area + (1 - self.min_area) * uniform(self.seed, epoch, column, AREA_DRAWS)
        area = share * (heights * widths)[:, None]
        log_aspect = np.log(self.max_aspect) * (2 * uniform(self.seed, epoch, column, ASPECT_DRAWS) - 1)
        aspect = np.exp(log_aspect)
        box_widths, box_heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (
            (box_widths > 0) & (box_widths <= widths[:, None]) & (box_heights > 0) & (box_heights <= heights[:, None])
        )
        tried = fits.any(axis=1)
        first = (np.arange(len(indices)), fits.argmax(axis=1))
        widest = np.minimum(widths, np.rint(heights * self.max_aspect)).clip(min=1)
        highest = np.minimum(heights, np.rint(widths * self.max_aspect)).clip(min=1)
        return (
            np.where(tried, box_heights[first], highest).astype(np.int64),
            np.where(tried, box_widths[first], widest).astype(np.int64),
            tried,
        )
