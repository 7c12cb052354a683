"""The loader that needs nothing but torch and Pillow: torch's DataLoader over the same betons."""

import io
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.kernels import Pixels, reduction_of, render
from bdkd_dist.data.loader import Batch, DataError, Loader, placements_of
from bdkd_dist.data.order import Indices

Task = tuple[int, Indices]
"""Epoch, sample indices."""


def render_sample(beton: Beton, index: int, placement: np.ndarray, out: Pixels) -> None:
    """Decode one sample, a JPEG with Pillow, and place it in ``out``, (px, px, 3).

    Raises:
        DataError: The sample cannot be decoded, or has not the size that the file declares.
    """
    height, width = int(beton.heights[index]), int(beton.widths[index])
    if not beton.is_jpeg[index]:
        return render(beton.pixels(index), placement, out, 1, 0, 0)  # numba takes 40 µs to fill in defaults
    reduction = reduction_of(placement[2], placement[3], out.shape[0])
    try:
        with Image.open(io.BytesIO(beton.encoded(index).tobytes())) as image:
            size = image.size
            image.draft(None, (width // reduction, height // reduction))
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:
        raise DataError(f"{beton.named(index)} cannot be decoded ({error})") from error
    if size != (width, height):
        raise DataError(f"{beton.named(index)} has {size[1]}x{size[0]} px, {height}x{width} were declared")
    render(pixels, placement, out, reduction, 0, 0)


class _Batches(Dataset[Batch | DataError]):
    """Maps a task to its batch; an error is returned, as the DataLoader would bury a raised one in traces."""

    def __init__(self, beton: Beton, transform: Transform) -> None:
        self.beton, self.transform = beton, transform

    def __getitem__(self, task: Task) -> Batch | DataError:
        try:
            return self._load(*task)
        except DataError as error:
            return error
        except Exception as error:
            return DataError(f"{self.beton.paths[0].parent}: loading samples {task[1].tolist()} failed: {error!r}")

    def _load(self, epoch: int, indices: Indices) -> Batch:
        px = self.transform.px(epoch)
        images = torch.empty((len(indices), px, px, 3), dtype=torch.uint8)
        placements = placements_of(self.beton, self.transform, epoch, indices)
        for index, placement, out in zip(indices, placements, images.numpy(), strict=True):
            render_sample(self.beton, int(index), placement, out)
        labels = torch.from_numpy(self.beton.labels[indices])
        return Batch(images, labels, torch.from_numpy(indices.copy()))


class TorchLoader(Loader):
    """Reads with worker processes, or in this process where one is enough; see :func:`~.loader.open_loader`."""

    def __init__(self, beton: Beton, transform: Transform, threads: int, pinned: bool = False) -> None:
        self._batches = _Batches(beton, transform)
        self._tasks: list[Task] = []  # of the iteration that begins next
        self._processes = threads if threads > 1 else 0
        self._pinned = pinned
        self._loader: DataLoader[Any] | None = None

    def batches(self, epoch: int, index_batches: Sequence[Indices]) -> Iterator[Batch]:
        """See :meth:`Loader.batches`."""
        self._tasks[:] = [(epoch, indices) for indices in index_batches]
        if not self._tasks:
            return
        if self._loader is None:
            self._loader = self._start()
        try:
            with _sigint_blocked():
                iteration = iter(self._loader)  # the first one starts the workers
            for loaded in iteration:
                if isinstance(loaded, DataError):
                    raise loaded
                yield loaded
        except DataError:
            raise
        except (RuntimeError, OSError, EOFError) as error:  # a process was killed, maybe while it handed over a batch
            self.close()
            raise DataError(f"{self._batches.beton.paths[0].parent}: loading failed: {error}") from error

    def close(self) -> None:
        """See :meth:`Loader.close`."""
        self._loader = None  # the DataLoader ends its processes when it is collected

    def _start(self) -> DataLoader[Any]:
        # A training process has threads (OpenMP's, Ray's, TensorBoard's), and a fork may copy a lock that one of
        # them holds. So workers are forked from a clean server process, which imports torch once.
        context = None
        if self._processes:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        return DataLoader(
            self._batches,
            sampler=self._tasks,
            batch_size=None,  # a task is a whole batch
            num_workers=self._processes,
            persistent_workers=self._processes > 0,
            multiprocessing_context=context,
            pin_memory=self._pinned,
            generator=torch.Generator(),  # else each iteration would draw from the generator of the training process
        )


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block Ctrl-C for the processes that start meanwhile, for good: they inherit the mask of this thread.

    A terminal sends Ctrl-C to all its processes; the training process finishes its step and needs its workers. One
    that ignored the signal by its own code would die of a Ctrl-C that comes while it starts.
    """
    resource_tracker.ensure_running()  # it starts before the fork server, and would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
