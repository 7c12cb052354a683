"""The doctor on a real cluster, healthy and not, and its judgement of what a node says."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_node
import runs
import s3_server
from ray_node import RayHead

import bdkd_dist
from bdkd_dist.launch import node_probe
from bdkd_dist.launch.node_probe import NodeProbe
from bdkd_dist.launch.ray_doctor import Node, judge, problems, table

PACKAGE = Path(bdkd_dist.__file__).parent
HEAD, OTHER = "127.0.6.1", "127.0.6.2"
SILENT = """
import sys
from bdkd_dist.launch import ray_doctor
for node in ray_doctor.examine(sys.argv[1], within_s=20):
    print(node.name, node.lacks_something, sorted(node.cells), *node.problems)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHead]:
    keys = {"AWS_ACCESS_KEY_ID": s3_server.ACCESS, "AWS_SECRET_ACCESS_KEY": s3_server.SECRET}
    with ray_node.head(HEAD, **keys) as head:
        head.environment.update(keys)
        yield head


def doctor(cluster: RayHead, folder: Path, *options: str, status: int) -> str:
    """Run the doctor in a folder that holds no package: Ray's workers look there first."""
    command = [str(runs.BDKD), "doctor", "--address", cluster.gcs, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=cluster.environment, cwd=folder, timeout=500)
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_healthy_nodes_that_share_a_store_end_with_success(cluster: RayHead, tmp_path: Path) -> None:
    with s3_server.serve() as store:
        said = doctor(cluster, tmp_path, "--storage", store.uri("runs"), status=0)
        written = {key for method, key, _ in store.requests if method == "PUT" and "bdkd-doctor-" in key}
        assert len(written) == 2  # the driver's and the node's
        assert store.keys("runs") == []
    (row,) = (line for line in said.splitlines() if HEAD in line)
    assert row.split("│")[-2].strip() == "ok"  # the storage
    assert "wrong" not in said


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_a_node_with_other_code_and_a_gpu_that_is_not_there_is_found(cluster: RayHead, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "other/bdkd_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other/bdkd_dist/errors.py").open("a") as file:
        file.write("# changed\n")
    (tmp_path / "runs").mkdir()
    # Ray counts what the variable names without a look at the machine; torch, on any machine, finds no such GPU.
    extra = {"PYTHONPATH": str(tmp_path / "other"), "CUDA_VISIBLE_DEVICES": "99"}
    with ray_node.joined(cluster, OTHER, "--num-gpus=1", **extra):
        said = doctor(cluster, tmp_path, "--storage", str(tmp_path / "runs"), status=1)
    assert list((tmp_path / "runs").iterdir()) == []
    rows = [line for line in said.splitlines() if "│" in line]
    assert [HEAD in rows[0], OTHER in rows[1]] == [True, True]
    assert "wrong" not in said  # both see the storage
    named = [line for line in said.splitlines() if line.startswith("127.")]
    (code,) = (line for line in named if "bdkd-dist is" in line)
    (gpus,) = (line for line in named if "GPU" in line)
    assert code.startswith(OTHER)
    assert "make setup" in code
    assert gpus.startswith(OTHER)
    assert "Ray offers 1 GPU(s), torch sees 0" in gpus


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_a_node_that_does_not_answer_is_a_row_and_no_hang(cluster: RayHead, tmp_path: Path) -> None:
    with ray_node.joined(cluster, OTHER) as raylet:
        os.kill(raylet, signal.SIGSTOP)
        try:
            done = subprocess.run(
                [sys.executable, "-c", SILENT, cluster.gcs],
                capture_output=True,
                text=True,
                env=cluster.environment,
                cwd=tmp_path,
                timeout=300,
            )
        finally:
            os.kill(raylet, signal.SIGCONT)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(OTHER))
    assert "True [] no answer: " in line
    assert "see `ray status`" in line


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_a_storage_that_is_not_there_is_said_at_once(cluster: RayHead, tmp_path: Path) -> None:
    said = doctor(cluster, tmp_path, "--storage", str(tmp_path / "absent"), status=2)
    assert said == f"--storage {tmp_path}/absent: no such folder here; make it: mkdir -p {tmp_path}/absent\n"


def test_a_node_whose_folder_is_another_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_probe, "VISIBLE_WITHIN_S", 0.0)
    assert NodeProbe().storage(str(tmp_path), "mark", "token") == "it is another place than the driver's"
    (tmp_path / "mark").write_text("of another cluster")
    assert NodeProbe().storage(str(tmp_path), "mark", "token") == "it is another place than the driver's"
    assert NodeProbe().storage(str(tmp_path / "absent"), "mark", "token") == "the folder is not there"
    assert [path.name for path in tmp_path.iterdir()] == ["mark"]


def good() -> dict[str, Any]:
    return {
        "python": "3.11.7",
        "torch": "2.14.1",
        "ray": "2.60.0",
        "ffcv": "1.0.2",
        "bdkd-dist": "0.1.0",
        "source": "0123456789abcdef",
        "decoder": True,
        "tmp": "/tmp",
        "tmp_free_bytes": 100 * 2**30,
        "shm_bytes": 8 * 2**30,
        "gpus": 2,
    }


def judged(advertised: int = 2, **changes: Any) -> Node:
    node = Node("10.0.0.7")
    judge(node, good() | changes, good(), advertised)
    return node


def test_a_node_like_the_driver_has_no_problem() -> None:
    node = judged()
    assert not node.lacks_something
    assert node.problems == []
    assert {status for status, _ in node.cells.values()} == {"ok"}


@pytest.mark.parametrize(
    ("check", "changes", "advertised", "words"),
    [
        ("python", {"python": "3.12.1"}, 2, ["python is 3.12.1, the driver's 3.11.7", "make setup"]),
        ("torch", {"torch": None}, 2, ["torch is absent, the driver's 2.14.1"]),
        ("ray", {"ray": "2.59.0"}, 2, ["ray is 2.59.0, the driver's 2.60.0"]),
        ("bdkd-dist", {"bdkd-dist": None, "source": None}, 2, ["bdkd-dist does not load there", "bdkd submit"]),
        ("bdkd-dist", {"source": "fedcba9876543210"}, 2, ["source fedcba98; the driver's 0.1.0, 01234567"]),
        ("GPUs", {}, 0, ["torch sees 2 GPU(s), Ray offers 0", "ray start --num-gpus=2"]),
        ("GPUs", {"gpus": 0}, 2, ["Ray offers 2 GPU(s), torch sees 0", "nvidia-smi"]),
    ],
)
def test_what_would_make_a_run_fail_or_differ_is_missing(
    check: str, changes: dict[str, Any], advertised: int, words: list[str]
) -> None:
    node = judged(advertised, **changes)
    assert node.lacks_something
    assert [name for name, (status, _) in node.cells.items() if status != "ok"] == [check]
    (line,) = problems([node])
    assert line.startswith("10.0.0.7: ")
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("check", "changes", "word"),
    [
        ("decoder", {"decoder": False, "ffcv": "does not load: libopencv_core.so.406"}, "make setup"),
        ("tmp free", {"tmp_free_bytes": 2**30}, "ray start --temp-dir"),
        ("/dev/shm", {"shm_bytes": 64 * 2**20}, "--shm-size=1g"),
    ],
)
def test_what_a_run_can_do_without_is_said_and_no_failure(check: str, changes: dict[str, Any], word: str) -> None:
    node = judged(**changes)
    assert not node.lacks_something
    assert node.cells[check][0] == "optional"
    (line,) = problems([node])
    assert word in line


def test_the_table_has_a_row_for_a_node_that_does_not_answer() -> None:
    silent = Node("10.0.0.8", problems=["no answer: not within 60 s"])
    drawn = table([judged(), silent])
    assert drawn.row_count == 2
    assert silent.lacks_something
    assert "storage" not in [column.header for column in drawn.columns]  # nobody asked after it
