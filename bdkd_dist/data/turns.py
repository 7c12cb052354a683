"""One process at a time makes a folder that several want."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def turn_at(folder: Path, others: str) -> Iterator[None]:
    """Hold ``<folder>.lock`` while other processes of this file system wait for it.

    Args:
        folder: What is made; it need not be there, the folder around it must.
        others: What the log says is waited for, e.g. ``another process that prepares x``.

    Raises:
        OSError: The lock cannot be made, or the file system has none.
    """
    from filelock import FileLock, Timeout

    path = Path(f"{folder}.lock")
    path.touch()  # FileLock would wait for ever where no file can be made
    lock = FileLock(path, fallback_to_soft=False)  # else, without flock, the file itself would be the lock: for ever
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for %s", others)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
