"""Fixtures that several test files share."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any", deadline=None)  # a busy machine is no failure
settings.load_profile("any")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data sets, made once for all tests."""
    return tmp_path_factory.mktemp("cache")
