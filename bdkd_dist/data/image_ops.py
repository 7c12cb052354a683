"""Operations on batches of uint8 images, each image by its own amount: torchvision's of the same names, batched.

Images are (B, H, W, 3) uint8, amounts (B,) float32 on their device. Nothing here reads a value back from the device.
Each result is that of :mod:`torchvision.transforms.v2.functional` on one image and one amount, within one grey level.
"""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)
SHARPNESS_WEIGHTS = 13  # Pillow's SMOOTH: ones, and 5 in the middle
MAX_AFFINE_PIXELS = 2**22  # of one step: what an affine map needs at a time is ten times its images


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Scale pixels: 0 is black, 1 the image itself."""
    return _levels(images * _by_image(factors))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Move pixels away from the image's mean grey: 0 is that grey, 1 the image itself."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Move pixels away from their own grey: 0 is a grey image, 1 the image itself."""
    return _blend(images, _grey(images), factors)


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Move pixels away from their neighbourhood's mean: 0 is a smoothed image, 1 the image itself; borders stay."""
    sharpened = images.float()
    rows = (sharpened[:, :-2] + sharpened[:, 1:-1]).add_(sharpened[:, 2:])
    smooth = (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:])
    inner = sharpened[:, 1:-1, 1:-1]
    smooth.add_(inner, alpha=4).div_(SHARPNESS_WEIGHTS).round_()
    inner += smooth.sub_(inner).mul_(1 - _by_image(factors))
    return _levels(sharpened)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue by a share of the whole circle, through HSV and back."""
    red, green, blue = images.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    scale = chroma.clamp(min=1)  # of greys, whose hue does not matter
    sixths = torch.where(
        high == red,
        (green - blue) / scale,
        torch.where(high == green, 2 + (blue - red) / scale, 4 + (red - green) / scale),
    )
    sixths += 6 * shifts.view(-1, 1, 1)
    turned = []
    for start in (5, 3, 1):
        place = start + sixths
        place.sub_((place / 6).floor_(), alpha=6)
        # On a trapezoid of period 6: rising from 0 to 1, flat from 1 to 3, falling to 4, then none.
        level = high - torch.minimum(place, 4 - place).clamp_(0, 1).mul_(chroma)
        turned.append(level.mul_(255.999 / 255).to(torch.uint8))  # cut, as torchvision's
    return torch.stack(turned, -1)


def posterize(images: Tensor, bits: int) -> Tensor:
    """Keep each value's ``bits`` highest bits."""
    return images & (256 - 2 ** (8 - bits))


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values from ``threshold`` on."""
    return torch.where(images >= threshold, ~images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to the whole range; a channel of one value stays."""
    low, high = images.amin((1, 2), keepdim=True).float(), images.amax((1, 2), keepdim=True).float()
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    return _levels((images - torch.where(flat, 0.0, low)).div_(scale))


def equalize(images: Tensor) -> Tensor:
    """Spread each channel's values of each image evenly (Pillow's scheme); a channel that cannot be spread stays."""
    batch, height, width, _ = images.shape
    values = images.permute(0, 3, 1, 2).reshape(batch * 3, height * width).long()
    counts = torch.zeros(batch * 3, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    below = counts.cumsum(1) - counts
    last = counts.gather(1, values.amax(1, keepdim=True))
    step = (height * width - last).div_(255, rounding_mode="floor")
    spread = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    table = torch.where(step > 0, spread, torch.arange(256, device=images.device)).to(torch.uint8)
    return table.gather(1, values).view(batch, 3, height, width).permute(0, 2, 3, 1)


def affine(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Take each pixel from where its image's matrix says, the nearest one; outside the image it is ``fill``.

    Args:
        images: (B, H, W, 3) uint8.
        matrices: (B, 2, 3) float32: from (x, y, 1) of an output pixel to (x, y) of its source, both from the centre.
        fill: (3,) uint8.
    """
    batch, height, width, _ = images.shape
    if batch > (most := max(1, MAX_AFFINE_PIXELS // (height * width))):
        parts = zip(images.split(most), matrices.split(most), strict=True)
        return torch.cat([affine(*part, fill) for part in parts])
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    (from_x, from_y, by_x), (to_x, to_y, by_y) = matrices[..., None, None].permute(1, 2, 0, 3, 4)
    column = (from_x * x + from_y * y[:, None] + by_x + (width - 1) / 2).round_().long()
    row = (to_x * x + to_y * y[:, None] + by_y + (height - 1) / 2).round_().long()
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    image = torch.arange(batch, device=images.device).view(-1, 1, 1)
    source = ((image * height + row) * width + column).masked_fill_(outside, batch * height * width)
    pixels = torch.cat([images.reshape(-1, 3), fill[None]])
    return pixels.index_select(0, source.view(-1)).view(images.shape)


def cutout(images: Tensor, tops: Tensor, lefts: Tensor, side_px: int, fill: Tensor) -> Tensor:
    """Fill a square of each image, where it lies inside.

    Args:
        images: (B, H, W, 3) uint8.
        tops: (B,) int64, first row of each square, which may lie outside the image; its centre does not.
        lefts: (B,) int64, first column.
        side_px: Side of the squares.
        fill: (3,) uint8.
    """
    _, height, width, _ = images.shape
    place = torch.arange(side_px, device=images.device)
    # A square contains its centre, which lies inside: what sticks out can be put on the border's pixels.
    rows = (tops[:, None] + place).clamp_(0, height - 1)
    columns = (lefts[:, None] + place).clamp_(0, width - 1)
    image = torch.arange(len(images), device=images.device)
    cut = images.clone()
    cut[image[:, None, None], rows[:, :, None], columns[:, None, :]] = fill
    return cut


def in_boxes(images: Tensor, tops: Tensor, bottoms: Tensor, lefts: Tensor, rights: Tensor) -> Tensor:
    """Return (B, H, W, 3) bool: which values lie in each image's box, its bottom row and right column left out."""
    batch, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(3 * width, device=images.device).div_(3, rounding_mode="floor")
    inside_rows = (rows >= tops[:, None]) & (rows < bottoms[:, None])
    inside_columns = (columns >= lefts[:, None]) & (columns < rights[:, None])
    return (inside_rows[:, :, None] & inside_columns[:, None, :]).view(batch, height, width, 3)


def on_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return values on the device; the CPU does not wait for their arrival."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _by_image(amounts: Tensor) -> Tensor:
    return amounts.view(-1, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    """Return (B, H, W, 1) float32: whole grey levels, cut as torchvision's."""
    red, green, blue = images.unbind(-1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2]).floor_()[..., None]


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    factor = _by_image(factors)
    return _levels((images * factor).add_(others * (1 - factor)))


def _levels(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)
