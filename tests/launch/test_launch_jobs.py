"""Command lines as Ray jobs: sent, followed, stopped and gone on with, on a real cluster behind a token."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_node
import runs
from ray_node import RayHead

from bdkd_dist import __version__, cli
from bdkd_dist.data import jpeg

NOBODY = "http://127.0.0.1:9"
"""The port of a service that is not there: what is wrong otherwise has to be said before anybody is called."""
OWN_NETWORK = """
import time
from pathlib import Path
from torch import nn

class Slow(nn.Identity):
    def forward(self, images):
        time.sleep(3.0 if Path({hold!r}).exists() else 0.0)
        return images

def tiny(num_classes: int) -> nn.Module:
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(Slow(), nn.Conv2d(3, 4, 3, 2), nn.ReLU(), *ends)
"""
"""A step takes some seconds while a file is there."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHead]:
    with ray_node.head("127.0.5.1") as head:
        yield head


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's own folder: a network, a recipe, and what must not travel."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_nets.py").write_text(OWN_NETWORK.format(hold=str(tmp_path / "hold")))
    (folder / "mine.yaml").write_text("base: digits\nmodels:\n  teacher: resnet8\n  student: my_nets:tiny\n")
    (folder / "photo.jpg").write_bytes(b"not source")
    (folder / ".env").write_text("KEY=secret")
    return folder


