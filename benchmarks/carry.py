"""A study's state as few small files, to go on from on another machine.

Of finished runs it holds what tables and comparisons need, of others what going on needs, and of ce's teachers those
from which kd has not learnt yet. All of it is one archive, compressed (bytes of float32 numbers apart from each other:
their exponents repeat) and cut into parts.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from bdkd_dist.engine.checkpoint import load

PART_BYTES = 15 * 2**20
KEPT_OF_FINISHED = ("results.json", "recipe.yaml", "environment.json", "metrics.jsonl", "predictions/*")
CHECKPOINTS = "checkpoints/step-*.pt"
SIZE_BYTES, DIGEST_BYTES, WORD = 8, 32, 4


def pack(out: Path, folder: Path, teacher_wanted: Callable[[Path], bool]) -> list[Path]:
    """Write the parts of a study, in place of those that were there, and return their paths.

    Args:
        out: Its folder of pairs, which hold run folders; what lies beside those (data, logs, searches) is left out.
        folder: Where to.
        teacher_wanted: Whether a finished run's teacher is still needed.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for recipe in sorted(out.glob("*/*/recipe.yaml")):
            run = recipe.parent
            done = (run / "results.json").is_file()
            for path in _kept_of_finished(run) if done else _kept_of_unfinished(run):
                tar.add(path, path.relative_to(out).as_posix())
            if done and teacher_wanted(run):
                newest = sorted(run.glob(CHECKPOINTS))[-1]
                content = io.BytesIO()
                torch.save({"networks": {"teacher": load(newest)["networks"]["teacher"]}}, content)
                entry = tarfile.TarInfo(newest.relative_to(out).as_posix())
                entry.size = len(content.getbuffer())
                tar.addfile(entry, io.BytesIO(content.getvalue()))
    raw = archive.getvalue()
    whole = len(raw).to_bytes(SIZE_BYTES, "big") + hashlib.sha256(raw).digest() + _compressed(raw)
    folder.mkdir(parents=True, exist_ok=True)
    for former in folder.glob("part-*"):
        former.unlink()
    paths = []
    for number, start in enumerate(range(0, len(whole), PART_BYTES)):
        paths.append(folder / f"part-{number:02d}")
        paths[-1].write_bytes(whole[start : start + PART_BYTES])
    return paths


def unpack(folder: Path, out: Path) -> None:
    """Restore a study from its parts.

    Raises:
        SystemExit: A part is missing or altered.
    """
    whole = b"".join(path.read_bytes() for path in sorted(folder.glob("part-*")))
    size, digest = int.from_bytes(whole[:SIZE_BYTES], "big"), whole[SIZE_BYTES : SIZE_BYTES + DIGEST_BYTES]
    try:
        raw = _decompressed(whole[SIZE_BYTES + DIGEST_BYTES :], size)
    except OSError:
        raw = b""
    if hashlib.sha256(raw).digest() != digest:
        raise SystemExit(f"{folder}: a part of the study is missing or altered")
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        tar.extractall(out, filter="data")


def _kept_of_finished(run: Path) -> Iterator[Path]:
    for pattern in KEPT_OF_FINISHED:
        yield from sorted(run.glob(pattern))


def _kept_of_unfinished(run: Path) -> Iterator[Path]:
    older = sorted(run.glob(CHECKPOINTS))[:-1]
    yield from (path for path in sorted(run.rglob("*")) if path.is_file() and path not in older)


def _compressed(raw: bytes) -> bytes:
    """Compress bytes by their place in words of four; a tar's length and its files' places are multiples of that."""
    words = np.frombuffer(raw, np.uint8).reshape(-1, WORD)
    return pa.compress(np.ascontiguousarray(words.T), codec="zstd", asbytes=True)


def _decompressed(content: bytes, size: int) -> bytes:
    planes = np.frombuffer(pa.decompress(content, size, codec="zstd"), np.uint8).reshape(WORD, -1)
    return np.ascontiguousarray(planes.T).tobytes()
