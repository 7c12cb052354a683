"""Threads are shared out by the cores that a process may use, not by those of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bdkd_dist.cores import usable_cores

SAY = "from bdkd_dist.cores import usable_cores; print(usable_cores())"
CGROUP = Path("/sys/fs/cgroup")


def said(*before: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LOKY", "JOBLIB"))}
    done = subprocess.run([*before, sys.executable, "-c", SAY], capture_output=True, text=True, check=True, env=plain)
    return int(done.stdout)


def test_cores_that_a_process_is_not_allowed_do_not_count() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    assert said("taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))) == 1


@pytest.mark.parametrize("limit", ["80000 100000", "max 100000"])
def test_a_containers_limit_counts(limit: str) -> None:
    mount = f'mount -t tmpfs tmpfs {CGROUP} && echo "{limit}" > {CGROUP}/cpu.max && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a test show a process another container's limit")
    assert said(*inside) == (1 if limit.startswith("8") else len(os.sched_getaffinity(0)))
