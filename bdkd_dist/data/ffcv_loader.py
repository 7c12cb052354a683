"""The fast loader: FFCV's pipeline and native JPEG decoder, with this project's order, augmentation and error handling.

What FFCV 1.0.2 does otherwise and this file mends: its crops and flips draw from one generator shared by all threads;
an exception in its thread leaves the consumer waiting for ever; a JPEG that fails to decode passes unseen; it sets
torch's number of threads for the whole process; its loader compiles for 5 to 15 s.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from queue import Full
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding  # type: ignore[import-untyped]

from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.kernels import DECODER_SYMBOL, decode_and_render
from bdkd_dist.data.loader import Batch, DataError, Loader, check_sizes
from bdkd_dist.data.order import Indices
from bdkd_dist.data.torch_loader import placements_of, render_sample


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    """FFCV sets the thread counts of torch and numba, on import too: put them back."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


with _thread_counts_kept():
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import lib
    from ffcv.loader import Loader as _FFCVLoader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.memory_managers.os_cache import OSCacheContext
    from ffcv.pipeline import Compiler, PipelineSpec
    from ffcv.pipeline.graph import Graph
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader

binding.add_symbol(DECODER_SYMBOL, ctypes.cast(lib.imdecode, ctypes.c_void_p).value)

logger = logging.getLogger(__name__)

PARTS_PER_THREAD = 4  # images differ in cost: threads that finish early take another part of the batch


class _SeededDecoder(SimpleRGBImageDecoder):
    """Decodes and places samples as told; it allocates nothing, as every batch has memory of its own."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return previous_state, None

    def generate_code(self) -> Callable[..., None]:
        return lambda indices, memory, metadata, storage: decode_and_render(indices, *memory, metadata, *storage)


class _MappedFile(OSCacheManager):
    """FFCV's own constructor builds dictionaries of sets over all samples: 6 s and 0.6 GB for ImageNet."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        table = np.sort(reader.alloc_table, order="ptr")
        self.ptrs, self.sizes = table["ptr"].copy(), table["size"].copy()
        self.context = OSCacheContext(self)


class _Pipeline(_FFCVLoader):
    """What FFCV's iterator needs of its loader. Only the image field is decoded; labels are in the metadata."""

    batches_ahead = 2

    def __init__(self, beton: Path) -> None:
        self.reader = Reader(str(beton))
        self.memory_manager = _MappedFile(self.reader)
        self.batch_size = 0  # each iteration sets its own
        places = {name: place for place, name in enumerate(self.reader.handlers)}
        specs = {"image": PipelineSpec("image", transforms=[_SeededDecoder()])}
        self.graph = Graph(specs, self.reader.handlers, places, self.reader.metadata, memory_read=None)
        Compiler.set_enabled(False)  # the decoder's code is compiled already, once for all loaders and kept on disk
        try:
            self.generate_code()
        finally:
            Compiler.set_enabled(True)

    def decode(self, indices: Indices, metadata: np.ndarray, storage: Any, memory: Any) -> None:
        """Run FFCV's one stage on some samples."""
        ((stage, (node,)),), _ = self.code
        shared: dict[str, Any] = {f"memory_{node}": memory, f"shared_memory_{node}": None}
        stage(batch_indices=indices, metadata=metadata, storage_state=storage, **shared)


class _Epoch(EpochIterator):
    """FFCV's loading thread, whose exceptions reach the consumer and which ends when asked to."""

    def __init__(self, owner: "FFCVLoader", epoch: int, index_batches: Sequence[Indices]) -> None:
        self.owner, self.epoch = owner, epoch
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        owner.pipeline.batch_size = len(index_batches[0])
        super().__init__(owner.pipeline, np.concatenate(index_batches))  # starts the thread

    def run(self) -> None:
        try:
            if self.device is not None:
                torch.cuda.set_device(self.device)  # a new thread would pin memory through the first device
            for number, indices in enumerate(self.iter_ixes):
                if not self._offer(self.run_pipeline(number, indices, 0, None)):
                    return
            self._offer(None)
        except BaseException as error:
            self._offer(error)

    def run_pipeline(self, b_ix: int, batch_indices: Indices, batch_slot: int, cuda_event: None) -> Batch:
        """Load one batch; slots and events are unused, as no memory is used twice."""
        beton, transform = self.owner.beton, self.owner.transform
        count, px = len(batch_indices), transform.image_px
        images = torch.empty((count, px, px, 3), dtype=torch.uint8, pin_memory=self.device is not None)
        placements = placements_of(beton, transform, self.epoch, batch_indices)
        failures = np.zeros(count, np.int32)

        def decode(part: slice) -> None:
            memory = (images.numpy()[part], placements[part], failures[part])
            self.loader.decode(batch_indices[part], self.metadata, self.storage_state, memory)

        list(self.owner.threads.map(decode, self.owner.parts(count)))
        for place in np.flatnonzero(failures):
            self.owner.repair(int(batch_indices[place]), placements[place], images[place].numpy())
        labels, indices = torch.from_numpy(beton.labels[batch_indices]), torch.from_numpy(batch_indices)
        if self.device is not None:
            labels, indices = labels.pin_memory(), indices.pin_memory()
        return Batch(images, labels, indices)

    def __next__(self) -> Batch:
        item = self.output_queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, DataError):
            raise item
        if isinstance(item, BaseException):
            raise DataError(f"{self.owner.beton.path}: the loading thread failed: {item!r}") from item
        return item

    def close(self) -> None:
        self.terminate_event.set()
        if self.is_alive():
            self.join()

    def _offer(self, item: Batch | BaseException | None) -> bool:
        """Hand an item to the consumer; returns whether it is still there."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return True
            except Full:
                pass
        return False


class FFCVLoader(Loader):
    """Reads with threads of this process; see :func:`~.loader.open_loader`."""

    def __init__(self, beton: Path, transform: Transform, threads: int) -> None:
        self.beton = Beton(beton)  # checks the file, which FFCV does not
        self.transform = transform
        self.pipeline = _Pipeline(beton)
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="bdkd-decode")
        self._num_threads = threads
        self._repaired: set[int] = set()

    def batches(self, epoch: int, index_batches: Sequence[Indices]) -> Iterator[Batch]:
        """See :meth:`Loader.batches`."""
        check_sizes(index_batches)
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

    def parts(self, count: int) -> list[slice]:
        """Cut a batch into parts for the threads."""
        bounds = np.linspace(0, count, min(count, PARTS_PER_THREAD * self._num_threads) + 1).astype(int)
        return [slice(start, end) for start, end in pairwise(bounds)]

    def repair(self, index: int, placement: np.ndarray, out: np.ndarray) -> None:
        """Load a sample at which FFCV's decoder failed or warned as the torch loader would, which may refuse it.

        Pillow reads some JPEGs that FFCV's decoder does not (CMYK) or warns of (stray bytes).
        """
        render_sample(self.beton, index, placement, out)
        if index not in self._repaired:
            self._repaired.add(index)
            logger.warning("%s: sample %d is a damaged or unusual JPEG; Pillow decoded it", self.beton.path, index)
