"""What training images look like beyond their crop and flip: colours, RandAugment and cutout, on the device.

The loaders place pixels (:mod:`bdkd_dist.data.augment`); this changes whole batches after them, so it is the same for
every loader. Each sample's amounts follow from (seed, epoch, index) and are computed on the CPU; nothing waits for
the device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bdkd_dist.data import image_ops
from bdkd_dist.data.augment import (
    BRIGHTNESS_DRAW,
    CONTRAST_DRAW,
    CUTOUT_COLUMN_DRAW,
    CUTOUT_ROW_DRAW,
    HUE_DRAW,
    RAND_OP_DRAWS,
    RAND_SIGN_DRAWS,
    SATURATION_DRAW,
)
from bdkd_dist.data.image_ops import on_device
from bdkd_dist.data.order import Indices
from bdkd_dist.data.randomness import uniform

if TYPE_CHECKING:
    from bdkd_dist.config import Data

RAND_OPS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
AFFINE = slice(1, 6)  # five kinds of one operation
MAX_MAGNITUDE = 30


@dataclass(frozen=True)
class Appearance:
    """RandAugment, colour jitter and cutout, in this order; see :class:`bdkd_dist.config.Augmentation` for the fields.

    The jitter's order is brightness, contrast, saturation, hue, where torchvision's ``ColorJitter`` draws one.
    RandAugment is torchvision's (its 14 operations, 31 magnitudes, nearest pixels), but that what comes in from
    outside the image has the mean colour. ``cutout_px`` counts pixels of the training images, whatever their size.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    rand_ops: int
    rand_magnitude: int
    cutout_px: int
    fill: tuple[int, int, int]
    """The mean colour, in grey levels."""
    seed: int

    @classmethod
    def training(cls, data: "Data", seed: int) -> Self:
        """Return the recipe's, drawn from ``seed``."""
        augment = data.augment
        red, green, blue = (round(255 * mean) for mean in data.mean)
        return cls(
            augment.brightness,
            augment.contrast,
            augment.saturation,
            augment.hue,
            augment.rand_ops,
            augment.rand_magnitude,
            augment.cutout_px,
            (red, green, blue),
            seed,
        )

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.rand_ops, self.cutout_px))

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Return the images as this epoch shows them; the given ones are not written to.

        Args:
            images: (B, H, W, 3) uint8 on any device.
            indices: (B,) int64 sample indices, on the CPU.
            epoch: The epoch.
        """
        if not self.active or not len(images):
            return images
        samples = indices.numpy()
        fill = on_device(np.array(self.fill, np.uint8), images.device)
        if self.rand_ops:
            images = self._rand_augment(images, samples, epoch, fill)
        images = self._jitter(images, samples, epoch)
        if self.cutout_px:
            images = self._cutout(images, samples, epoch, fill)
        return images

    def _draw(self, epoch: int, samples: Indices, draws: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return (B, number of draws)."""
        return uniform(self.seed, epoch, samples[:, None], draws)

    def _jitter(self, images: Tensor, samples: Indices, epoch: int) -> Tensor:
        amounts = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        if not amounts.any():
            return images
        shares = self._draw(epoch, samples, [BRIGHTNESS_DRAW, CONTRAST_DRAW, SATURATION_DRAW, HUE_DRAW])
        # Uniform in [1 - x, 1 + x] and, of the hue, in [-x, x]; x is at most 1.
        factors = np.array([1, 1, 1, 0]) + amounts * (2 * shares - 1)
        brightness, contrast, saturation, hue = on_device(factors.T.astype(np.float32), images.device)
        if self.brightness:
            images = image_ops.adjust_brightness(images, brightness)
        if self.contrast:
            images = image_ops.adjust_contrast(images, contrast)
        if self.saturation:
            images = image_ops.adjust_saturation(images, saturation)
        if self.hue:
            images = image_ops.adjust_hue(images, hue)
        return images

    def _cutout(self, images: Tensor, samples: Indices, epoch: int, fill: Tensor) -> Tensor:
        _, height, width, _ = images.shape
        shares = self._draw(epoch, samples, [CUTOUT_ROW_DRAW, CUTOUT_COLUMN_DRAW])
        centres = np.floor(shares * [height, width]).astype(np.int64)
        side = min(self.cutout_px, 2 * max(height, width))  # which covers all of the image already
        tops, lefts = on_device((centres - side // 2).T.copy(), images.device)
        return image_ops.cutout(images, tops, lefts, side, fill)

    def _rand_augment(self, images: Tensor, samples: Indices, epoch: int, fill: Tensor) -> Tensor:
        """Apply each sample's operations one after the other.

        In each round the batch lies sorted by operation, so that each takes one slice of it.
        """
        count = len(samples)
        operations = (self._draw(epoch, samples, RAND_OP_DRAWS[: self.rand_ops]) * len(RAND_OPS)).astype(np.int64)
        signs = np.where(self._draw(epoch, samples, RAND_SIGN_DRAWS[: self.rand_ops]) < 0.5, -1.0, 1.0)
        place = np.arange(count)  # which image lies where
        for operation, sign in zip(operations.T, signs.T, strict=True):
            order = np.argsort(operation, kind="stable")
            where = np.empty(count, np.int64)
            where[place] = np.arange(count)
            images = images.index_select(0, on_device(where[order], images.device))
            self._apply(images, operation[order], sign[order], fill)
            place = order
        back = np.empty(count, np.int64)
        back[place] = np.arange(count)
        return images.index_select(0, on_device(back, images.device))

    def _apply(self, images: Tensor, operations: Indices, signs: npt.NDArray[np.float64], fill: Tensor) -> None:
        """Change images in place, which are sorted by operation."""
        ends = np.searchsorted(operations, np.arange(len(RAND_OPS)), side="right")
        starts = np.concatenate([[0], ends[:-1]])
        share = self.rand_magnitude / MAX_MAGNITUDE
        first, last = starts[AFFINE][0], ends[AFFINE][-1]
        if first < last:
            _, height, width, _ = images.shape
            matrices = affine_matrices(operations[first:last], share * signs[first:last], height, width)
            images[first:last] = image_ops.affine(images[first:last], on_device(matrices, images.device), fill)
        factors = on_device((1 + 0.9 * share * signs).astype(np.float32), images.device)
        for number in range(AFFINE.stop, len(RAND_OPS)):
            if starts[number] < ends[number]:
                part = slice(starts[number], ends[number])
                images[part] = pixel_operation(RAND_OPS[number], images[part], factors[part], share)


def affine_matrices(
    operations: Indices, shares: npt.NDArray[np.float64], height: int, width: int
) -> npt.NDArray[np.float32]:
    """Return what :func:`~bdkd_dist.data.image_ops.affine` needs for RandAugment's affine operations.

    Args:
        operations: (B,) positions in :data:`RAND_OPS` that lie in :data:`AFFINE`.
        shares: (B,) signed shares of the largest magnitude.
        height: Of the images, in pixels.
        width: Of the images, in pixels.

    Returns:
        (B, 2, 3) matrices.
    """
    kinds = {name: operations == RAND_OPS.index(name) for name in RAND_OPS[AFFINE]}
    matrices = np.tile(np.eye(2, 3), (len(operations), 1, 1))
    shear, angle = 0.3 * shares, np.radians(30 * shares)
    # Sheared about the corner, as torchvision does for AutoAugment's sake; the shift is written from the centre.
    matrices[kinds["ShearX"], 0, 1] = shear[kinds["ShearX"]]
    matrices[kinds["ShearX"], 0, 2] = shear[kinds["ShearX"]] * height / 2
    matrices[kinds["ShearY"], 1, 0] = shear[kinds["ShearY"]]
    matrices[kinds["ShearY"], 1, 2] = shear[kinds["ShearY"]] * width / 2
    for name, axis, side in (("TranslateX", 0, width), ("TranslateY", 1, height)):
        matrices[kinds[name], axis, 2] = -np.trunc(150 / 331 * side * shares[kinds[name]])
    turned = kinds["Rotate"]
    cos, sin = np.cos(angle[turned]), np.sin(angle[turned])
    matrices[turned, 0, 0], matrices[turned, 0, 1] = cos, -sin
    matrices[turned, 1, 0], matrices[turned, 1, 1] = sin, cos
    return matrices.astype(np.float32)


def pixel_operation(name: str, images: Tensor, factors: Tensor, share: float) -> Tensor:
    """Return images after one of RandAugment's operations that leave pixels in their places.

    Args:
        name: From :data:`RAND_OPS`.
        images: (B, H, W, 3) uint8.
        factors: (B,) float32, of the operations that have a sign.
        share: Share of the largest magnitude, of those that have none.
    """
    match name:
        case "Brightness":
            return image_ops.adjust_brightness(images, factors)
        case "Color":
            return image_ops.adjust_saturation(images, factors)
        case "Contrast":
            return image_ops.adjust_contrast(images, factors)
        case "Sharpness":
            return image_ops.adjust_sharpness(images, factors)
        case "Posterize":
            return image_ops.posterize(images, 8 - round(4 * share))
        case "Solarize":
            return image_ops.solarize(images, 255 * (1 - share))
        case "AutoContrast":
            return image_ops.autocontrast(images)
        case _:
            return image_ops.equalize(images)
