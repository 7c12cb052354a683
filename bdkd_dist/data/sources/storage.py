"""Folders on any file system that pyarrow knows: local, S3, GCS, Azure, HDFS."""

import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from bdkd_dist.errors import UserError, first_line, unknown
from bdkd_dist.uris import is_uri, shown

T = TypeVar("T")
R = TypeVar("R")
SCHEMES = ("abfs", "abfss", "file", "gcs", "gs", "hdfs", "s3", "viewfs")
OBJECT_STORES = ("abfs", "abfss", "gcs", "gs", "s3")
"""An object appears there when it was sent whole; elsewhere a file is written beside and renamed."""
THREADS = 16
"""Requests under way at once: they wait for the network, not for a core."""
LOCAL_BUFFER_BYTES = 2**20
REMOTE_BUFFER_BYTES = 2**23  # a request costs about as much time as a few MB of transfer


class File(NamedTuple):
    """A file in a listing."""

    path: str
    """Below the place's root, with ``/`` between folders."""
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Place:
    """A folder, named by an absolute path or a URI; each process connects when it first reads."""

    root: str

    @classmethod
    def of(cls, root: str, key: str = "data.root") -> "Place":
        """Return the place that a user names under a key of the recipe; a relative path is made absolute.

        Raises:
            UserError: The URI's scheme is unknown.
        """
        if not is_uri(root):
            return cls(os.path.abspath(Path(root).expanduser()))
        if (scheme := urlsplit(root).scheme) not in SCHEMES:
            raise UserError(f"{key}={shown(root)}: {unknown('file system', scheme, SCHEMES)}; or give a path")
        return cls(root)

    def __truediv__(self, path: str) -> "Place":
        """Return a folder below; a URI's query stays at its end."""
        folder, mark, query = self.root.partition("?") if is_uri(self.root) else (self.root, "", "")
        return Place(f"{folder.rstrip('/')}/{path}{mark}{query}")

    @property
    def parent(self) -> "Place":
        """The folder above."""
        folder, mark, query = self.root.partition("?") if is_uri(self.root) else (self.root, "", "")
        return Place(f"{folder.rstrip('/').rpartition('/')[0]}{mark}{query}")

    @property
    def is_local(self) -> bool:
        """Whether reading needs no network, as far as one can tell."""
        return not is_uri(self.root) or self.root.startswith("file:")

    @property
    def folder(self) -> Path:
        """The path of a place on this machine."""
        assert self.is_local
        return Path(_connect(self.root)[1])

    @property
    def buffer_bytes(self) -> int:
        """What is read at once from a file that is read from its beginning to its end."""
        return LOCAL_BUFFER_BYTES if self.is_local else REMOTE_BUFFER_BYTES

    @property
    def name(self) -> str:
        """The folder's name."""
        return (
            Path(self.root).resolve().name if not is_uri(self.root) else _connect(self.root)[1].split("/")[-1]
        ) or "files"

    def is_folder(self) -> bool:
        """Whether there is such a folder."""
        from pyarrow.fs import FileType

        with self.reading():
            system, base = _connect(self.root)
            return system.get_file_info(base).type == FileType.Directory

    def listing(self, folder: str = "", recursive: bool = False) -> tuple[list[File], list[str]]:
        """Return the files and folders in a folder, or below it, by name; hidden ones are left out.

        Raises:
            UserError: The folder cannot be listed.
        """
        from pyarrow.fs import FileSelector, FileType

        with self.reading(folder):
            system, base = _connect(self.root)
            infos = system.get_file_info(FileSelector(f"{base}/{folder}".rstrip("/") or "/", recursive=recursive))
            start = len(base.rstrip("/")) + 1
            found = sorted(((info.path[start:].split("/"), info) for info in infos), key=lambda pair: pair[0])
        named = [("/".join(parts), info) for parts, info in found if not any(part.startswith(".") for part in parts)]
        files = [File(path, info.size, info.mtime_ns) for path, info in named if info.type == FileType.File]
        return files, [path for path, info in named if info.type == FileType.Directory]

    @contextmanager
    def open(self, file: File) -> Iterator[Any]:
        """Open a file for reads anywhere (``pyarrow.NativeFile``); what fails in the block names it.

        Raises:
            UserError: The file is gone, has changed since it was listed, or cannot be read.
        """
        with self.reading(file.path):
            system, base = _connect(self.root)
            with system.open_input_file(f"{base}/{file.path}") as opened:
                if (size := opened.size()) != file.size:
                    raise ValueError(f"it has changed, {size} bytes instead of {file.size}")
                yield opened

    def read(self, file: File) -> bytes:
        """Return a file's bytes."""
        with self.open(file) as opened:
            return opened.read()

    def find(self, path: str) -> bytes | None:
        """Return the bytes of a file that others may change or remove meanwhile; None where there is none.

        Args:
            path: Below the place's root; empty for the root itself, where that is a file.
        """
        from pyarrow.fs import FileType

        with self.reading(path):
            system, base = _connect(self.root)
            file = f"{base}/{path}".rstrip("/")
            if system.get_file_info(file).type != FileType.File:
                return None
            with suppress(FileNotFoundError), system.open_input_file(file) as opened:
                return opened.read()
            return None

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        from pyarrow.fs import FileType

        with self.reading(path):
            system, base = _connect(self.root)
            return system.get_file_info(f"{base}/{path}".rstrip("/")).type == FileType.File

    def write(self, path: str, content: bytes) -> None:
        """Write a file and the folders above it; readers see it whole, or what was there before.

        Raises:
            UserError: It cannot be written.
        """
        with self.writing(path):
            system, base = _connect(self.root)
            file = f"{base}/{path}"
            in_place = is_uri(self.root) and urlsplit(self.root).scheme in OBJECT_STORES
            sent = file if in_place else f"{file}.{uuid.uuid4().hex}.partial"
            if not in_place:
                system.create_dir(sent.rpartition("/")[0], recursive=True)
            # Closing is what makes an object appear: never after a write that failed.
            stream = system.open_output_stream(sent)
            stream.write(content)
            stream.close()
            if not in_place:
                system.move(sent, file)

    def delete(self, path: str) -> None:
        """Remove a file, if it is there.

        Raises:
            UserError: It cannot be removed.
        """
        with self.writing(path):
            system, base = _connect(self.root)
            with suppress(FileNotFoundError):
                system.delete_file(f"{base}/{path}")

    def ahead(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield ``function(item)`` in order; on a network, threads work a few items ahead."""
        if self.is_local:
            yield from map(function, items)
            return
        waiting: deque[Future[R]] = deque()
        pool = ThreadPoolExecutor(THREADS)
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also where the reader stops early
            pool.shutdown(wait=False, cancel_futures=True)

    def where(self, path: str = "") -> str:
        """Return a file's full name, for messages."""
        return f"{shown(self.root).rstrip('/')}/{path}".rstrip("/") or "/"

    def reading(self, path: str = "") -> AbstractContextManager[None]:
        """Say in one line which file or folder cannot be read, and why."""
        return self._saying(path, "read")

    def writing(self, path: str = "") -> AbstractContextManager[None]:
        """Say in one line which file cannot be written, and why."""
        return self._saying(path, "written")

    @contextmanager
    def _saying(self, path: str, done: str) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, ArrowException) as error:
            reason = first_line(error).replace(self.root, shown(self.root))
            raise UserError(f"{self.where(path)} cannot be {done}: {reason}") from None


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return ``function`` of every item, in order, found by threads; the first error ends it."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@lru_cache
def _connect(root: str) -> tuple[Any, str]:
    """Return the file system and the folder in it."""
    from pyarrow.fs import FileSystem, LocalFileSystem

    return FileSystem.from_uri(root) if is_uri(root) else (LocalFileSystem(), root)
