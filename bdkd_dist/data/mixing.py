"""Mixup and cutmix on the device: images and targets of pairs of samples, mixed by shares of their own.

Positions 2j and 2j + 1 of a batch are partners; the odd last has none and stays as it is. Each sample draws how it is
mixed with its partner from (seed, epoch, index), so that depends on no other sample of the batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bdkd_dist.data.augment import CUTMIX_COLUMN_DRAW, CUTMIX_ROW_DRAW, MIX_KIND_DRAW, MIX_SHARE_DRAW
from bdkd_dist.data.image_ops import in_boxes, on_device
from bdkd_dist.data.order import Indices
from bdkd_dist.data.randomness import uniform
from bdkd_dist.data.targets import one_hot

if TYPE_CHECKING:
    from bdkd_dist.config import Data


class Mixes(NamedTuple):
    """How each of B samples is mixed: inside its box it keeps ``inside`` of itself, outside all."""

    boxes: npt.NDArray[np.int64]
    """(4, B): tops, bottoms, lefts and rights in pixels; bottoms and rights are left out."""
    inside: npt.NDArray[np.float32]
    """(B,): the sample's own share of each pixel in the box; the rest is the partner's."""
    shares: npt.NDArray[np.float32]
    """(B,): the sample's own share of the whole image, and of the target."""


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019); with both, a coin decides for each sample.

    In both a sample keeps a share λ of itself, drawn from Beta(α, α). Mixup keeps it of every pixel, rounded to whole
    grey levels (so a pixel is off by half a level at most, and what the networks take stays uint8). Cutmix puts a box
    of the partner's pixels, 1 - λ of the image in area and with its centre anywhere, in the same place; where the box
    is cut at the border, λ becomes the exact share of pixels kept.
    """

    mixup_alpha: float
    cutmix_alpha: float
    seed: int

    @classmethod
    def training(cls, data: "Data", seed: int) -> Self:
        """Return the recipe's, drawn from ``seed``."""
        return cls(data.augment.mixup_alpha, data.augment.cutmix_alpha, seed)

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def __call__(
        self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft targets, or what was given where nothing is asked for.

        Args:
            images: (B, H, W, 3) uint8 on any device; not written to.
            labels: (B,) int64 on the same device.
            indices: (B,) int64 sample indices, on the CPU.
            epoch: The epoch.
            num_classes: K.

        Returns:
            (B, H, W, 3) uint8 and (B, K) float32 whose rows sum to 1.
        """
        if not self.active:
            return images, labels
        count, height, width, _ = images.shape
        device = images.device
        mixes = self.mixes(indices.numpy(), epoch, height, width)
        inside, shares = on_device(np.stack([mixes.inside, mixes.shares]), device)
        boxes = in_boxes(images, *on_device(mixes.boxes, device))
        partners = torch.arange(count, device=device).bitwise_xor_(1).clamp_(max=count - 1)
        others = images.index_select(0, partners)
        if self.mixup_alpha:
            weights = torch.where(boxes, inside.view(-1, 1, 1, 1), 1.0)
            mixed = others.float().lerp_(images.float(), weights).round_().to(torch.uint8)
        else:
            mixed = torch.where(boxes, others, images)
        targets = one_hot(labels, num_classes)
        return mixed, torch.lerp(targets[partners], targets, shares[:, None])

    def mixes(self, samples: Indices, epoch: int, height: int, width: int) -> Mixes:
        """Return how each of B samples in a batch is mixed with its partner."""
        draws = [MIX_KIND_DRAW, MIX_SHARE_DRAW, CUTMIX_ROW_DRAW, CUTMIX_COLUMN_DRAW]
        kind, quantile, row, column = uniform(self.seed, epoch, samples[:, None], draws).T
        cut = kind < 0.5 if self.mixup_alpha and self.cutmix_alpha else np.full(len(samples), self.cutmix_alpha > 0)
        kept = _beta_quantiles(np.where(cut, self.cutmix_alpha, self.mixup_alpha), quantile)
        tops, bottoms = _spans(row, kept, height)
        lefts, rights = _spans(column, kept, width)
        boxes = np.where(cut, [tops, bottoms, lefts, rights], [[0], [height], [0], [width]])
        area = (boxes[1] - boxes[0]) * (boxes[3] - boxes[2])
        shares = np.where(cut, 1 - area / (height * width), kept)
        if len(samples) % 2:
            shares[-1] = 1  # its partner is itself
        return Mixes(boxes, np.where(cut, 0, kept).astype(np.float32), shares.astype(np.float32))


def _beta_quantiles(alphas: npt.NDArray[np.float64], quantiles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    quantile: npt.NDArray[np.float64] = betaincinv(alphas, alphas, quantiles)
    return quantile


def _spans(
    centres: npt.NDArray[np.float64], kept: npt.NDArray[np.float64], length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where cutmix boxes begin and end along a side, placed as by torchvision's ``CutMix``."""
    centre = np.floor(centres * length).astype(np.int64)
    half = (np.sqrt(1 - kept) * length / 2).astype(np.int64)
    return (centre - half).clip(min=0), (centre + half).clip(max=length)
