"""Pages of beton files read ahead into this process's memory (``data.cache=process``).

For file systems that are slow to map: pages are read whole and in the order of their first use, and each is kept until
after its last. How many that are at once is the order's doing; see :func:`~bdkd_dist.data.order.quasi_random_order`.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bdkd_dist.data.beton import Beton
from bdkd_dist.data.loader import DataError
from bdkd_dist.data.order import Indices

PIECE_BYTES = 2**21
"""What is read at once: a thread that is asked to end does so after at most this."""


class Pages:
    """The pages that some batches need, a few batches ahead, as a context manager.

    Batches are fetched and released in order. Between its fetch and its release a batch's bytes stay where they are;
    then pages that no later batch needs make room for others.

    Args:
        beton: The files.
        index_batches: The samples of each batch, by rank and from the current step on.
        threads: How many pages are read at once.
        ahead_batches: Pages are read for so many batches, counted from the first that is not released; no more than
            these may be open at once.

    Attributes:
        num_slots: How many pages of memory the batches need.
        slot_bytes: The size of one: that of the largest page.
    """

    def __init__(
        self, beton: Beton, index_batches: Sequence[Indices], threads: int = 2, ahead_batches: int = 8
    ) -> None:
        assert threads > 0
        assert ahead_batches > 0
        self._beton, self._ahead = beton, ahead_batches
        self._plan(index_batches)
        self.slot_bytes = max((beton.page(int(page))[2] for page in self._pages), default=0)
        self._slots = np.empty((self.num_slots, self.slot_bytes), np.uint8)  # takes memory when it is written
        self._flat = self._slots.reshape(-1)[:]
        self._flat.flags.writeable = False

        self._changed = threading.Condition()
        self._free = list(range(self.num_slots))
        self._slot_of = np.full(len(self._pages), -1)
        self._there = np.zeros(len(self._pages), bool)
        self._failures: dict[int, DataError] = {}
        self._next_read = 0
        self._num_fetched = 0
        self._num_released = 0
        self._closed = False
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._threads = [
            threading.Thread(target=self._read_all, name="bdkd-pages", daemon=True) for _ in range(threads)
        ]

    def __enter__(self) -> "Pages":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for descriptor in self._files.values():
            os.close(descriptor)

    def fetch(self, batch: int) -> tuple[npt.NDArray[np.uint8], Indices]:
        """Wait until a batch's pages are there.

        Returns:
            The memory of all pages, flat and read-only (always the same array), and (B,) int64: where in it each of
            the batch's samples begins.

        Raises:
            DataError: A file cannot be read or ended too early (names it), or the context was left meanwhile.
        """
        assert batch == self._num_fetched
        assert batch < self._num_released + self._ahead, "release batches before fetching more"
        pages = self._batch_pages[batch]
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._there[pages].all())
            if self._closed:
                raise DataError(f"{self._beton.paths[0].parent}: reading was ended")
            for failed in self._failures.keys() & pages.tolist():
                raise self._failures[failed]
        self._num_fetched += 1
        return self._flat, self._slot_of[pages] * self.slot_bytes + self._in_page[batch]

    def release(self, batch: int) -> None:
        """Say that a fetched batch is read no more."""
        assert batch == self._num_released < self._num_fetched
        with self._changed:
            self._free.extend(self._slot_of[self._last_used_in[batch]].tolist())
            self._num_released += 1
            self._changed.notify_all()

    def _plan(self, index_batches: Sequence[Indices]) -> None:
        """Find what is read in which order, and how many pages that is at most at once."""
        indices = np.concatenate([np.empty(0, np.int64), *index_batches])
        ends = np.cumsum([len(batch) for batch in index_batches], dtype=np.int64)
        numbers, first, place = np.unique(self._beton.pages[indices], return_index=True, return_inverse=True)
        last = np.empty(len(numbers), np.int64)
        last[place] = np.arange(len(indices))  # of equal places the last one stays
        first, last = (np.searchsorted(ends, sample, side="right") for sample in (first, last))  # batches now

        by_first = np.argsort(first, kind="stable")
        position = np.empty_like(by_first)
        position[by_first] = np.arange(len(by_first))
        self._pages, self._first_used = numbers[by_first], first[by_first]
        self._batch_pages = np.split(position[place], ends[:-1])
        self._in_page = np.split(self._beton.in_page[indices], ends[:-1])

        steps = np.arange(len(index_batches))
        by_last = position[np.argsort(last, kind="stable")]
        used_up = np.searchsorted(np.sort(last), steps)
        self._last_used_in = np.split(by_last, used_up[1:])
        self.num_slots = int((np.searchsorted(self._first_used, steps + self._ahead) - used_up).max(initial=0))

    def _read_all(self) -> None:
        """What each thread does."""
        while (page := self._next_page()) is not None:
            try:
                self._read(page)
            except Exception as error:
                self._failures[page] = _named(error, self._beton.page(int(self._pages[page]))[0])
            with self._changed:
                self._there[page] = True
                self._changed.notify_all()

    def _next_page(self) -> int | None:
        """Return the next page to read, its slot given, when its turn has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._is_due())
            if self._closed or self._next_read == len(self._pages):
                return None
            page = self._next_read
            self._slot_of[page] = self._free.pop()
            self._next_read += 1
            return page

    def _is_due(self) -> bool:
        done = self._next_read == len(self._pages)
        return done or bool(self._first_used[self._next_read] < self._num_released + self._ahead)

    def _read(self, page: int) -> None:
        path, offset, size = self._beton.page(int(self._pages[page]))
        memory = memoryview(self._slots[self._slot_of[page]])
        done = 0
        while done < size and not self._closed:
            count = os.preadv(self._open(path), [memory[done : min(done + PIECE_BYTES, size)]], offset + done)
            if count == 0:
                raise DataError(f"{path} was cut short while it was read: it ends at byte {offset + done}")
            done += count

    def _open(self, path: Path) -> int:
        """Return a descriptor that is kept: a file that is replaced meanwhile is read as it was."""
        with self._opening:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]


def _named(error: Exception, path: Path) -> DataError:
    if isinstance(error, DataError):
        return error
    reason = error.strerror if isinstance(error, OSError) else repr(error)
    return DataError(f"{path} cannot be read: {reason}")
