"""What holds for all files of ``cluster/``: shells that lint, nothing open to the world, no secret written down."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
FILES = sorted(path for path in (ROOT / "cluster").iterdir() if path.is_file())
SCRIPTS = sorted(
    path
    for folder in ("cluster", ".ci", "benchmarks", "tests", "docs")
    for path in (ROOT / folder).rglob("*")
    if "__pycache__" not in path.parts  # another test process may be writing there
    and path.is_file()
    and path.suffix not in (".py", ".so")
    and re.match(rb"#!.*\b(ba)?sh\b", path.open("rb").readline())
)
STARTS_RAY = re.compile(r"ray start|ray_node --head|kind: Ray|/bin/ray")
WAYS_IN = ("EXPOSE", "hostPort", "hostNetwork", "NodePort", "LoadBalancer", "enableIngress", "IpPermissions", "CidrIp")
SECRETS = (
    r"AKIA[0-9A-Z]{16}",
    r"PRIVATE KEY-----",
    r"(?i)(password|secret|token|access_key)\w*\s*[=:]\s*[\"']?[A-Za-z0-9+/]{16,}",
    r"(?<!sha256:)\b[0-9a-f]{40,}\b",
)
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def code(path: Path) -> str:
    """Return the file without its comments."""
    return "\n".join(re.sub(r"(^|\s)# .*", "", line) for line in path.read_text().splitlines())


def test_all_scripts_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SCRIPTS}
    assert {"cluster/setup_node.sh", "cluster/slurm.sbatch", ".ci/run"} <= names


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    done = subprocess.run([SHELLCHECK, "--color=never", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@each
def test_nothing_listens_on_all_addresses(path: Path) -> None:
    assert not re.search(r"0\.0\.0\.0|\[::\]|[=\s'\"]::(?!\w)", code(path))


@each
def test_no_way_in_from_the_world(path: Path) -> None:
    assert not [word for word in WAYS_IN if word in code(path)]


@each
def test_dashboard_and_job_server_are_on_loopback_or_on_the_pods_address(path: Path) -> None:
    hosts = re.findall(r"dashboard-host[=:]\s*(\S+)", code(path))
    assert set(hosts) <= {"127.0.0.1", "$(POD_IP)"}
    if re.search(r"ray start.*--head|ray_node --head|kind: Ray", code(path)):
        assert hosts


@each
def test_whoever_starts_ray_asks_for_a_token(path: Path) -> None:
    text = code(path)
    assert "RAY_AUTH_MODE=disabled" not in text
    if STARTS_RAY.search(text):
        assert "RAY_AUTH_MODE=token" in text or re.search(r"authOptions:\s+mode: token", text)


@each
def test_no_secret_is_written_down(path: Path) -> None:
    assert not [pattern for pattern in SECRETS if re.search(pattern, path.read_text())]


@pytest.mark.parametrize(
    "line",
    [
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
        "token: 'c0ffee00c0ffee00c0ffee00'",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "echo " + "ab12" * 16,
    ],
)
def test_the_search_for_secrets_finds_them(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in SECRETS)
