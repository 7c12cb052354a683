"""What a loader is, and which one opens a beton. Both give the same batches."""

import importlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from bdkd_dist.data.augment import Transform
from bdkd_dist.data.order import Indices
from bdkd_dist.errors import UserError

logger = logging.getLogger(__name__)


class DataError(RuntimeError):
    """Data that cannot be read, or a loading thread or process that failed: names the beton and the sample."""


class Batch(NamedTuple):
    """Some samples, on the CPU (in pinned memory where CUDA is); no loader writes to it again."""

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

        All have the same size but the last, which may be smaller. An iterator that is dropped midway stops loading.

        Raises:
            DataError: A sample cannot be read, or a loading thread or process failed.
        """

    @abstractmethod
    def close(self) -> None:
        """End all threads and processes."""


def open_loader(kind: Literal["auto", "ffcv", "torch"], beton: Path, transform: Transform, threads: int) -> Loader:
    """Open a beton with FFCV or torch's DataLoader; ``auto`` takes FFCV where it is installed.

    Args:
        kind: ``data.loader`` of the recipe.
        beton: The prepared file.
        transform: What to do with its images.
        threads: Decoding threads (FFCV) or processes (torch; 1 decodes in this process).

    Raises:
        UserError: The file is no whole beton, or ``ffcv`` is asked for and absent.
    """
    if chosen(kind) == "torch":
        from bdkd_dist.data.torch_loader import TorchLoader

        return TorchLoader(beton, transform, threads)
    try:
        from bdkd_dist.data.ffcv_loader import FFCVLoader
    except ImportError as error:
        absent = importlib.util.find_spec("ffcv") is None
        reason = "is not installed here" if absent else f"does not load here ({error})"
        raise UserError(
            f"data.loader=ffcv: FFCV {reason} (run `bdkd doctor`); data.loader=torch reads the same files"
        ) from None
    return FFCVLoader(beton, transform, threads)


def chosen(kind: Literal["auto", "ffcv", "torch"]) -> Literal["ffcv", "torch"]:
    """Return which loader ``data.loader`` means on this machine."""
    if kind == "auto":
        return "ffcv" if _ffcv_loads() else "torch"
    return kind


def _ffcv_loads() -> bool:
    if importlib.util.find_spec("ffcv") is None:
        return False
    try:
        importlib.import_module("bdkd_dist.data.ffcv_loader")
    except ImportError as error:  # installed, but a library it needs is missing
        logger.warning("FFCV does not load here (%s); reading with torch's DataLoader", error)
        return False
    return True


def check_sizes(index_batches: Sequence[Indices]) -> None:
    """Assert that all batches have the same size but the last, which may be smaller, and none is empty."""
    sizes = [len(batch) for batch in index_batches]
    assert len(set(sizes[:-1])) <= 1
    assert not sizes or 0 < sizes[-1] <= sizes[0]
