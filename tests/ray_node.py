"""Real Ray nodes on loopback addresses of this machine, each with ports of its own, behind a token.

Where the machine lets a test mount, a node that joins does not see what others keep in the user's folder of their own
temporary folders, as on a machine of its own.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
import runs

from bdkd_dist.data.node_folder import node_folder

START_WITHIN_S = 240
START_ATTEMPTS = 3
TOKEN = "0123456789abcdef" * 4


@dataclass
class RayHead:
    """A head node that runs."""

    gcs: str
    """HOST:PORT."""
    dashboard: str
    """http://HOST:PORT"""
    folder: Path
    """Ray's own files."""
    environment: dict[str, str]
    """For commands that speak to it."""


@contextmanager
def head(address: str, num_cpus: int = 2, **extra: str) -> Iterator[RayHead]:
    """Start a head node; all that runs on it, and what Ray wrote, ends with it.

    Args:
        address: On the loopback network.
        num_cpus: That it says it has.
        extra: Of its environment.
    """
    # Ray's sockets lie in it, whose paths must be short.
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        _head(Path(folder), address, num_cpus, extra) as started,
    ):
        yield started


@contextmanager
def _head(folder: Path, address: str, num_cpus: int, extra: dict[str, str]) -> Iterator[RayHead]:
    (folder / "token").write_text(TOKEN)
    environment = runs.environment() | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as `source .venv/bin/activate` has it
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
    }
    gcs, client, dashboard = free_port(address), free_port(address), free_port("127.0.0.1")
    arguments = [
        *("--head", f"--port={gcs}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--num-cpus={num_cpus}"),
    ]
    url = f"http://127.0.0.1:{dashboard}"
    ready = lambda: _answers(url)  # noqa: E731
    with _started(folder / "head.log", address, arguments, environment | extra, ready=ready) as pid:
        yield RayHead(f"{address}:{gcs}", url, folder, environment)
        os.killpg(pid, signal.SIGKILL)  # nobody needs the half minute in which it would wait for what still runs


@contextmanager
def joined(to: RayHead, address: str, *arguments: str, **extra: str) -> Iterator[int]:
    """Start a further node, which has one core of this machine, and yield the process id of its raylet."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(address.rpartition(".")[2]) % len(cores)]
    log = to.folder / f"{address}.log"
    arguments = (f"--address={to.gcs}", "--num-cpus=1", *arguments)
    with _started(log, address, [*arguments], to.environment | extra, {core}) as pid:
        children = subprocess.run(["pgrep", "-P", str(pid), "raylet"], capture_output=True, text=True, check=True)
        yield int(children.stdout)


@contextmanager
def all_joined(to: RayHead, addresses: Sequence[str], **extra: str) -> Iterator[list[int]]:
    """Start several nodes at once; see :func:`joined`."""
    with ExitStack() as stack, ThreadPoolExecutor(len(addresses)) as pool:
        yield list(pool.map(lambda address: stack.enter_context(joined(to, address, **extra)), addresses))


def free_port(address: str) -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _started(
    log: Path,
    address: str,
    arguments: list[str],
    environment: dict[str, str],
    cores: set[int] | None = None,
    ready: Callable[[], bool] = lambda: True,
) -> Iterator[int]:
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"),
        *(f"--node-ip-address={address}", "--min-worker-port=0", "--max-worker-port=0"),
        f"--dashboard-agent-listen-port={free_port(address)}",
        *arguments,
    ]
    if cores is not None:
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *_apart(), *command]
    for attempt in range(START_ATTEMPTS):
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=log.parent, start_new_session=True
            )
        try:
            deadline_s = time.monotonic() + START_WITHIN_S
            while (ended := process.poll()) is None and not ("Ray runtime started" in log.read_text() and ready()):
                assert time.monotonic() < deadline_s, f"ray start hangs\n{log.read_text()}"
                time.sleep(0.2)
            if ended is not None:
                # Ray gives its own processes half a minute to start, which on a busy machine may be too little.
                assert attempt < START_ATTEMPTS - 1, f"ray start ended with {ended}\n{log.read_text()}"
                continue
            yield process.pid
            return
        finally:
            _end(process)


def _apart() -> list[str]:
    """Return what to put before a command that is to have the user's folder to itself."""
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        return []
    node_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    own = 'mount -t tmpfs -o mode=700 tmpfs "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", own, str(node_folder())]


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()  # the node leaves its cluster, and its processes end
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20).ok
    except requests.exceptions.RequestException:
        return False
