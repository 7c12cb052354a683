"""The set-up script on machines that lack something: what it says, what it installs, when it does nothing.

The script is the real one; the commands that look at the machine and change it are stand-ins.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bdkd_dist.launch import doctor

ROOT = Path(__file__).parent.parent
TOOLS = (
    "bash",
    "cat",
    "sha256sum",
    "cut",
    "head",
    "awk",
    "mktemp",
    "rm",
    "dirname",
    "grep",
    "mkdir",
    "touch",
    "chmod",
    "env",
)
ASK_FOR_ROOT = "cannot install packages without root; run: sudo apt-get install -y "
PACKAGES = "g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev"


class Machine:
    """A copy of the clone, and a PATH that holds nothing but stand-ins and harmless tools."""

    def __init__(self, folder: Path):
        self.clone, self.bin, self.calls = folder / "clone", folder / "bin", folder / "calls"
        (self.clone / "cluster").mkdir(parents=True)
        self.bin.mkdir()
        for file in ("requirements.txt", "pyproject.toml", "cluster/setup_node.sh", "cluster/uv-requirements.txt"):
            shutil.copy(ROOT / file, self.clone / file)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.skip(f"this machine has no {tool}"))
        self.user(1000)
        self.put("apt-get", self.recorded("apt-get") + "; touch $(dirname $0)/../have")
        self.put("dpkg-query", 'if [ -e "$(dirname "$0")/../have" ]; then echo "install ok installed"; else exit 1; fi')
        # Makes the environment, and keeps what it was asked to install.
        self.put(
            "uv",
            f"""
            if [ "$1" = venv ]; then mkdir -p .venv/bin && touch .venv/bin/python && chmod +x .venv/bin/python; exit; fi
            case "$*" in
                */ffcv.txt) what=ffcv; grep -q '^ffcv==' "${{@: -1}}" || exit 9 ;;
                */others.txt) what=others; grep -q '^ffcv==' "${{@: -1}}" && exit 9 ;;
                *) what=project ;;
            esac
            echo "uv $what" >>{self.calls}
            if [ -e {folder}/broken ] && [ $what = ffcv ]; then echo 'error: opencv4 was not found' >&2; exit 1; fi
            """,
        )

    def put(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def recorded(self, name: str) -> str:
        return f'echo "{name} $*" >>{self.calls}'

    def user(self, number: int) -> None:
        self.put("id", f"echo {number}")

    def set_up(self) -> tuple[list[str], list[str]]:
        """Run the script; return the lines it said, and what it did."""
        self.calls.write_text("")
        done = subprocess.run(
            [self.clone / "cluster/setup_node.sh"],
            env={"PATH": str(self.bin), "HOME": str(self.clone)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        lines = [line.replace("\x1b[1m[setup]\x1b[0m ", "") for line in done.stdout.splitlines()]
        return lines, self.calls.read_text().splitlines()

    def have_packages(self) -> None:
        (self.bin.parent / "have").touch()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def does_nothing(machine: Machine) -> bool:
    return machine.set_up() == ([], [])


def only(lines: Sequence[str], word: str) -> str:
    (line,) = [line for line in lines if word in line]
    return line


def test_without_root_it_says_the_command_goes_on_and_the_command_mends_it(machine: Machine) -> None:
    lines, calls = machine.set_up()
    assert only(lines, "root") == ASK_FOR_ROOT + PACKAGES
    assert "the torch loader" in only(lines, "without FFCV")
    assert calls == ["uv others", "uv project"]
    assert does_nothing(machine)
    machine.have_packages()
    lines, calls = machine.set_up()
    assert calls == ["uv others", "uv project", "uv ffcv"]
    assert not [line for line in lines if "without" in line]
    assert does_nothing(machine)


def test_as_root_it_installs_the_packages_itself(machine: Machine) -> None:
    machine.user(0)
    _, calls = machine.set_up()
    assert calls == [
        "apt-get update -qq",
        f"apt-get install -y -qq {PACKAGES}",
        "uv others",
        "uv project",
        "uv ffcv",
    ]
    assert does_nothing(machine)


def test_with_sudo_that_asks_nothing_it_goes_through_sudo(machine: Machine) -> None:
    machine.put("sudo", f'[ "$1" = -n ] && exit 0\n{machine.recorded("sudo")}\n"$@"')
    _, calls = machine.set_up()
    assert f"sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq {PACKAGES}" in calls
    assert "uv ffcv" in calls


def test_with_sudo_that_asks_a_password_nobody_can_type_it_says_the_command(machine: Machine) -> None:
    machine.put("sudo", "exit 1")
    lines, calls = machine.set_up()
    assert only(lines, "root") == ASK_FOR_ROOT + PACKAGES
    assert calls == ["uv others", "uv project"]


def test_where_apt_fails_it_says_the_command_and_goes_on(machine: Machine) -> None:
    machine.user(0)
    machine.put("apt-get", "exit 100")
    lines, calls = machine.set_up()
    assert only(lines, "failed") == f"apt-get failed; run: apt-get install -y {PACKAGES}"
    assert calls == ["uv others", "uv project"]
    assert does_nothing(machine)


def test_without_apt_it_names_what_is_lacking(machine: Machine) -> None:
    for command in ("apt-get", "dpkg-query"):
        (machine.bin / command).unlink()
    machine.put("g++", "")
    lines, calls = machine.set_up()
    assert "install pkg-config opencv4 libturbojpeg (with headers)" in only(lines, "no apt here")
    assert calls == ["uv others", "uv project"]
    assert does_nothing(machine)
    machine.put("pkg-config", "exit 0")
    assert "uv ffcv" in machine.set_up()[1]


def test_where_ffcv_does_not_build_it_says_why_goes_on_and_claims_nothing(machine: Machine) -> None:
    machine.have_packages()
    broken = machine.bin.parent / "broken"
    broken.touch()
    lines, calls = machine.set_up()
    line = only(lines, "did not build")
    assert ".venv/ffcv-build.log" in line
    assert "rm -f .venv/.ready && make setup" in line
    log = machine.clone / ".venv/ffcv-build.log"
    assert "opencv4 was not found" in log.read_text()
    assert calls == ["uv others", "uv project", "uv ffcv"]
    ready = machine.clone / ".venv/.ready"
    assert does_nothing(machine)
    broken.unlink()
    ready.unlink()
    assert "uv ffcv" in machine.set_up()[1]
    assert not log.exists()


@pytest.mark.parametrize("file", ["requirements.txt", "pyproject.toml", "cluster/setup_node.sh"])
def test_it_installs_again_when_what_it_is_made_from_changes(machine: Machine, file: str) -> None:
    machine.have_packages()
    machine.set_up()
    with (machine.clone / file).open("a") as stream:
        stream.write("# changed\n")
    assert machine.set_up()[1] == ["uv others", "uv project", "uv ffcv"]


@pytest.mark.parametrize(("user", "prefix"), [(0, ""), (1000, "sudo ")])
def test_the_doctor_names_the_command_and_the_log(
    user: int, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    absent = doctor._ffcv()
    assert absent.status == "optional"
    assert absent.found == "not installed; its files are read without it"
    assert absent.mend == f"{prefix}apt-get install -y {PACKAGES} && rm -f .venv/.ready && make setup"
    (tmp_path / "ffcv-build.log").touch()
    assert f"it did not build: {tmp_path}/ffcv-build.log" in doctor._ffcv().found
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor._ffcv().mend.startswith("install g++, pkg-config, OpenCV and libjpeg-turbo (with headers)")
