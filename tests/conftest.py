"""Fixtures that several test files share."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# As in a terminal: in the background of a shell Ctrl-C is ignored, and what is started from here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("any", deadline=None)  # a busy machine is no failure
settings.load_profile("any")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data sets, made once for all tests."""
    return tmp_path_factory.mktemp("cache")
