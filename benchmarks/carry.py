"""A study's state as few small files, to go on from on another machine.

Of finished runs it holds what tables and comparisons need, of others what going on needs, of ce's teachers those from
which kd has not learnt yet, and of searches what they found. All of it is one archive, compressed (bytes of float32
numbers apart from each other: their exponents repeat) and cut into parts.

The parts of one archive are a set: `part-SERIAL-DIGEST-01-of-03`. A former set goes when the next one is whole, so that
there is a whole one at any moment; a study's folder keeps the digest of the set that holds its state.
"""

import hashlib
import io
import re
import shutil
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml

from bdkd_dist.engine.checkpoint import load
from bdkd_dist.files import sync

PART_BYTES = 15 * 2**20
PART = re.compile(r"part-(?P<serial>\d+)-(?P<digest>[0-9a-f]{16})-\d+-of-\d+")
STAMP = "carried.txt"
RESULTS, FOUND = "*/*/results.json", "*/*/best.yaml"
KEPT_OF_FINISHED = ("results.json", "recipe.yaml", "environment.json", "metrics.jsonl", "predictions/*")
CHECKPOINTS = "checkpoints/step-*.pt"
SIZE_BYTES, WORD = 8, 4


def pack(out: Path, folder: Path, teacher_wanted: Callable[[Path], bool]) -> list[Path]:
    """Write the parts of a study, in place of those that were there, and return their paths.

    Args:
        out: Its folder of pairs, which hold run folders, of which some may be going on; what lies beside those (data,
            logs, searches but for what they found) is left out.
        folder: Where to.
        teacher_wanted: Whether a finished run's teacher is still needed.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in _kept(out, teacher_wanted):
            entry = tarfile.TarInfo(path.relative_to(out).as_posix())
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    whole = _compressed(archive.getvalue())
    digest, starts = _digest(whole), range(0, len(whole), PART_BYTES)
    serial = 1 + max((serial for serial, _ in _sets(folder)), default=0)
    name = f"part-{serial:04d}-{digest}"
    paths = [folder / f"{name}-{number:02d}-of-{len(starts):02d}" for number in range(1, len(starts) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for path, start in zip(paths, starts, strict=True):
            path.write_bytes(whole[start : start + PART_BYTES])
            sync(path)
        sync(folder)
    except OSError:  # a full disk: the former set stays
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    out.mkdir(parents=True, exist_ok=True)
    (out / STAMP).write_text(digest)
    for former in set(folder.glob("part-*")) - set(paths):
        former.unlink()
    return paths


def unpack(folder: Path, out: Path) -> None:
    """Make a study's folder what the newest whole set of parts holds, unless that set is the folder's own, or none is.

    Raises:
        SystemExit: A part is missing or altered, or the folder holds finished work that the parts do not.
    """
    newest = _newest(folder)
    if newest is None:
        return
    digest, whole = newest
    if (out / STAMP).is_file() and (out / STAMP).read_text() == digest:
        return
    fresh = out.with_name(f"{out.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(_decompressed(whole))) as tar:
        tar.extractall(fresh, filter="data")
    _name_teachers(fresh, out)
    (fresh / STAMP).write_text(digest)
    for path in sorted([*out.glob(RESULTS), *out.glob(FOUND)]):
        carried = fresh / path.relative_to(out)
        if not carried.is_file() or carried.read_bytes() != path.read_bytes():
            shutil.rmtree(fresh)
            raise SystemExit(
                f"{out} holds finished work that is not in {folder} ({path.relative_to(out).parent}); give another "
                f"--out, or delete {out} to go on without that work"
            )
    if out.exists():
        shutil.rmtree(out)
    fresh.rename(out)


def _sets(folder: Path) -> dict[tuple[int, str], list[Path]]:
    """Return the parts that are there, whole sets or not, by serial and digest."""
    sets = defaultdict(list)
    for path in sorted(folder.glob("part-*")):
        if named := PART.fullmatch(path.name):
            sets[int(named["serial"]), named["digest"]].append(path)
    return sets


def _newest(folder: Path) -> tuple[str, bytes] | None:
    """Return the digest and the bytes of the newest whole set; None where there are no parts."""
    for number, ((serial, digest), paths) in enumerate(sorted(_sets(folder).items(), reverse=True)):
        whole = b"".join(path.read_bytes() for path in paths)
        if _digest(whole) == digest:
            if number:
                print(f"{folder}: what follows set {serial} is not whole; going on from that", file=sys.stderr)
            return digest, whole
    if any(folder.glob("part-*")):
        raise SystemExit(f"{folder}: a part of the study is missing or altered")
    return None


def _digest(whole: bytes) -> str:
    return hashlib.sha256(whole).hexdigest()[:16]


def _name_teachers(fresh: Path, out: Path) -> None:
    """Name the teachers of runs, which lie beside them, by where they will lie: their path is a part of the recipe."""
    for path in fresh.glob("*/*/recipe.yaml"):
        recipe = yaml.safe_load(path.read_text())
        if teacher := recipe.get("models", {}).get("teacher_checkpoint"):
            recipe["models"]["teacher_checkpoint"] = str(out / path.parts[-3] / Path(teacher).name)
            path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def _kept(out: Path, teacher_wanted: Callable[[Path], bool]) -> Iterator[tuple[Path, bytes]]:
    """Yield what another machine needs."""
    for best in sorted(out.glob(FOUND)):
        yield best, best.read_bytes()
    for recipe in sorted(out.glob("*/*/recipe.yaml")):
        run = recipe.parent
        if not (run / "results.json").is_file():
            yield from _kept_of_unfinished(run).items()
            continue
        for pattern in KEPT_OF_FINISHED:
            yield from ((path, path.read_bytes()) for path in sorted(run.glob(pattern)))
        newest = max(run.glob(CHECKPOINTS), default=None)
        if newest is not None and teacher_wanted(run):
            content = io.BytesIO()
            torch.save({"networks": {"teacher": load(newest)["networks"]["teacher"]}}, content)
            yield newest, content.getvalue()


def _kept_of_unfinished(run: Path) -> dict[Path, bytes]:
    """Return the files of a run, the newest checkpoint before the records of it, as a run cut off leaves them."""
    while True:
        with suppress(FileNotFoundError):  # a run that goes on has replaced one meanwhile
            older = sorted(run.glob(CHECKPOINTS))[:-1]
            paths = [path for path in sorted(run.rglob("*")) if path.is_file() and path not in older]
            return {path: path.read_bytes() for path in paths if path.suffix != ".partial"}


def _compressed(raw: bytes) -> bytes:
    """Compress bytes by their place in words of four; a tar's length and its files' places are multiples of that.

    Their number comes first.
    """
    words = np.frombuffer(raw, np.uint8).reshape(-1, WORD)
    return len(raw).to_bytes(SIZE_BYTES, "big") + pa.compress(np.ascontiguousarray(words.T), codec="zstd", asbytes=True)


def _decompressed(whole: bytes) -> bytes:
    size = int.from_bytes(whole[:SIZE_BYTES], "big")
    planes = np.frombuffer(pa.decompress(whole[SIZE_BYTES:], size, codec="zstd"), np.uint8).reshape(WORD, -1)
    return np.ascontiguousarray(planes.T).tobytes()
