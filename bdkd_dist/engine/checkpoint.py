"""Checkpoints: the whole run in one file, written beside and renamed, loaded with ``weights_only=True`` alone."""

import io
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bdkd_dist import distributed
from bdkd_dist.data.sources.storage import Place
from bdkd_dist.engine.patience import patiently
from bdkd_dist.errors import UnfitNode, UserError, first_line
from bdkd_dist.files import atomic_write

F = TypeVar("F")
FORMAT = 1
KEPT = 2
"""A fault while the newest is written or read leaves the one before."""


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's file, ``step-00001234.pt``; by name is by age."""
    return f"step-{step:08d}.pt"


def checkpoints_among(names: Iterable[str]) -> list[str]:
    """Return the names that are a checkpoint's, oldest first."""
    return sorted(name for name in names if name.startswith("step-") and name.endswith(".pt"))


class Checkpoints:
    """The folder of a run's checkpoints.

    Args:
        folder: Where they lie; made when the first is saved.
        warn: Says one line to the person.
        name: What a person calls a file or folder there.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = print, name: Callable[[Path], str] = str):
        self.folder = folder
        self.warn = warn
        self.name = name

    def paths(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return [self.folder / name for name in checkpoints_among(path.name for path in self.folder.iterdir())]

    def pause(self, seconds: float) -> None:
        """Wait before something that the disk refused is tried again."""
        time.sleep(seconds)

    def check(self) -> None:
        """Raise where this process may not write any more; here it always may."""

    def set_aside(self, damaged: Sequence[Path]) -> None:
        """Told of the damaged checkpoints that are newer than the one gone on from; here they stay, whosever they are.

        One that stays in a training run takes a whole one's place among the newest.
        """

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state of ``step`` so that it is whole or absent, and drop all but the newest ones.

        What the disk refuses is tried again for a while (see :func:`patiently`), each time after :meth:`check`.

        Raises:
            UserError: The disk is full or the folder not writable.
        """
        content = io.BytesIO()
        torch.save({"format": FORMAT, "step": step, **state}, content)
        path = self.folder / checkpoint_name(step)

        def write() -> None:
            self.check()
            _write(path, content.getbuffer())

        patiently(write, self.warn, self.pause)
        for old in self.paths()[:-KEPT]:
            with suppress(OSError):  # the next one does it
                old.unlink()
        return path

    def wait(self) -> None:
        """Wait until all that was saved lies where it belongs; here it does."""

    def load_newest(self, device: torch.device | None = None) -> dict[str, Any] | None:
        """Return the newest readable state, None where there is none yet; says so when it falls back.

        Rank 0 reads it and hands its bytes to the others: no two ranks can go on from different ones.

        Args:
            device: Where ranks exchange it; the CPU by default.

        Raises:
            UserError: There are checkpoints, and none is readable.
        """
        state, content = self.read_newest() if distributed.rank() == 0 else (None, b"")
        content = distributed.broadcast_bytes(content, device)
        return loads(content) if content and state is None else state

    def read_newest(self) -> tuple[dict[str, Any] | None, bytes]:
        """Return the newest readable state and the bytes it was read from; see :meth:`load_newest`."""
        paths = self.paths()
        found = _newest_whole(
            paths, lambda path: patiently(lambda: _read(path), self.warn, self.pause), self.name, self.warn
        )
        if found is None and paths:
            raise UserError(
                f"no checkpoint in {self.name(self.folder)} is readable; delete that folder to train from the start"
            )
        if found is None:
            return None, b""
        path, state, content = found
        self.set_aside(paths[paths.index(path) + 1 :])
        return state, content


def load_teacher(network: nn.Module, where: str | Path) -> None:
    """Give a network the weights of a finished teacher.

    Args:
        network: Of the same architecture and classes.
        where: Path or URI of a run folder (its newest whole checkpoint is read), of a checkpoint file, or of the file
            of a bare state dict.

    Raises:
        UnfitNode: There is no such checkpoint.
        UserError: It is not readable, or its teacher is another network.
    """
    place = Place.of(str(where), "models.teacher_checkpoint")
    said = f"models.teacher_checkpoint={place.where()}"
    try:
        state = _teacher_state(place)
        if state is not None:
            state = state["networks"]["teacher"] if "networks" in state else state
            known = network.state_dict().keys() & state.keys()
    except UserError as error:
        raise UserError(f"{said}: {error}") from None
    except Exception as error:  # torch raises many kinds for what is no checkpoint
        raise UserError(f"{said}: not a checkpoint ({type(error).__name__})") from None
    if state is None:
        raise UnfitNode(f"{said}: no whole checkpoint there (allowed: a run folder or a file)")
    if not known:
        raise UserError(f"{said}: holds no weights of a network like models.teacher")
    try:
        network.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"{said}: its teacher is another network, or for another number of classes, than models.teacher and "
            "data.num_classes say"
        ) from None


def _teacher_state(place: Place) -> dict[str, Any] | None:
    if (content := place.find("")) is not None:
        return loads(content)
    if not (checkpoints := place / "checkpoints").is_folder():
        return None
    files = {file.path: file for file in checkpoints.listing()[0]}
    names = checkpoints_among(files)
    found = _newest_whole(names, lambda name: checkpoints.read(files[name]), checkpoints.where, print)
    return None if found is None else found[1]


def _newest_whole(
    files: Sequence[F], read: Callable[[F], bytes], name: Callable[[F], str], warn: Callable[[str], None]
) -> tuple[F, dict[str, Any], bytes] | None:
    """Return the last file that is whole, its state and its bytes, saying which ones are not."""
    for file in reversed(files):
        content = read(file)
        try:
            return file, loads(content), content
        except Exception as error:  # torch raises many kinds for a cut or altered file
            warn(f"{name(file)} is not a whole checkpoint ({type(error).__name__}); falling back to the one before")
    return None


def _write(path: Path, content: memoryview) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob("*.partial"):  # of killed processes, and of attempts given up for lost
            leftover.unlink(missing_ok=True)
        atomic_write(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({first_line(error)}); the checkpoint before it is kept") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state on the CPU; tensors and plain values only, so no code in it can run."""
    return torch.load(path, map_location="cpu", weights_only=True)


def loads(content: bytes) -> dict[str, Any]:
    """Return the state whose file has this content; see :func:`load`."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