def bdkd(
    cluster: RayHead, *arguments: str, cwd: Path, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command against the cluster."""
    done = subprocess.run(
        [str(runs.BDKD), *arguments],
        cwd=cwd,
        env=cluster.environment | {"RAY_API_SERVER_ADDRESS": cluster.dashboard} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def small(cache: Path, storage: Path, *more: str) -> list[str]:
    """Return the overrides of a run that takes some seconds."""
    networks = [word for word in runs.SMALL if not word.startswith("models.")]
    return [*networks, *runs.LIGHT, f"data.prepared={cache}", f"run.storage={storage}", "run.name=job", *more]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_a_job_trains_own_networks_from_another_folder_and_ends_as_it_ends(
    cluster: RayHead, cache: Path, project: Path, tmp_path: Path
) -> None:
    done = bdkd(cluster, "submit", "--", "train", "mine.yaml", *small(cache, tmp_path / "runs"), cwd=project)
    job, *log = done.stdout.splitlines()
    assert re.fullmatch(r"raysubmit_\w+", job)
    assert f"bdkd jobs stop {job}" in done.stderr
    assert any("resnet8 → my_nets:tiny" in line for line in log)
    assert (tmp_path / "runs/job/results.json").is_file()

    sent = next(cluster.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/my_nets.py")).parent
    names = {path.relative_to(sent).as_posix() for path in sent.rglob("*")}
    assert {"mine.yaml", "bdkd_dist/cli.py", "bdkd_dist/recipes/digits.yaml"} <= names
    assert (f"bdkd_dist/data/{jpeg.LIBRARY.name}" in names) == jpeg.LIBRARY.is_file()
    assert not {"photo.jpg", ".env"} & names


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_a_job_that_fails_ends_with_the_commands_status(
    cluster: RayHead, cache: Path, project: Path, tmp_path: Path
) -> None:
    overrides = small(cache, tmp_path / "runs", "train.batch_size=400")
    done = bdkd(cluster, "submit", "--", "train", "mine.yaml", *overrides, cwd=project, status=2)
    assert "train.batch_size=400: larger than the 311 training images" in done.stdout
    job = done.stdout.splitlines()[0]
    (line,) = (line for line in bdkd(cluster, "jobs", "list", cwd=project).stdout.splitlines() if job in line)
    assert "FAILED (2)" in line
    assert f"bdkd train mine.yaml {shlex.join(overrides)}" in line
    assert bdkd(cluster, "jobs", "logs", job, cwd=project).stdout in done.stdout
    bdkd(cluster, "jobs", "logs", job, "--follow", cwd=project, status=2)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_a_stopped_job_goes_on_with_the_same_submit(
    cluster: RayHead, cache: Path, project: Path, tmp_path: Path
) -> None:
    overrides = small(cache, tmp_path / "runs", "train.epochs=4", "train.log_every_steps=1")
    command = ["submit", "--detach", "--", "train", "mine.yaml", *overrides]
    run = tmp_path / "runs/job"
    (tmp_path / "hold").touch()  # the run is still on its way when it is stopped
    job = bdkd(cluster, *command, cwd=project).stdout.strip()
    while not runs.reached(run, 3)():
        assert re.search("PENDING|RUNNING", _listed(cluster, project, job)), "it ended by itself"

    status, said = _interrupted([str(runs.BDKD), "jobs", "logs", job, "--follow"], cluster, project)
    assert status == 130
    assert f"the job goes on; follow it: bdkd jobs logs {job} --follow; stop it: bdkd jobs stop {job}" in said

    assert f"job {job}: STOPPED" in bdkd(cluster, "jobs", "stop", job, cwd=project).stderr  # so it did go on
    assert "stopped after step" in bdkd(cluster, "jobs", "logs", job, cwd=project).stdout  # the command itself
    assert not (run / "results.json").exists()
    assert f"job {job} had already ended: STOPPED" in bdkd(cluster, "jobs", "stop", job, cwd=project).stderr

    (tmp_path / "hold").unlink()
    again = bdkd(cluster, *command, cwd=project).stdout.strip()
    with Cut(cluster.dashboard) as proxy:
        followed = bdkd(cluster, "jobs", "logs", again, "--follow", "--address", proxy.url, cwd=project)
    assert proxy.cuts, "the connection was never broken"
    assert followed.stdout == bdkd(cluster, "jobs", "logs", again, cwd=project).stdout  # nothing lost or doubled
    assert (run / "results.json").is_file()
    assert runs.final_state(run)["step"] == 20
    steps = [line["step"] for line in runs.metric_lines(run) if "train" in line]
    assert steps == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.ray
def test_an_unknown_job_and_a_wrong_token_are_one_line(cluster: RayHead, project: Path) -> None:
    unknown = bdkd(cluster, "jobs", "stop", "raysubmit_x", cwd=project, status=2).stderr
    assert unknown.startswith("unknown job 'raysubmit_x'")
    wrong = bdkd(cluster, "jobs", "list", cwd=project, status=2, RAY_AUTH_TOKEN="0" * 64).stderr
    assert wrong.startswith(f"--address {cluster.dashboard}: the cluster wants another token; set RAY_AUTH_MODE")
    missing = bdkd(cluster, "jobs", "list", cwd=project, status=2, RAY_AUTH_MODE="disabled").stderr
    assert missing.startswith(f"--address {cluster.dashboard}: the cluster wants a token; set RAY_AUTH_MODE")
    for line in (unknown, wrong, missing):
        assert line.count("\n") == 1


MISTAKES = {
    "key": (["train", "digits", "train.epoch=5"], "unknown recipe key 'train.epoch'; did you mean 'train.epochs'"),
    "value": (["train", "digits", "train.epochs=0"], "train.epochs=0: "),
    "storage": (["train", "digits"], "run.storage=runs: a job's own folder is deleted after it"),
    "root": (["train", "mine.yaml", "run.storage=/nfs/runs", "data.root=photos"], "data.root=photos: a job's own"),
    "outside": (["train", "../other.yaml", "run.storage=/nfs/runs"], "recipe ../other.yaml does not travel"),
    "ignored": (["train", "private.yaml", "run.storage=/nfs/runs"], "recipe private.yaml does not travel"),
    "base": (["train", "above.yaml", "run.storage=/nfs/runs"], "recipe ../other.yaml does not travel"),
    "absent": (["train", "absent.yaml", "run.storage=/nfs/runs"], "recipe file absent.yaml does not exist"),
    "command": (["trian", "digits"], "unknown command for a job 'trian'; did you mean 'train'?"),
    "space": (
        ["tune", "space.py", "digits", "run.storage=/nfs/runs"],
        "models.teacher_checkpoint=runs/alone: a job's own folder",
    ),
    "evaluate": (["evaluate", "runs/mine"], "RUN=runs/mine: a job's own folder"),
    "prepare": (["prepare", "digits", "prepared"], "OUT=prepared: a job's own folder"),
    "secret": (
        ["train", "digits", "run.storage=s3://AKIA:hush@lab/runs"],
        "run.storage=s3://lab/runs holds a secret key, which the cluster's dashboard would show",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_would_go_wrong_there_is_said_here(
    case: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, expected = MISTAKES[case]
    (project.parent / "other.yaml").write_text("base: digits\n")
    (project / "above.yaml").write_text("base: ../other.yaml\n")
    (project / "private.yaml").write_text("base: digits\n")
    (project / ".gitignore").write_text("private.yaml\n")
    (project / "space.py").write_text(
        "from ray import tune\n\n\ndef search_space():\n"
        '    return {"models.teacher_checkpoint": "runs/alone", "optimizer.lr": tune.loguniform(0.01, 0.1)}\n'
    )
    line = _said(["submit", "--address", NOBODY, "--", *command], project, monkeypatch, capsys)
    assert line.startswith(expected)
    assert line.count("\n") == 1
    assert "hush" not in line


def test_an_option_that_the_command_does_not_have_is_refused_here(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = _said(["submit", "--address", NOBODY, "--", "train", "digits", "--fast"], project, monkeypatch, capsys)
    assert "No such option: --fast" in line


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (NOBODY, "--address http://127.0.0.1:9: nobody answers (Connection refused); give http://HEAD:8265"),
        ("127.0.0.1:9", "--address http://127.0.0.1:9: nobody answers"),
        ("ray://127.0.0.1:9", "--address ray://127.0.0.1:9: the job server speaks HTTP"),
        (None, "give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS"),
    ],
)
def test_an_address_where_nobody_answers_is_one_line(
    address: str | None,
    expected: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")  # of a GCS: no job server's
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    options = [] if address is None else ["--address", address]
    for command in (["jobs", "list", *options], ["submit", *options, "--", "train", "digits", "run.storage=/runs"]):
        line = _said(command, project, monkeypatch, capsys)
        assert line.startswith(expected)
        assert line.count("\n") == 1


def test_what_is_no_dashboard_is_said(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"], cwd=project, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        port = re.search(rb"port (\d+)", server.stdout.readline())
        assert port is not None
        address = f"http://127.0.0.1:{port[1].decode()}"
        line = _said(["jobs", "list", "--address", address], project, monkeypatch, capsys)
    finally:
        server.kill()
        server.communicate()
    assert line.startswith(f"--address {address}: ")
    assert line.count("\n") == 1


def test_asking_after_jobs_loads_no_torch() -> None:
    ask = f"import sys; from bdkd_dist import cli; sys.argv = ['bdkd', 'jobs', 'list', '--address', '{NOBODY}']"
    code = f"{ask}\ntry: cli.main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_version_is_said() -> None:
    done = subprocess.run([str(runs.BDKD), "--version"], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == __version__


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bdkd_dist", "recipes"], capture_output=True, text=True, check=True, timeout=300
    )
    assert "digits" in done.stdout.splitlines()


def _said(command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that ends with status 2 in this process; return what it says."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["bdkd", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def _listed(cluster: RayHead, project: Path, job: str) -> str:
    (line,) = (line for line in bdkd(cluster, "jobs", "list", cwd=project).stdout.splitlines() if job in line)
    return line


def _interrupted(command: list[str], cluster: RayHead, cwd: Path) -> tuple[int, str]:
    """Press Ctrl-C once the command has printed something; return its status and what it says beside its output."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=cluster.environment | {"RAY_API_SERVER_ADDRESS": cluster.dashboard},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


class Cut:
    """A way to a server that breaks once, amid the log of a run."""

    AFTER = b"/4  val"

    def __init__(self, url: str):
        host, _, port = url.removeprefix("http://").partition(":")
        self.server = (host, int(port))
        self.cuts = 0

    def __enter__(self) -> "Cut":
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.server)
            threading.Thread(target=self._carry, args=(client, server), daemon=True).start()
            threading.Thread(target=self._carry, args=(server, client), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.AFTER in data and not self.cuts:
                    self.cuts += 1
                    data = data[: data.index(self.AFTER)]
                    sink.sendall(data)
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                os.sched_yield()
