"""A file of records that grows while a run trains, on a disk that may refuse for a while."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bdkd_dist.errors import UserError, first_line


class GrowingFile:
    """Appends records to a file; what the disk refuses waits in memory, and no reader finds half of it.

    What lies on the disk after a refusal is known up to the last good ``fsync`` alone: network disks refuse one write
    for the sake of another, and an ``fsync`` asked again says yes to what was lost. So all since then is kept, and
    written again from there.

    Args:
        path: Made where it is missing; what it holds stays.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._durable_bytes = os.fstat(self._descriptor).st_size
        self._pending = bytearray()
        self._written_bytes = 0  # so many of the pending ones lie in the file

    def write(self, content: bytes) -> None:
        """Append whole records; they are there for other processes at once, or as soon as the disk takes them."""
        self._pending += content
        with suppress(OSError):
            self._bring()

    def flush(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            UserError: The disk refuses; it may be asked again.
        """
        try:
            self._bring(os.fsync)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({first_line(error)})") from None
        self._durable_bytes += self._written_bytes
        self._pending.clear()
        self._written_bytes = 0

    def close(self) -> None:
        """Flush and close. What the disk refuses now is later than the newest checkpoint: going on records it again."""
        with suppress(UserError):
            self.flush()
        self._let_go()

    def _bring(self, then: Callable[[int], None] = lambda descriptor: None) -> None:
        """Write what is not in the file yet, then do something with its descriptor; all, or the file goes back."""
        try:
            if self._descriptor is None:
                self._descriptor = self._reopened()
            while self._written_bytes < len(self._pending):
                self._written_bytes += os.write(self._descriptor, self._pending[self._written_bytes :])
            then(self._descriptor)
        except OSError:
            self._go_back()
            raise

    def _reopened(self) -> int:
        """Return a new descriptor: after a refusal a network disk may not know the old one any more."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            there = os.fstat(descriptor).st_size
            if there < self._durable_bytes:
                raise OSError(f"{there} bytes long, where {self._durable_bytes} were written")
            os.ftruncate(descriptor, self._durable_bytes)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _go_back(self) -> None:
        """Drop what the file got since the last good flush; what the disk refuses of that is done when reopening."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._durable_bytes)
        self._let_go()
        self._written_bytes = 0

    def _let_go(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # it is closed all the same
                os.close(self._descriptor)
            self._descriptor = None
