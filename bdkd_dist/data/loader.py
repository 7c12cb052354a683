"""What a loader is, and which one opens a beton. Both give the same batches."""

import importlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bdkd_dist.data.augment import Placements, Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.order import Indices
from bdkd_dist.errors import Fault, UserError

logger = logging.getLogger(__name__)

Kind = Literal["auto", "ffcv", "torch", "resident"]
CPU = torch.device("cpu")


class DataError(Fault):
    """Data that cannot be read, or a loading thread or process that failed: names the beton and the sample."""


class Batch(NamedTuple):
    """Some samples; no loader writes to it again.

    On the CPU, in pinned memory for a GPU; images and labels of ``resident`` are on the device already.
    """

    images: Tensor
    """(B, px, px, 3) uint8, contiguous."""
    labels: Tensor
    """(B,) int64."""
    indices: Tensor
    """(B,) int64, the samples' places in the beton."""


class Loader(ABC):
    """Reads batches of one beton through one transform. One iteration at a time."""

    @abstractmethod
    def batches(self, epoch: int, index_batches: Sequence[Indices]) -> Iterator[Batch]:
        """Yield exactly these batches in this order, augmented as in this epoch.

        Their sizes may differ; none is empty. An iterator that is dropped midway stops loading.

        Raises:
            DataError: A sample cannot be read, or a loading thread or process failed.
        """

    @abstractmethod
    def close(self) -> None:
        """End all threads and processes."""


def placements_of(beton: Beton, transform: Transform, epoch: int, indices: Indices) -> Placements:
    """Return the placements of some samples of a beton."""
    return transform.placements(epoch, indices, beton.heights[indices], beton.widths[indices])


def open_loader(
    kind: Kind,
    beton: Beton,
    transform: Transform,
    threads: int,
    cache: Literal["os", "process"] = "os",
    device: torch.device = CPU,
) -> Loader:
    """Open a beton with native code, with torch's DataLoader or on the device; ``auto`` takes the first where it can.

    Args:
        kind: ``data.loader`` of the recipe.
        beton: The prepared images.
        transform: What to do with its images.
        threads: Decoding threads (ffcv; resident, at its start) or processes (torch; 1 decodes in this process).
        cache: ``data.cache`` of the recipe.
        device: Where ``resident`` keeps the images; the others hand out batches on the CPU, pinned for a GPU.

    Raises:
        UserError: ``ffcv`` is asked for and there is no native decoder; ``cache=process`` is asked of another loader;
            or ``resident`` of images that differ in size or do not fit.
    """
    found = chosen(kind)
    if cache == "process" and found != "ffcv":
        raise UserError(f"data.cache=process: data.loader={found} does not know it; take data.cache=os")
    if found == "resident":
        from bdkd_dist.data.resident_loader import ResidentLoader

        return ResidentLoader(beton, transform, device, threads)
    if found == "torch":
        from bdkd_dist.data.torch_loader import TorchLoader

        return TorchLoader(beton, transform, threads, pinned=device.type == "cuda")
    try:
        from bdkd_dist.data.ffcv_loader import FFCVLoader
    except ImportError as error:
        raise UserError(
            f"data.loader=ffcv: {error} (run `bdkd doctor`); data.loader=torch reads the same files"
        ) from None
    return FFCVLoader(beton, transform, threads, cache, pinned=device.type == "cuda")


def chosen(kind: Kind) -> Literal["ffcv", "torch", "resident"]:
    """Return which loader ``data.loader`` means on this machine."""
    if kind == "auto":
        return "ffcv" if _ffcv_loads() else "torch"
    return kind


def _ffcv_loads() -> bool:
    try:
        importlib.import_module("bdkd_dist.data.ffcv_loader")
    except ImportError as error:
        if importlib.util.find_spec("ffcv") is not None:  # else `bdkd doctor` tells
            logger.warning("%s; reading with torch's DataLoader", error)
        return False
    return True
