"""This user's own folder on a node, for copies and what else a process keeps for itself."""

import getpass
import os
import tempfile
from pathlib import Path


def node_folder(root: str | Path | None = None) -> Path:
    """Return the folder; it need not be there.

    Args:
        root: Where; by default in the node's temporary folder (``TMPDIR``).
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return Path(root or tempfile.gettempdir()) / f"bdkd-dist-{user}"
