"""Files that are whole or absent, and stay so when the machine loses power; JSON that every reader accepts."""

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Replace ``path`` by ``content``: whoever reads it sees the old file or the new one, never a part.

    The file is written beside under a name that shares nothing with the final one, so nothing that looks for files
    by name (TensorBoard takes any ``*tfevents*``) reads a half-written one.

    Raises:
        OSError: The folder is missing or full; ``path`` is as it was.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it for folders; the names are in place all the same
            raise
    finally:
        os.close(descriptor)


def json_text(tree: Any, indent: int | None = None) -> bytes:
    """Return JSON and a line's end: floats read back exactly, nan and infinities, which JSON lacks, as null."""
    return json.dumps(_finite(tree), indent=indent, allow_nan=False).encode() + b"\n"


def with_nan(tree: Any) -> Any:
    """Return what was read of :func:`json_text`'s with nan for null."""
    if isinstance(tree, dict):
        return {key: with_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_nan(value) for value in tree]
    return math.nan if tree is None else tree


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
