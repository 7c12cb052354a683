"""What all tests, and the processes that they start, have in common."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# As in a terminal: in the background of a shell Ctrl-C is ignored, and what is started from here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("any", deadline=None)  # a busy machine is no failure
settings.load_profile("any")
# What a git hook, a CI or a cluster's shell tells programs is not meant for the tests' own repositories and nodes.
OF_THE_SHELL = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX")
OF_THE_SHELL += ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
OF_THE_SHELL += ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
for name in OF_THE_SHELL:
    os.environ.pop(name, None)
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", "127.0.0.0/8", "127.0.0.1")))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data sets, made once for all tests."""
    return tmp_path_factory.mktemp("cache")
