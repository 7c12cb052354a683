"""The Dockerfile, as far as it can be checked without a Docker engine."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
MOUNT = re.compile(r"--mount=(\S+)")


@dataclass(frozen=True)
class Instruction:
    stage: str
    """Name of the stage, or of its number."""
    word: str
    flags: list[str]
    rest: str


def instructions() -> list[Instruction]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    found, stage, number = [], "", 0
    for whole in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not whole.strip():
            continue
        word, rest = whole.split(None, 1)
        flags = []
        while rest.startswith("--"):
            flag, rest = rest.split(None, 1)
            flags.append(flag)
        if word == "FROM":
            stage, number = rest.split(" AS ")[1] if " AS " in rest else str(number), number + 1
        found.append(Instruction(stage, word, flags, rest))
    return found


def of(*words: str) -> list[Instruction]:
    return [instruction for instruction in instructions() if instruction.word in words]


def packages(stage: str) -> set[str]:
    """Return the Debian packages that a stage installs."""
    names: set[str] = set()
    for run in of("RUN"):
        if run.stage == stage and "apt-get install" in run.rest:
            listed = run.rest.split("apt-get install")[1].split("&&")[0]
            names |= {name for name in listed.split() if not name.startswith("-")}
    return names


def test_only_known_instructions_in_lines_that_docker_can_parse() -> None:
    assert {instruction.word for instruction in instructions()} == {
        *("ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD")
    }


def test_every_stage_stands_on_one_before_it_or_on_a_tagged_image() -> None:
    stages: list[str] = []
    for instruction in of("FROM"):
        base = instruction.rest.split()[0]
        for value in ("cpu", "cuda"):
            filled = base.replace("${VARIANT}", value)
            assert filled in stages or filled == "debian:bookworm-slim"
        stages.append(instruction.stage)
    for instruction in of("COPY", "RUN"):
        sources = re.findall(r"from=([\w-]+)", " ".join(instruction.flags))
        assert set(sources) <= set(stages[: stages.index(instruction.stage)])


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignore, *exceptions = [
        line for line in (ROOT / "cluster/Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert ignore == "*"
    sent = {line[1:] for line in exceptions if line.startswith("!")}
    copied = set()
    for copy in of("COPY"):
        if not copy.flags:
            *sources, _ = copy.rest.split()
            copied |= set(sources)
    assert all((ROOT / source).exists() for source in copied)
    assert copied == sent


def test_every_argument_is_used_and_has_a_default() -> None:
    for argument in of("ARG"):
        name, default = argument.rest.split("=")
        assert default
        assert f"${{{name}}}" in DOCKERFILE.read_text()


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not installed")
@pytest.mark.parametrize("number", range(len(of("RUN"))))
def test_commands_pass_shellcheck(number: int) -> None:
    done = subprocess.run(
        [SHELLCHECK, "--shell=sh", "--color=never", "-"], input=of("RUN")[number].rest, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_build_has_the_packages_of_the_set_up_script() -> None:
    script = (ROOT / "cluster/setup_node.sh").read_text()
    needed = re.search(r"FFCV_PACKAGES=\((.*)\)", script)
    assert needed
    assert packages("build") == {*needed[1].split(), "python3-venv"}


def test_the_image_has_the_libraries_that_ffcv_and_the_decoder_are_linked_with() -> None:
    release = Path("/etc/os-release")
    if "VERSION_CODENAME=bookworm" not in (release.read_text() if release.exists() else ""):
        pytest.skip("names of packages are those of Debian 12")
    libraries = [*ROOT.glob("bdkd_dist/data/_jpeg*.so"), *Path(sys.prefix).glob("lib/*/site-packages/ffcv/*.so")]
    if len(libraries) < 2:
        pytest.skip("FFCV or the native decoder is not built here")
    linked = subprocess.run(["ldd", *libraries], capture_output=True, text=True, check=True).stdout
    names = {
        re.sub(r"_", "-", name) + number + ("-turbo" if name == "libjpeg" else "")
        for name, number in re.findall(r"(libopencv_\w+|libturbojpeg|libjpeg)\.so\.(\d+)", linked)
    }
    assert len(names) == 4
    assert names <= packages("runtime")


def test_the_lock_is_split_into_ffcv_and_all_others_with_their_hashes(tmp_path: Path) -> None:
    (awk,) = [run.rest.split("&&")[0] for run in of("RUN") if "awk" in run.rest]
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    subprocess.run(["sh", "-euc", awk], cwd=tmp_path, check=True)
    ffcv, others = ((tmp_path / f"{name}.txt").read_text().splitlines() for name in ("ffcv", "others"))
    assert ffcv[0].startswith("ffcv==")
    assert [line for line in ffcv if re.match(r"[a-z]", line)] == ffcv[:1]
    assert any("--hash=sha256:" in line for line in ffcv)
    whole = (tmp_path / "requirements.txt").read_text().splitlines()
    assert sorted(ffcv + others) == sorted(whole)


def test_everything_from_an_index_is_installed_by_hash() -> None:
    installs = [
        command
        for run in of("RUN")
        for command in run.rest.split("&&")
        if "pip install" in command and "/wheels/" not in command
    ]
    assert len(installs) == 3
    assert all("--require-hashes" in command for command in installs)


def test_it_runs_as_a_user_without_rights_and_asks_for_the_token() -> None:
    last = [instruction for instruction in instructions() if instruction.stage == of("FROM")[-1].stage]
    words = [instruction.word for instruction in last]
    (user,) = [instruction.rest for instruction in last if instruction.word == "USER"]
    assert user == "bdkd"
    assert "useradd" in next(instruction.rest for instruction in last if instruction.word == "RUN")
    assert words.index("USER") < words.index("CMD")
    assert any("RAY_AUTH_MODE=token" in instruction.rest for instruction in last if instruction.word == "ENV")


def test_the_kubernetes_files_run_it_as_the_user_it_has() -> None:
    (uid,) = re.findall(r"--uid (\d+)", DOCKERFILE.read_text())
    spec = yaml.safe_load((ROOT / "cluster/kuberay-raycluster.yaml").read_text())["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsUser"] == int(uid)
