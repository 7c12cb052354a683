"""Slurm on this machine, for tests: stand-in ``srun`` and ``scontrol`` start a job's tasks on loopback addresses.

Each node has an address (``hostname -I``) and a ``TMPDIR`` of its own; the Ray that runs on them is the real one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sbatch"
VENV = Path(sys.executable).parent
MARK = "BDKD_TEST_SLURM_JOB"

SRUN = r"""
import os, signal, subprocess, sys

KNOWN = "export nodes ntasks ntasks-per-node cpus-per-task nodelist exclude kill-on-bad-exit wait no-kill".split()
options, command = {}, sys.argv[1:]
while command[0].startswith("--"):
    name, _, value = command.pop(0)[2:].partition("=")
    if name not in KNOWN:
        sys.exit(f"srun: unrecognized option '--{name}'")
    options[name] = value
nodes = options.get("nodelist", os.environ["SLURM_JOB_NODELIST"]).split(",")
nodes = [node for node in nodes if node not in options.get("exclude", "").split(",")]
if not int(options["nodes"]) == int(options["ntasks"]) == len(nodes):
    sys.exit(f"srun: {options} does not fit {nodes}")
tasks = []
for node in nodes:
    folder = os.path.join(os.environ["SLURM_TEST_FOLDER"], node)
    os.makedirs(folder, exist_ok=True)
    environment = os.environ | {"SLURMD_NODENAME": node, "TMPDIR": folder}
    tasks.append(subprocess.Popen(command, env=environment, start_new_session=True))

def forward(number, frame):
    for task in tasks:
        task.send_signal(number)

signal.signal(signal.SIGTERM, forward)
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """
import sys

assert sys.argv[1:3] == ["show", "hostnames"], sys.argv
print(*sys.argv[3].split(","), sep="\\n")
"""
HOSTNAME = """
import os, sys

node = os.environ["SLURMD_NODENAME"]
print(os.environ[f"SLURM_TEST_ADDRESS_{node}"] if sys.argv[1:] == ["-I"] else node)
"""


class Slurm:
    """An allocation of nodes, by name and ``hostname -I``, and a checkout that its job was submitted from."""

    def __init__(self, folder: Path, addresses: dict[str, str]):
        self.folder, self.checkout, self.bin = folder, folder / "checkout", folder / "bin"
        self.mark = uuid.uuid4().hex
        (self.checkout / ".venv/bin").mkdir(parents=True)
        self.bin.mkdir()
        for name, source in (("srun", SRUN), ("scontrol", SCONTROL), ("hostname", HOSTNAME)):
            _executable(self.bin / name, f"#!{sys.executable}{source}")
        for name in ("python", "ray", "bdkd"):
            self.command(name, f'exec {VENV / name} "$@"')
        self.spooled = folder / "slurm_script"  # as Slurm runs a copy of what was submitted
        shutil.copy(SCRIPT, self.spooled)
        self.environment = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(self.checkout),
            "SLURM_JOB_ID": str(uuid.uuid4().int % 10**6),
            "SLURM_JOB_NODELIST": ",".join(addresses),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_TEST_FOLDER": str(folder),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            MARK: self.mark,
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
            self.environment.pop(name, None)
        self.environment |= {f"SLURM_TEST_ADDRESS_{node}": address for node, address in addresses.items()}

    def command(self, name: str, script: str) -> None:
        """Put a command into the checkout's environment."""
        _executable(self.checkout / ".venv/bin" / name, f"#!/usr/bin/env bash\n{script}\n")

    def sbatch(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the job; stdout is the command's, stderr the script's."""
        return subprocess.Popen(
            ["bash", str(self.spooled), *arguments],
            env=self.environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def worker_logs(self, node: str) -> list[Path]:
        """Return what Ray Train's workers on a node wrote of themselves."""
        return list(self.folder.glob(f"{node}/ray-*/session_*/logs/train/*app-worker*"))

    def left_running(self) -> list[str]:
        """Return the command lines of the job's processes that live."""
        return [" ".join(process.cmdline())[:200] for process in self._processes()]

    def kill(self) -> None:
        """Kill what is left."""
        for process in self._processes():
            process.kill()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@contextmanager
def slurm(addresses: dict[str, str]) -> Iterator[Slurm]:
    """Yield an allocation; whatever a test leaves of it is killed."""
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: Ray's sockets lie in it
    allocation = Slurm(folder, addresses)
    try:
        yield allocation
    finally:
        allocation.kill()
        shutil.rmtree(folder, ignore_errors=True)


def finish(job: subprocess.Popen[str], timeout_s: float = 400) -> tuple[int, str, str]:
    """Wait for the job's end; return its status, stdout and stderr."""
    output, errors = job.communicate(timeout=timeout_s)
    return job.returncode, output, errors


def _executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
