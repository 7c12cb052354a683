"""The run that a user names, or one checkpoint of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bdkd_dist.data.sources.storage import Place
from bdkd_dist.engine.checkpoint import KEPT, Checkpoints, load
from bdkd_dist.errors import UserError
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.uris import is_uri


def find(run: str) -> tuple[RunFolder, str | None]:
    """Return the run folder, and the name of the checkpoint where that is named.

    Args:
        run: Path or URI of a run folder or of a file in its ``checkpoints``.
    """
    if not is_uri(run):
        path = Path(run).resolve()
        return (RunFolder(path.parent.parent), path.name) if path.is_file() else (RunFolder(path), None)
    place = Place.of(run, "RUN")
    return (RunFolder(place.parent.parent.root), place.name) if place.exists("") else (RunFolder(run), None)


def checkpoints(folder: RunFolder, name: str | None) -> Checkpoints:
    """Return the named checkpoint, else the newest ones, fetched from the run's URI where it lies at one.

    Raises:
        UserError: There is none yet.
    """
    names = [name] if name else folder.kept()[-KEPT:]
    if not names:
        raise UserError(f"{folder} holds no checkpoint yet")
    folder.fetch(*(f"checkpoints/{name}" for name in names))
    where = folder.checkpoints
    return _Only(where / name, folder.name) if name else Checkpoints(where, name=folder.name)


class _Only(Checkpoints):
    """One checkpoint, chosen by its path."""

    def __init__(self, path: Path, name: Callable[[Path], str]):
        super().__init__(path.parent, name=name)
        self._path = path

    def paths(self) -> list[Path]:
        return [self._path]

    def read_newest(self) -> tuple[dict[str, Any], bytes]:
        try:
            return load(self._path), b""
        except Exception as error:  # as Checkpoints: torch raises many kinds
            raise UserError(f"{self.name(self._path)} is not a whole checkpoint ({type(error).__name__})") from None
