"""A command of the project under way on a cluster, in the view of who typed it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_node import RayHead
from runs import environment

LIMIT_S = 600
IMPATIENT = """
import sys
from bdkd_dist.launch import ray_train, vigil

ray_train.RESIZE_EVERY_S = 5
vigil.SAY_EVERY_S = 5
if sys.argv[1] == "tune":
    from bdkd_dist.launch.tune import ledger

    ledger.WAITING_SAID_EVERY_S = 5
from bdkd_dist.cli import main

main()
"""


class Driver:
    """A training command under way on the cluster, and what it has said."""

    def __init__(self, head: RayHead, arguments: list[str], log: Path):
        self.log = log
        impatient = [sys.executable, "-c", IMPATIENT, *arguments[1:], "--address", head.gcs]
        with log.open("a") as out:
            self.process = subprocess.Popen(
                impatient,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment() | head.environment,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, moment: Callable[[], bool]) -> None:
        """Wait for a moment inside the run."""
        deadline_s = time.monotonic() + LIMIT_S
        while not moment():
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.said}"
            assert time.monotonic() < deadline_s, f"the moment never came\n{self.said}"
            time.sleep(0.02)

    def until_said(self, words: str, after: int = 0) -> None:
        """Wait until it says something, behind so many characters."""
        self.until(lambda: words in self.said[after:])

    def ends(self, status: int = 0) -> str:
        """Wait for the end, check its status and that no trace was shown; return all that was said."""
        self.process.wait(LIMIT_S)
        assert self.process.returncode == status, self.said
        assert "Traceback" not in self.said, self.said
        return self.said


@contextmanager
def driving(head: RayHead, arguments: list[str], folder: Path) -> Iterator[Driver]:
    """Start a training command; its workers' nodes may join meanwhile, for it waits for them."""
    driver = Driver(head, arguments, folder / "driver.log")
    try:
        yield driver
    finally:
        if driver.process.poll() is None:
            os.killpg(driver.process.pid, signal.SIGKILL)
            driver.process.wait()
