"""A run's folder: what lies where in it, and whose it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import yaml

from bdkd_dist import config
from bdkd_dist.config import Recipe
from bdkd_dist.errors import UserError


class RunFolder:
    """The folder ``run.storage/run.name``."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.predictions = path / "predictions"
        self.results = path / "results.json"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def of(cls, recipe: Recipe) -> "RunFolder":
        """Return the recipe's folder; nothing is made."""
        return cls(Path(recipe.run.storage).expanduser() / recipe.run.name)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: results are written last."""
        return self.results.is_file()

    @property
    def begun(self) -> bool:
        """Whether there is something of a run to lose."""
        return self.finished or any(self.checkpoints.glob("step-*.pt"))

    def check_owner(self, recipe: Recipe) -> None:
        """Raise UserError where the folder holds a run that would compute something else, or foreign files."""
        if self.recipe.is_file() and self.begun:
            for key, there, here in config.differences(self.read_recipe(), recipe):
                raise UserError(
                    f"run.name={recipe.run.name}: {self.path} belongs to another recipe ({key} is {there} there, "
                    f"{here} here); choose another run.name"
                )
        elif not self.recipe.is_file() and self.path.is_dir() and any(_foreign(child) for child in self.path.iterdir()):
            raise UserError(f"run.name={recipe.run.name}: {self.path} exists and holds no run; choose another run.name")

    def read_recipe(self) -> Recipe:
        """Return the resolved recipe that is kept here."""
        if not self.recipe.is_file():
            raise UserError(f"{self.path} is not a run folder (it holds no recipe.yaml)")
        try:
            return config.from_dict(yaml.safe_load(self.recipe.read_text()))
        except (UserError, yaml.YAMLError, TypeError, AttributeError) as error:
            raise UserError(f"{self.recipe} does not fit this version: {' '.join(str(error).split())}") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second process; the lock dies with its holder."""
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


def _foreign(path: Path) -> bool:
    """Whether a file is none that a start which was killed leaves behind."""
    return path.name != "run.lock" and not path.name.endswith(".partial")
