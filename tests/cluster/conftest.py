"""A head on which drivers run, without room for workers, and what runs on it are compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_node
import without_ray
from runs import TWO
from training_record import Record


@pytest.fixture(scope="package")
def ray_head() -> Iterator[ray_node.RayHead]:
    """The head node; workers find no CPU on it. It asks nodes often whether they live, and waits for busy ones."""
    asked = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "15"}
    with ray_node.head("127.0.0.2", num_cpus=0, **asked) as head:
        yield head


@pytest.fixture(scope="package")
def unbroken(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that no Ray started and nobody interrupted."""
    return without_ray.train_two_ranks(cache, tmp_path_factory.mktemp("unbroken"), *TWO)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """To be given to nodes as their environment."""
    return Record(tmp_path)
