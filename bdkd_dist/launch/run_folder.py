"""A run's folder: what lies where in it, and whose it is."""

import atexit
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import count
from pathlib import Path
from urllib.parse import unquote, urlsplit

import filelock
import yaml

from bdkd_dist import config
from bdkd_dist.config import Recipe
from bdkd_dist.data.node_folder import node_folder
from bdkd_dist.data.sources.storage import Place
from bdkd_dist.engine.checkpoint import checkpoints_among
from bdkd_dist.engine.patience import patiently
from bdkd_dist.errors import UnfitNode, UserError
from bdkd_dist.files import atomic_write
from bdkd_dist.launch.lease import Lease
from bdkd_dist.records.environment import write_environment
from bdkd_dist.uris import is_uri

SEEN_WITHIN_S = 10.0
"""How long a network file system may take to show one node what another wrote."""


class RunFolder:
    """The folder ``run.storage/run.name``: a path, which is worked in, or a URI.

    What is at a URI is worked on in a folder of this process's own and pushed from there.

    Args:
        where: The run's folder; ``file://…`` is a path.

    Attributes:
        place: Where the run lies, for all who read and write it there.
        where: Its absolute path or URI.
    """

    def __init__(self, where: str | Path):
        if (parts := urlsplit(str(where))).scheme == "file":
            where = unquote(parts.path)
        self.place = Place.of(str(where), "run.storage")
        self.where = self.place.root
        self.is_remote = is_uri(self.where)
        self._given = Path(where).expanduser()
        self.unsent = False
        """Whether something is worked on here that did not reach the URI: it is not discarded then."""

    @classmethod
    def of(cls, recipe: Recipe) -> "RunFolder":
        """Return the recipe's folder; nothing is made, and no network asked."""
        storage = recipe.run.storage
        if is_uri(storage):
            return cls((Place.of(storage, "run.storage") / recipe.run.name).root)
        return cls(Path(storage) / recipe.run.name)

    def __truediv__(self, name: str) -> "RunFolder":
        """Return a folder below, of the same layout."""
        return RunFolder((self.place / name).root if self.is_remote else self._given / name)

    def __str__(self) -> str:
        return self.name()

    def name(self, path: Path | None = None) -> str:
        """Return what a person calls the folder, or a file that is worked on here."""
        if not self.is_remote:
            return str(path or self._given)
        return self.place.where("" if path is None else path.relative_to(self.path).as_posix())

    @cached_property
    def path(self) -> Path:
        """Where this process works: the folder itself, or one of its own for what is at a URI."""
        if not self.is_remote:
            return self._given
        folder = _working_folder(self.place)
        atexit.register(self.discard)
        return folder

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Versions, code and machine of each start."""
        return self.path / "environment.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """The folder of diagrams."""
        return self.path / "figures"

    @property
    def predictions(self) -> Path:
        """The folder of per-sample predictions."""
        return self.path / "predictions"

    @property
    def results(self) -> Path:
        """The results, written last."""
        return self.path / "results.json"

    @property
    def tensorboard(self) -> Path:
        """The folder of event files."""
        return self.path / "tensorboard"

    @property
    def above(self) -> str:
        """What a person calls the folder of runs."""
        return self.place.parent.where() if self.is_remote else str(self.path.parent)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: results are written last."""
        return self.place.exists("results.json")

    @property
    def begun(self) -> bool:
        """Whether there is something of a run to lose."""
        return self.finished or bool(self.kept())

    def kept(self) -> list[str]:
        """Return the names of the checkpoints that lie in the run's place, oldest first."""
        folder = self.place / "checkpoints"
        return checkpoints_among(file.path for file in folder.listing()[0]) if folder.is_folder() else []

    def check_owner(self, recipe: Recipe) -> None:
        """Raise UserError where the folder holds a run that would compute something else, or foreign files."""
        if self.place.exists("recipe.yaml"):
            if self.begun:
                for key, there, here in config.differences(self.read_recipe(), recipe):
                    raise UserError(
                        f"run.name={recipe.run.name}: {self} belongs to another recipe ({key} is {there} there, "
                        f"{here} here); choose another run.name"
                    )
        elif self.place.is_folder() and any(map(_foreign, self._names())):
            raise UserError(f"run.name={recipe.run.name}: {self} exists and holds no run; choose another run.name")

    def _names(self) -> list[str]:
        files, folders = self.place.listing()
        return [*(file.path for file in files), *folders]

    def describe(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        """Write what the run is: its resolved recipe, and the versions, code and machine of this start."""
        self.fetch("environment.json", say=say)
        atomic_write(self.recipe, recipe.to_yaml().encode())
        write_environment(self.environment)
        self.push(self.recipe, self.environment, say=say)

    def read_recipe(self) -> Recipe:
        """Return the resolved recipe that is kept here."""
        if (content := self.place.find("recipe.yaml")) is None:
            raise UserError(f"{self} is not a run folder (it holds no recipe.yaml)")
        try:
            return config.from_dict(yaml.safe_load(content))
        except (UserError, yaml.YAMLError, TypeError, AttributeError) as error:
            raise UserError(f"{self}/recipe.yaml does not fit this version: {' '.join(str(error).split())}") from None

    def check_seen(self, recipe: Recipe) -> None:
        """See that this node sees the folder in which another one keeps the recipe's run.

        Args:
            recipe: As rank 0 has it; paths in it may have been made absolute.

        Raises:
            UnfitNode: It does not.
        """
        if self.sees("recipe.yaml"):
            differences = config.differences(self.read_recipe(), recipe)
            if all(key == "models.teacher_checkpoint" for key, _, _ in differences):
                return
        raise UnfitNode(
            f"run.storage={Place.of(recipe.run.storage).where()}: the run that was begun there is not seen; "
            "give a path that all nodes share, or a URI (s3://…)"
        )

    def sees(self, name: str) -> bool:
        """Return whether a file is here that another node wrote, which may be told so a little later."""
        until = time.monotonic() + SEEN_WITHIN_S
        while not self.place.exists(name):
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
        return True

    @contextmanager
    def locked(self, say: Callable[[str], None] = print) -> Iterator[None]:
        """Hold the folder against a second process; the lock dies with its holder, the lease of a URI soon after.

        Args:
            say: Told one line when there is something to wait for.
        """
        if self.is_remote:
            lease = Lease(self.place, say)
            lease.acquire()
            try:
                yield
            finally:
                lease.release()
            return
        lock = filelock.FileLock(self.path / "run.lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{self.path} is in use by another process; choose another run.name") from None
        except OSError as error:
            raise UserError(f"run.storage: {self.path}: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()

    def fetch(self, *names: str, say: Callable[[str], None] = print) -> None:
        """Bring files from the run's URI here, in place of what lies here; those that are not there are none here."""
        if not self.is_remote:
            return
        for name in names:
            content = patiently(lambda name=name: self.place.find(name), say)  # type: ignore[misc]
            path = self.path / name
            path.unlink(missing_ok=True)
            if content is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def push(self, *paths: Path, say: Callable[[str], None] = print) -> None:
        """Bring files, and all files of folders, that were written here to the run's URI, in the order given."""
        if not self.is_remote:
            return
        for path in paths:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                name, content = file.relative_to(self.path).as_posix(), file.read_bytes()
                try:
                    patiently(lambda name=name, content=content: self.place.write(name, content), say)  # type: ignore[misc]
                except BaseException as error:
                    self.unsent = True
                    if isinstance(error, UserError):
                        raise UserError(f"{error}; what could not be sent lies in {self.path}") from None
                    raise

    def discard(self) -> None:
        """Remove what is worked on here, all of which lies at the run's URI."""
        if self.is_remote and "path" in vars(self) and not self.unsent:
            shutil.rmtree(self.path, ignore_errors=True)


def _foreign(name: str) -> bool:
    """Whether a file is none that a start which was killed leaves behind."""
    return name != "run.lock" and not name.endswith(".partial")


_held: list[filelock.BaseFileLock] = []
"""Locks of this process's working folders: they are its own until it ends."""


def _working_folder(place: Place) -> Path:
    """Return an empty folder that no other living process works in; what a dead one left there is dropped."""
    root = node_folder() / "runs"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise UserError(f"run.storage: {root}, where a run at a URI is worked on, is another user's; set TMPDIR")
    for number in count(1):
        folder = root / f"{place.name}-{number}"
        lock = filelock.FileLock(f"{folder}.lock", timeout=0)
        with suppress(filelock.Timeout):
            lock.acquire()
            break
    _held.append(lock)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder
