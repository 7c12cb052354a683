"""The Slurm script from end to end: real Ray on two addresses of this machine, under stand-ins of Slurm's commands."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SMALL, TWO
from slurm_cluster import Slurm, finish, slurm

TWO_NODES = {"n2": "192.0.2.7 127.0.0.2 fe80::1", "n3": "127.0.0.3"}  # the first is public: not to be taken
NOTHING_LEFT_WITHIN_S = 60
# The job's command: says what it sees of the cluster, and fails with a status of its own.
LOOK = r"""
import json, logging, os, sys, urllib.error, urllib.request
import psutil, ray

ray.init(log_to_driver=False, logging_level=logging.ERROR)
nodes = {node["NodeManagerAddress"]: node["Resources"].get("CPU") for node in ray.nodes() if node["Alive"]}
port = int(os.environ["RAY_ADDRESS"].rpartition(":")[2])
listening = [c.laddr for c in psutil.net_connections() if c.status == "LISTEN"]
hosts = {role: sorted({a.ip.removeprefix("::ffff:") for a in listening if a.port == port + i})
         for i, role in enumerate(("gcs", "dashboard", "client"))}
try:
    answer = urllib.request.urlopen(f"http://127.0.0.1:{port + 1}/api/jobs/").status
except urllib.error.HTTPError as error:
    answer = error.code
token = os.environ["RAY_AUTH_TOKEN"]
told = [p.pid for p in psutil.process_iter(["cmdline"]) if token in " ".join(p.info["cmdline"] or ())]
print(json.dumps({"nodes": nodes, "hosts": hosts, "without_token": answer, "token_on_command_lines": told,
                  "arguments": sys.argv[1:], "mode": os.environ["RAY_AUTH_MODE"]}))
sys.exit(7)
"""


def wait_for(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def ends_clean(job: Slurm) -> None:
    assert wait_for(lambda: not job.left_running(), NOTHING_LEFT_WITHIN_S), job.left_running()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_the_command_sees_all_nodes_and_its_status_is_the_scripts() -> None:
    with slurm(TWO_NODES) as job:
        (job.checkout / "look.py").write_text(LOOK)
        job.command("bdkd", f'exec {sys.executable} look.py "$@"')
        status, output, errors = finish(job.sbatch("train", "digits", "run.name=with space"))
        assert status == 7, errors
        seen = json.loads(output)
        assert seen["nodes"] == {"127.0.0.2": 1.0, "127.0.0.3": 1.0}
        assert seen["arguments"] == ["train", "digits", "run.name=with space"]
        assert seen["hosts"]["dashboard"] == ["127.0.0.1"]
        assert seen["hosts"]["client"] == ["127.0.0.1", "127.0.0.2"]
        assert (seen["mode"], seen["without_token"]) == ("token", 401)
        assert seen["token_on_command_lines"] == []
        assert "[slurm] 2 node(s) joined" in errors
        ends_clean(job)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_two_nodes_train_a_recipe_to_its_end(cache: Path, tmp_path: Path) -> None:
    places = [f"data.prepared={cache}", f"run.storage={tmp_path}", "run.name=run"]
    with slurm(TWO_NODES) as job:
        status, output, errors = finish(job.sbatch("train", "digits", *SMALL, *TWO, *places))
        assert status == 0, output + errors
        results = json.loads((tmp_path / "run/results.json").read_text())
        assert results["step"] == 10
        assert set(results["test"]) == {"teacher", "student"}
        assert all(job.worker_logs(node) for node in TWO_NODES), "not both nodes trained"
        ends_clean(job)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_told_to_stop_it_lets_the_command_checkpoint_and_end() -> None:
    with slurm({"n2": "127.0.0.2"}) as job:
        (job.checkout / "work.py").write_text(
            "import pathlib, signal, sys, time\n"
            "def stop(number, frame):\n    time.sleep(2); print('checkpoint written'); sys.exit(130)\n"
            "signal.signal(signal.SIGTERM, stop)\npathlib.Path('working').touch()\ntime.sleep(600)\n"
        )
        job.command("bdkd", f"exec {sys.executable} work.py")
        process = job.sbatch("train", "digits")
        assert wait_for((job.checkout / "working").exists, 300)
        process.send_signal(signal.SIGTERM)
        status, output, errors = finish(process)
        assert (status, output) == (130, "checkpoint written\n"), errors
        ends_clean(job)


@pytest.mark.parametrize("address", ["192.0.2.7", "172.32.0.1", "100.128.0.1", "100.63.0.1", "11.0.0.1", "fe80::1"])
def test_a_node_without_a_private_address_is_refused(address: str) -> None:
    with slurm({"n2": address}) as job:
        status, output, errors = finish(job.sbatch("train", "digits"))
        assert (status, output) == (1, "")
        assert f"node n2 has no private IPv4 address: {address}" in errors
        assert not job.left_running()


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "172.16.0.1", "172.31.255.1", "192.168.0.1", "100.64.0.1", "100.99.9.9", "100.127.9.9"]
)
def test_of_a_nodes_addresses_the_first_private_one_is_taken(address: str) -> None:
    with slurm({"n2": f"fe80::1 192.0.2.7 {address} 10.9.9.9"}) as job:
        function = re.search(r"^private_address\(\) \{$.*?^\}$", job.spooled.read_text(), re.DOTALL | re.MULTILINE)
        assert function
        done = subprocess.run(
            ["bash", "-euc", f"{function[0]}\nprivate_address"],
            env=job.environment | {"SLURMD_NODENAME": "n2"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{address}\n", "")


def test_a_head_that_does_not_start_ends_the_job() -> None:
    with slurm(TWO_NODES) as job:
        job.command("ray", 'echo "ray $*"; exit 3')
        status, output, errors = finish(job.sbatch("train", "digits"))
        assert (status, output) == (1, "")
        assert "--node-ip-address=127.0.0.2 " in errors
        assert "the head did not start" in errors
        assert not job.left_running()


def test_without_slurm_it_says_how_to_start_it() -> None:
    with slurm(TWO_NODES) as job:
        del job.environment["SLURM_SUBMIT_DIR"]
        status, _, errors = finish(job.sbatch("train", "digits"))
        assert status == 1
        assert "submit this file with sbatch" in errors
