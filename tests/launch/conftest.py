"""A bucket for the tests of a folder, and processes that wait less long for it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import CREDENTIALS, Storage, serve

from bdkd_dist.launch import lease

QUICK = """
from bdkd_dist.engine import patience
from bdkd_dist.launch import lease

lease.REFRESH_S, lease.WATCH_S = 0.3, 3.0
patience.STORAGE_PATIENCE_S = {patience_s}
"""


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for key, value in CREDENTIALS.items():
            patch.setenv(key, value)
        yield server


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let processes started from here watch a lease for 3 s, and wait for a storage for as long as given."""

    def set_patience(seconds: float) -> None:
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site/sitecustomize.py").write_text(QUICK.format(patience_s=seconds))

    set_patience(120)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setattr(lease, "REFRESH_S", 0.1)
    monkeypatch.setattr(lease, "WATCH_S", 3.0)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    return set_patience
