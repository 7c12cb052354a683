"""The fast loader: threads of this process that decode FFCV's files with native code.

Of FFCV it takes the file format, and where our decoder (:mod:`bdkd_dist.data.jpeg`) is not built the one in FFCV's
native library. The order, the augmentation, the compiled loop over samples and the thread that reads ahead are ours:
FFCV's Python, which is not even imported, takes 3 s for that alone and compiles each loader for 5 to 15 s, draws crops
and flips from one generator shared by all threads, leaves the consumer waiting for ever when its thread fails, does not
see that a JPEG failed to decode, and sets torch's number of threads for the whole process.
"""

import ctypes
import importlib.util
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from queue import Full, Queue
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import binding  # type: ignore[import-untyped]

from bdkd_dist.data import jpeg
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.kernels import DECODER_SYMBOL, Pixels, decode_and_render
from bdkd_dist.data.loader import Batch, DataError, Loader, placements_of
from bdkd_dist.data.order import Indices
from bdkd_dist.data.torch_loader import render_sample

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
PARTS_PER_THREAD = 4  # images differ in cost: threads that finish early take another part of the batch

u64, i32 = ctypes.c_uint64, ctypes.c_int32


def _ffcvs_decoder() -> Any:
    """Return FFCV's ``imdecode`` dressed as ``bdkd_decode``: it decodes whole images, faster and less exactly.

    Raises:
        ImportError: FFCV's native library is absent or does not load.
    """
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in Path(folder).glob("_libffcv*")]
    try:
        (library,) = found
        imdecode = ctypes.CDLL(str(library)).imdecode
    except (OSError, ValueError) as error:
        ffcv = f"FFCV does not load ({error})" if spec else "FFCV is not installed"
        raise ImportError(f"the native decoder is not built here, and {ffcv}") from None
    imdecode.argtypes = [u64, u64, i32, i32, u64, *[i32] * 6, ctypes.c_bool, ctypes.c_bool]

    @ctypes.CFUNCTYPE(i32, u64, u64, i32, i32, i32, u64, u64)
    def decode(encoded: int, size: int, height: int, width: int, reduction: int, window: int, out: int) -> int:
        (i32 * 4).from_address(window)[:] = [0, 0, -(-height // reduction), -(-width // reduction)]
        return int(imdecode(encoded, size, height, width, out, height, width, 0, 0, 1, reduction, False, False))

    return decode


if _native := jpeg.library():
    _decoder = _native.bdkd_decode
else:
    _decoder = _ffcvs_decoder()
    logger.warning("the native decoder is not built here (run: make setup); FFCV's decodes whole images, more slowly")
binding.add_symbol(DECODER_SYMBOL, ctypes.cast(_decoder, ctypes.c_void_p).value)


class Storage(Protocol):
    """Where the stored bytes of an epoch's batches are."""

    def fetch(self, number: int, /) -> tuple[Pixels, Indices]:
        """Return flat bytes and where in them each sample of a batch begins, once they are in memory."""

    def release(self, number: int, /) -> None:
        """Say that a batch's bytes are not needed any more."""


class _Mapped:
    """The mapped files as they are: the operating system reads and keeps them."""

    def __init__(self, beton: Beton, index_batches: Sequence[Indices]) -> None:
        self.beton, self.index_batches = beton, index_batches

    def fetch(self, number: int) -> tuple[Pixels, Indices]:
        return self.beton.bytes, self.beton.offsets[self.index_batches[number]]

    def release(self, number: int) -> None:
        pass


class _Rooms:
    """Memory for batches, used again when the last tensor on it is gone: new memory costs the system zeroing it."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    def tensor(self, *shape: int) -> torch.Tensor:
        """Return a uint8 tensor of any content."""
        size = math.prod(shape)
        room = self._free.pop() if self._free else np.empty(size, np.uint8)
        if len(room) < size:
            room = np.empty(size, np.uint8)
        view = room[:size].reshape(shape)  # lives as long as the tensor's storage
        weakref.finalize(view, self._free.append, room).atexit = False
        return torch.from_numpy(view)


class _Epoch(threading.Thread):
    """Loads an epoch's batches, at most ``BATCHES_AHEAD`` ahead; its exceptions reach the consumer."""

    def __init__(self, owner: "FFCVLoader", epoch: int, index_batches: Sequence[Indices]) -> None:
        super().__init__(name="bdkd-epoch", daemon=True)
        self.owner, self.epoch, self.index_batches = owner, epoch, index_batches
        self.device = torch.cuda.current_device() if owner.pinned else None
        self.loaded: Queue[Batch | BaseException | None] = Queue(BATCHES_AHEAD)
        self.left = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            if self.device is not None:
                torch.cuda.set_device(self.device)  # a new thread would pin memory through the first device
            self._offer_all()
            self._offer(None)
        except BaseException as error:
            self._offer(error)

    def __iter__(self) -> Iterator[Batch]:
        while (item := self.loaded.get()) is not None:
            if isinstance(item, DataError):
                raise item
            if isinstance(item, BaseException):
                raise DataError(f"{self.owner.beton.paths[0].parent}: the loading thread failed: {item!r}") from item
            yield item

    def close(self) -> None:
        """End the thread."""
        self.left.set()
        self.join()

    def _offer_all(self) -> None:
        numbers = range(len(self.index_batches))
        with self.owner.storage(self.index_batches) as storage:
            following = self.owner.begin(self.epoch, self.index_batches[0], *storage.fetch(0))
            for number in numbers:
                finish = following
                if (after := number + 1) in numbers:  # threads that are done with this batch begin the next
                    following = self.owner.begin(self.epoch, self.index_batches[after], *storage.fetch(after))
                batch = finish()
                storage.release(number)
                if not self._offer(batch):
                    return

    def _offer(self, item: Batch | BaseException | None) -> bool:
        """Hand an item to the consumer; returns whether it is still there."""
        while not self.left.is_set():
            try:
                self.loaded.put(item, timeout=0.1)
                return True
            except Full:
                pass
        return False


class FFCVLoader(Loader):
    """Reads with threads of this process; see :func:`~.loader.open_loader`."""

    def __init__(
        self,
        beton: Beton,
        transform: Transform,
        threads: int,
        cache: Literal["os", "process"] = "os",
        pinned: bool = False,
    ) -> None:
        self.beton, self.transform, self.cache, self.pinned = beton, transform, cache, pinned
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="bdkd-decode")
        self._num_threads = threads
        self._scratch_bytes = int(np.max(beton.heights * beton.widths * beton.is_jpeg)) * 3
        self._local = threading.local()
        self._rooms = _Rooms()
        self._repaired: set[int] = set()
        self._compile()

    def batches(self, epoch: int, index_batches: Sequence[Indices]) -> Iterator[Batch]:
        """See :meth:`Loader.batches`."""
        if not index_batches:
            return
        loading = _Epoch(self, epoch, index_batches)
        try:
            yield from loading
        finally:
            loading.close()

    def close(self) -> None:
        """See :meth:`Loader.close`."""
        self.threads.shutdown()

    def storage(self, index_batches: Sequence[Indices]) -> AbstractContextManager[Storage]:
        """Open the stored bytes of these batches, as ``data.cache`` says."""
        if self.cache == "os":
            return nullcontext(_Mapped(self.beton, index_batches))
        from bdkd_dist.data.pages import Pages

        return Pages(self.beton, index_batches)

    def begin(self, epoch: int, indices: Indices, content: Pixels, offsets: Indices) -> Callable[[], Batch]:
        """Let the threads make a batch of samples whose stored bytes begin at ``offsets`` of ``content``.

        Returns:
            What waits for it and returns it; its memory is its own.
        """
        beton, count, px = self.beton, len(indices), self.transform.px(epoch)
        shape = (count, px, px, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if self.pinned else self._rooms.tensor(*shape)
        placements = placements_of(beton, self.transform, epoch, indices)
        failures = np.zeros(count, np.int32)
        tables = (beton.sizes, beton.heights, beton.widths, beton.is_jpeg)
        stored = (offsets, *(table[indices] for table in tables), placements)

        def decode(part: slice) -> None:
            inputs = (array[part] for array in stored)
            decode_and_render(content, *inputs, self._scratch(), images.numpy()[part], failures[part])

        parts = self.threads.map(decode, self._parts(count))

        def finish() -> Batch:
            list(parts)
            for place in np.flatnonzero(failures):
                self._repair(int(indices[place]), placements[place], images[place].numpy())
            labels, kept = torch.from_numpy(beton.labels[indices]), torch.from_numpy(indices.copy())
            if self.pinned:
                labels, kept = labels.pin_memory(), kept.pin_memory()
            return Batch(images, labels, kept)

        return finish

    def _compile(self) -> None:
        """Load or compile the kernel before threads do so side by side, which confuses numba."""
        beton = self.beton
        none = (array[:0] for array in (beton.offsets, beton.sizes, beton.heights, beton.widths, beton.is_jpeg))
        nowhere = np.empty((0, 7), np.int32), np.empty(1, np.uint8), np.empty((0, 1, 1, 3), np.uint8)
        decode_and_render(beton.bytes, *none, *nowhere, np.empty(0, np.int32))

    def _scratch(self) -> Pixels:
        """Return this thread's room for decoded pixels; only what is written to takes memory."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = np.empty(self._scratch_bytes, np.uint8)
        return self._local.scratch

    def _parts(self, count: int) -> list[slice]:
        """Cut a batch into parts for the threads."""
        bounds = np.linspace(0, count, min(count, PARTS_PER_THREAD * self._num_threads) + 1).astype(int)
        return [slice(start, end) for start, end in pairwise(bounds)]

    def _repair(self, index: int, placement: np.ndarray, out: Pixels) -> None:
        """Load a sample that the native decoder refused as the torch loader would, which may refuse it too.

        Pillow reads some JPEGs that the decoder does not (CMYK) or that libjpeg warns of (stray bytes).
        """
        render_sample(self.beton, index, placement, out)
        if index not in self._repaired:
            self._repaired.add(index)
            logger.warning("%s is a damaged or unusual JPEG; Pillow decoded it", self.beton.named(index))
