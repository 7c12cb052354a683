"""What this machine lacks, and the command that mends it."""

import importlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from bdkd_dist.cores import usable_cores
from bdkd_dist.errors import first_line

FFCV_PACKAGES = "g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev"
FFCV_LOG = "ffcv-build.log"
"""In the environment, where FFCV did not build (cluster/setup_node.sh)."""
NEEDED_FREE_BYTES = 5 * 2**30
SHARED_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    subject: str
    status: Literal["ok", "optional", "missing"]
    """``optional``: everything works without it, something works better with it."""
    found: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look at this machine: versions, what imports, devices, room."""
    return [
        _python(),
        _package("torch", "make setup"),
        _torchvision(),
        _package("ray", "make setup"),
        _package("pyarrow", "make setup"),
        _package("tensorboard", "make setup"),
        _ffcv(),
        _decoder(),
        _devices(),
        _room(
            "cache",
            Path("~/.cache/bdkd-dist").expanduser(),
            NEEDED_FREE_BYTES,
            "set data.prepared to another disk",
        ),
        _room("run folder", Path("runs"), NEEDED_FREE_BYTES, "set run.storage to another disk"),
        _room(
            "shared memory",
            Path("/dev/shm"),
            SHARED_MEMORY_BYTES,
            "give /dev/shm 1 GiB or more (Ray, torch loader)",
        ),
    ]


def table(findings: list[Finding]) -> Table:
    """Return the findings as a table, the commands that mend in the last column."""
    marks = {"ok": "[green]ok[/]", "optional": "[yellow]optional[/]", "missing": "[red]missing[/]"}
    shown = Table(title="bdkd doctor")
    for heading in ("", "", "found", "to mend"):
        shown.add_column(heading, overflow="fold")
    for finding in findings:
        shown.add_row(finding.subject, marks[finding.status], finding.found, finding.mend)
    return shown


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Finding("python", "ok" if good else "missing", version, "" if good else "install Python 3.11 or newer")


def _package(
    name: str,
    mend: str,
    status: Literal["optional", "missing"] = "missing",
    without: str = "",
    use: Callable[[], object] | None = None,
) -> Finding:
    """Import it for good: a package that is installed but does not load is missing too."""
    try:
        importlib.import_module(name)
        if use is not None:
            use()
        return Finding(name, "ok", importlib.metadata.version(name))
    except ModuleNotFoundError as error:
        if error.name == name:
            return Finding(name, status, f"not installed{without}", mend)
        return Finding(name, status, f"does not load: {error}{without}", mend)
    except Exception as error:
        return Finding(name, status, f"does not load: {first_line(error)}{without}", mend)


def _ffcv() -> Finding:
    log = Path(sys.prefix, FFCV_LOG)
    failed = f" (it did not build: {log})" if log.is_file() else ""
    return _package("ffcv", _build_again(), status="optional", without=f"{failed}; its files are read without it")


def _decoder() -> Finding:
    from bdkd_dist.data import jpeg

    if jpeg.available():
        return Finding("native decoder", "ok", jpeg.LIBRARY.name)
    found = "not built; FFCV's or the torch loader give the same batches, more slowly"
    return Finding("native decoder", "optional", found, _build_again())


def _build_again() -> str:
    again = "rm -f .venv/.ready && make setup"
    if shutil.which("apt-get") is None:
        return f"install g++, pkg-config, OpenCV and libjpeg-turbo (with headers), then run: {again}"
    sudo = "sudo " if os.geteuid() != 0 else ""
    return f"{sudo}apt-get install -y {FFCV_PACKAGES} && {again}"


def _torchvision() -> Finding:
    def use_operator() -> None:
        import torch
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # a build for another torch imports, then fails here

    return _package("torchvision", "make setup", use=use_operator)


def _devices() -> Finding:
    import torch

    cores = f"{usable_cores()} CPU cores"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if gpus:
        return Finding("devices", "ok", f"{cores}, {len(gpus)} × {gpus[0]}")
    return Finding(
        "devices", "optional", f"{cores}, no GPU that torch sees", "a GPU and its driver, for larger recipes"
    )


def _room(subject: str, folder: Path, needed_bytes: int, mend: str) -> Finding:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding(subject, "missing", f"{folder} is not writable", mend)
    return Finding(subject, "ok", found) if free >= needed_bytes else Finding(subject, "optional", found, mend)
