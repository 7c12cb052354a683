"""A head on which drivers run, without room for workers, and what runs on it are compared with."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray_node
import two_ranks
from training_record import Record


@pytest.fixture(scope="package")
def ray_head() -> Iterator[ray_node.RayHead]:
    """The head node; workers find no CPU on it. It asks nodes often whether they live, and waits for busy ones."""
    asked = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "15"}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray"))
        yield stack.enter_context(ray_node.head(Path(folder), "127.0.0.2", 0, **asked))


@pytest.fixture(scope="package")
def unbroken(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that no Ray started and nobody interrupted."""
    return two_ranks.train(cache, tmp_path_factory.mktemp("unbroken"))


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """To be given to nodes as their environment."""
    return Record(tmp_path)
