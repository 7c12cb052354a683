"""Where and with what a run ran, so that a number can be traced to its code, packages and machine."""

import hashlib
import json
import os
import platform
import socket
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import bdkd_dist
from bdkd_dist.cores import usable_cores
from bdkd_dist.files import atomic_write, json_text

PACKAGE = Path(bdkd_dist.__file__).parent
PACKAGES = ("torchvision", "ray", "ffcv", "numpy", "numba", "pyarrow")
COMMAND_LIMIT_S = 20


def environment() -> dict[str, Any]:
    """Return versions, code and machine of this process; null for what is not there.

    No GPU is touched, and neither Ray nor FFCV imported. ``gpus`` are the machine's, whichever of them the run uses.
    """
    import torch

    # torch says which build it is, the package's metadata does not.
    packages = {"bdkd-dist": bdkd_dist.__version__, "torch": str(torch.__version__)}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages | {name: _version(name) for name in PACKAGES},
        "code": {"sha256": source_hash(PACKAGE), "git": git_state(PACKAGE)},
        "hardware": {
            "cpu": _cpu_model(),
            "usable_cores": usable_cores(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": _gpus(),
        },
    }


def write_environment(path: Path) -> None:
    """Append this process's environment to the JSON list at ``path``: a run that goes on may do so elsewhere."""
    starts = json.loads(path.read_text()) if path.is_file() else []
    atomic_write(path, json_text([*starts, environment()], indent=2))


def source_hash(package: Path) -> str:
    """Return the SHA-256 over names and contents of a package's Python files and recipes, in the order of names."""
    digest = hashlib.sha256()
    files = [*package.rglob("*.py"), *package.glob("recipes/*.yaml")]
    for name, path in sorted((path.relative_to(package).as_posix(), path) for path in files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def git_state(package: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout that a package lies in, and whether the package differs from it.

    None where there is no commit, or where the repository around the package does not track it (a virtual environment
    inside another project).
    """
    if _output("git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _output("git", "-C", str(package), "rev-parse", "--verify", "HEAD")
    changes = _output("git", "-C", str(package), "status", "--porcelain", "--", ".")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _gpus() -> list[dict[str, Any]]:
    """Ask the driver, not torch: torch would hold memory on the GPU for as long as the process lives."""
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits") or ""
    rows = [line.rpartition(",") for line in listed.splitlines()]
    return [
        {"name": name.strip(), "memory_bytes": int(mib) * 2**20 if mib.strip().isdigit() else None}
        for name, _, mib in rows
    ]


def _output(*command: str) -> str | None:
    """Return what a command prints, or None where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
