"""What one node of a cluster says of itself. It travels to the node by value: the node may lack this package.

So nothing but the standard library is imported where it can be missed, and plain values are returned.
"""

import importlib
import importlib.metadata
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

VISIBLE_WITHIN_S = 10.0
"""Network file systems show a new file to other nodes after some seconds."""
MODULES = ("torch", "ray", "ffcv")


class NodeProbe:
    """An actor that is pinned to a node."""

    def report(self) -> dict[str, Any]:
        """Return versions (or why there is none), free room and GPUs."""
        found: dict[str, Any] = {"python": platform.python_version()}
        for name in MODULES:
            found[name] = self._version(name)
        found["bdkd-dist"], found["source"], found["decoder"] = self._package()
        found["tmp"] = tempfile.gettempdir()
        found["tmp_free_bytes"] = shutil.disk_usage(found["tmp"]).free
        shared = Path("/dev/shm")
        found["shm_bytes"] = shutil.disk_usage(shared).total if shared.is_dir() else 0
        found["gpus"] = self._gpus()
        return found

    def clock(self) -> float:
        """Return the node's time in seconds."""
        return time.time()

    def storage(self, root: str, name: str, token: str) -> str:
        """See that a place is the driver's, and write to it.

        Args:
            root: An absolute path or a URI.
            name: Of the file that the driver has written ``token`` into; this node writes one named ``name.<its id>``.
            token: What stands there.

        Returns:
            What is wrong; empty where nothing is.
        """
        try:
            from bdkd_dist.data.sources.storage import Place

            if "://" not in root and not Path(root).is_dir():
                return "the folder is not there"
            if not holds(Place(root), name, token):
                return "it is another place than the driver's"
            import ray

            Place(root).write(f"{name}.{ray.get_runtime_context().get_node_id()}", token.encode())
        except Exception as error:  # told, whatever a store says
            return next(iter(str(error).splitlines()), "") or type(error).__name__
        return ""

    @staticmethod
    def _version(name: str) -> str | None:
        """Return a module's version, None where it is absent, and what it says where it does not load."""
        try:
            module = importlib.import_module(name)
            # torch says which build it is, the package's metadata does not.
            return str(module.__version__) if name == "torch" else importlib.metadata.version(name)
        except ModuleNotFoundError as error:
            return None if error.name == name else f"does not load: {error}"
        except Exception as error:
            return f"does not load: {error}".splitlines()[0]

    @staticmethod
    def _package() -> tuple[str | None, str | None, bool]:
        try:
            import bdkd_dist
            from bdkd_dist.data import jpeg
            from bdkd_dist.records.environment import PACKAGE, source_hash

            return bdkd_dist.__version__, source_hash(PACKAGE), jpeg.available()
        except Exception:  # absent, or too old to have these
            return None, None, False

    @staticmethod
    def _gpus() -> int:
        try:
            import torch

            return torch.cuda.device_count()
        except Exception:
            return 0


def holds(place: Any, name: str, token: str) -> bool:
    """Return whether a file that another node wrote arrives with this content."""
    deadline_s = time.monotonic() + VISIBLE_WITHIN_S
    while (content := place.find(name)) is None and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return bool(content == token.encode())
