"""The loader of small sets: all images stay on the device, and batches are made there many at a time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from bdkd_dist.data.augment import Placements, Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.image_ops import on_device
from bdkd_dist.data.kernels import render
from bdkd_dist.data.loader import Batch, DataError, Loader, placements_of
from bdkd_dist.data.order import Indices
from bdkd_dist.errors import UserError

READ_SAMPLES = 1024  # copied to the device at a time
MAX_FREE_SHARE = 0.8  # of the device's free memory; networks need some too
CHUNK_BYTES = 2**25  # of images made at a time on a GPU: many batches of small ones
MAX_RESIZED_BYTES = 2**25  # of stored images resized in one step, which takes ten times as much in float32


class ResidentLoader(Loader):
    """Keeps a beton's images on the device as uint8; see :func:`~.loader.open_loader`.

    Images and labels of its batches are on the device, their indices on the CPU as every loader's. The batches are
    the torch loader's, but that a GPU may round resized pixels to the next grey level; and that of JPEGs with boxes of
    at least twice the output's size the others decode a reduced image, where here all stand in full.

    Each rank holds all images of its splits. Loaders of one beton share them, so training and validation images that
    stand in the same files are kept once.

    Args:
        beton: Images of one size, all of which are decoded now.
        transform: What to do with them.
        device: Where they are kept.
        threads: How many decode at once.

    Raises:
        UserError: The images differ in size, or do not fit into the device's memory.
        DataError: One cannot be decoded.
    """

    def __init__(self, beton: Beton, transform: Transform, device: torch.device, threads: int) -> None:
        self._beton, self._transform, self._device = beton, transform, device
        self._images: _Images | None = _images_of(beton, device, threads)
        self._labels = torch.from_numpy(beton.labels).to(device)

    def batches(self, epoch: int, index_batches: Sequence[Indices]) -> Iterator[Batch]:
        """See :meth:`Loader.batches`."""
        assert self._images is not None, "the loader is closed"
        px = self._transform.px(epoch)
        sample_bytes = 3 * max(px**2, self._images.height * self._images.width)
        most = 1 if _is_cpu(self._device) else CHUNK_BYTES // sample_bytes
        for batches in _chunks(index_batches, max_samples=most):
            indices = np.concatenate(batches)
            images, labels = self._make(self._images, epoch, indices, px)
            sizes = [len(batch) for batch in batches]
            parts = (images.split(sizes), labels.split(sizes), torch.from_numpy(indices).split(sizes))
            yield from map(Batch, *parts)

    def close(self) -> None:
        """Let go of the images."""
        self._images = None

    def _make(self, stored: "_Images", epoch: int, indices: Indices, px: int) -> tuple[Tensor, Tensor]:
        """Return (N, px, px, 3) images and (N,) labels."""
        placements = placements_of(self._beton, self._transform, epoch, indices)
        samples = on_device(indices, self._device)
        make = _make_on_cpu if _is_cpu(self._device) else _make_on_gpu
        return make(stored, samples, placements, px), self._labels[samples]


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _make_on_cpu(stored: "_Images", samples: Tensor, placements: Placements, px: int) -> Tensor:
    """Return (N, px, px, 3) images, made one after the other as by the other loaders."""
    images = torch.empty((len(samples), px, px, 3), dtype=torch.uint8)
    whole = stored.whole().numpy()
    for sample, placement, out in zip(samples.tolist(), placements, images.numpy(), strict=True):
        render(whole[sample], placement, out, 1, 0, 0)  # numba takes 40 µs to fill in defaults
    return images


def _make_on_gpu(stored: "_Images", samples: Tensor, placements: Placements, px: int) -> Tensor:
    """Return (N, px, px, 3) images, made all at once."""
    there = on_device(placements, samples.device)
    if np.all(placements[:, 2:4] == px):
        return move(stored.pixels, stored.height, stored.width, samples, there, px)
    return resize(stored.whole()[samples], there, px)


def move(pixels: Tensor, height: int, width: int, samples: Tensor, placements: Tensor, px: int) -> Tensor:
    """Return (N, px, px, 3) images whose boxes have the output's size: each pixel is one of the stored or zero.

    Args:
        pixels: (1 + M·height·width, 3) uint8: a zero, then all stored images.
        height: Of a stored image, in pixels.
        width: Of a stored image, in pixels.
        samples: (N,) int64, which of the M images.
        placements: (N, 7); see :data:`bdkd_dist.data.augment.Placements`.
        px: Side of the output.
    """
    top, left, _, _, down, right, mirror = placements.long().t()[..., None]
    place = torch.arange(px, device=pixels.device)
    row, column = place + down, torch.where(mirror > 0, px - 1 - place, place) + right
    nowhere = -pixels.shape[0]  # so far below zero that no column brings it back
    first = 1 + (samples[:, None] * height + top + row) * width
    first.masked_fill_((row < 0) | (row >= px), nowhere)
    offset = (left + column).masked_fill_((column < 0) | (column >= px), nowhere)
    source = (first[:, :, None] + offset[:, None, :]).clamp_(min=0)
    return pixels.index_select(0, source.view(-1)).view(len(samples), px, px, 3)


def resize(images: Tensor, placements: Tensor, px: int) -> Tensor:
    """Return (N, px, px, 3) images, each pixel the mean of the area it covers, by two products with exact shares.

    Args:
        images: (N, H, W, 3) uint8.
        placements: (N, 7); see :data:`bdkd_dist.data.augment.Placements`.
        px: Side of the output.
    """
    count, height, width, _ = images.shape
    if count > (most := max(1, MAX_RESIZED_BYTES // images[0].numel())):
        parts = zip(images.split(most), placements.split(most), strict=True)
        return torch.cat([resize(*part, px) for part in parts])
    top, left, box_height, box_width, down, right, mirror = placements.float().t()[..., None]
    place = torch.arange(px, device=images.device, dtype=torch.float32)
    rows = area_shares(height, top, box_height, place + down)
    columns = area_shares(width, left, box_width, torch.where(mirror > 0, px - 1 - place, place) + right)
    lines = torch.bmm(rows, images.view(count, height, width * 3).float()).view(count, px, width, 3)
    resized = torch.bmm(columns, lines.transpose(1, 2).reshape(count, width, px * 3))
    rounded = resized.add_(0.5).to(torch.uint8)
    return rounded.view(count, px, px, 3).transpose(1, 2).contiguous()


def area_shares(length: int, start: Tensor, box: Tensor, places: Tensor) -> Tensor:
    """Return (N, px, length): which share of each output pixel along a side every source pixel makes up.

    Args:
        length: Source pixels.
        start: (N, 1) float32, first pixel of each box.
        box: (N, 1) float32, pixels of each box.
        places: (N, px) float32, which of the px equal parts of its box an output pixel shows; outside [0, px) it shows
            nothing.
    """
    px = places.shape[1]
    # In units of 1/px of a source pixel all ends are whole numbers, and exact in float32 below 2^24.
    begin = start * px + places * box
    begin, end = begin[..., None], (begin + box)[..., None]
    source = px * torch.arange(length, device=places.device, dtype=torch.float32)
    overlap = torch.minimum(end, source + px).sub_(torch.maximum(begin, source)).clamp_(min=0)
    inside = (places >= 0) & (places < px)
    return overlap.mul_((inside / box)[..., None])


class _Images:
    """All images of a beton on a device.

    Attributes:
        pixels: (1 + N·height·width, 3) uint8: a zero, then the images.
        height: Of each, in pixels.
        width: Of each, in pixels.
    """

    def __init__(self, beton: Beton, device: torch.device, threads: int) -> None:
        self.beton = beton  # its id is what others find these images by
        self.height, self.width = _one_size(beton)
        count, size = len(beton), self.height * self.width
        _refuse_too_many(beton, count * size * 3, device)
        self.pixels = torch.empty((1 + count * size, 3), dtype=torch.uint8, device=device)
        self.pixels[0] = 0
        with ThreadPoolExecutor(threads, thread_name_prefix="bdkd-decode") as decoders:
            for first in range(0, count, READ_SAMPLES):
                indices = range(first, min(first + READ_SAMPLES, count))
                read = np.stack(list(decoders.map(self._read, indices)))
                part = self.whole()[indices.start : indices.stop]
                part.copy_(torch.from_numpy(read))

    def whole(self) -> Tensor:
        """Return (N, height, width, 3), without a copy."""
        return self.pixels[1:].view(-1, self.height, self.width, 3)

    def _read(self, index: int) -> np.ndarray:
        try:
            pixels = self.beton.pixels(index)
        except Exception as error:
            raise DataError(f"{self.beton.named(index)} cannot be decoded ({error})") from error
        height, width, _ = pixels.shape
        if (height, width) != (self.height, self.width):
            raise DataError(
                f"{self.beton.named(index)} has {height}x{width} px, {self.height}x{self.width} were declared"
            )
        return pixels


_shared: WeakValueDictionary[tuple[int, torch.device], _Images] = WeakValueDictionary()


def _images_of(beton: Beton, device: torch.device, threads: int) -> _Images:
    """Return the beton's images on the device, those that another loader holds if there is one."""
    key = (id(beton), device)
    images = _shared.get(key)
    if images is None:
        images = _shared[key] = _Images(beton, device, threads)
    return images


def _one_size(beton: Beton) -> tuple[int, int]:
    """Return height and width of all images.

    Raises:
        UserError: They are not the same.
    """
    other = np.flatnonzero((beton.heights != beton.heights[0]) | (beton.widths != beton.widths[0]))
    if len(other):
        here, there = (f"{beton.heights[i]}x{beton.widths[i]} px" for i in (0, other[0]))
        raise UserError(
            f"data.loader=resident: {beton.paths[0].parent} holds images of {here} and of {there}, and all must have "
            "one size; take data.loader=auto"
        )
    return int(beton.heights[0]), int(beton.widths[0])


def _refuse_too_many(beton: Beton, needed_bytes: int, device: torch.device) -> None:
    free = _free_bytes(device)
    if free is not None and needed_bytes > MAX_FREE_SHARE * free:
        raise UserError(
            f"data.loader=resident: the {len(beton)} images of {beton.paths[0].parent} take "
            f"{needed_bytes / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free; take data.loader=auto"
        )


def _free_bytes(device: torch.device) -> int | None:
    """Return the device's free memory, or None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _chunks(index_batches: Sequence[Indices], max_samples: int) -> Iterator[list[Indices]]:
    """Yield following batches that together have at most ``max_samples``, at least one at a time."""
    chunk: list[Indices] = []
    for batch in index_batches:
        if chunk and sum(map(len, chunk)) + len(batch) > max_samples:
            yield chunk
            chunk = []
        chunk.append(batch)
    if chunk:
        yield chunk
