"""What travels with a job: source, and nothing else."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from bdkd_dist.data import jpeg
from bdkd_dist.errors import UserError
from bdkd_dist.launch import source_package
from bdkd_dist.launch.source_package import source_files, write_archive

CHECKOUT = Path(__file__).resolve().parents[2]


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")


def own(folder: Path) -> list[str]:
    """Return what travels besides the installed package."""
    return [name for name in source_files(folder) if not name.startswith("bdkd_dist/")]


def test_the_checkout_travels_with_its_decoder_and_without_what_git_ignores() -> None:
    names = set(source_files(CHECKOUT))
    assert {"bdkd_dist/cli.py", "bdkd_dist/recipes/digits.yaml", "bdkd_dist/data/native/jpeg.c"} <= names
    assert (f"bdkd_dist/data/{jpeg.LIBRARY.name}" in names) == jpeg.LIBRARY.is_file()
    assert not [name for name in names if name.split("/")[0].startswith(".") or "__pycache__" in name]
    assert not [name for name in names if Path(name).suffix in (".png", ".nbi", ".nbc", ".pyc", ".beton")]


@pytest.mark.parametrize("repository", [True, False], ids=["git", "no-git"])
def test_data_runs_environments_secrets_and_ignored_files_stay(tmp_path: Path, repository: bool) -> None:
    if repository:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    make(tmp_path, "my_nets.py", "recipes/mine.yaml", "lib/util.py", "data/reading.py", "lib/notes.txt")
    make(tmp_path, "data/train.beton", "photos/a.JPG", "test-00000.parquet", "weights.pt", "shards/0.tar")
    make(tmp_path, "runs/mine/recipe.yaml", "env/pyvenv.cfg", "env/lib/torch.py", "__pycache__/my_nets.pyc")
    make(tmp_path, ".env", ".ssh/id_rsa", ".venv/pyvenv.cfg", "keys.txt", "lib/secret/token.txt")
    (tmp_path / ".gitignore").write_text("/keys.txt\n")
    (tmp_path / "lib/.gitignore").write_text("secret/\n*.txt\n")
    assert own(tmp_path) == ["data/reading.py", "lib/util.py", "my_nets.py", "recipes/mine.yaml"]


def test_key_files_stay_whatever_their_folder_and_code_of_their_name_travels(tmp_path: Path) -> None:
    make(
        tmp_path,
        "keys.env",
        "cluster/Prod.ENV",
        ".env.local",
        "id_rsa",
        "deploy/id_ed25519",
        "id_ecdsa_sk",
        "id_dsa.pub",
    )
    make(tmp_path, "credentials", "credentials.json", "credentials-old.yaml", "aws/credentials.ini", "credentials.csv")
    make(tmp_path, "application_default_credentials.json", "kubeconfig", "lab.kubeconfig", "kubeconfig.yaml")
    code = [
        "credentials.py",
        "environments.py",
        "id_rsa_net.py",
        "identity.yaml",
        "kubeconfigs.yaml",
        "recipes/env.yaml",
    ]
    make(tmp_path, *code)
    assert own(tmp_path) == sorted(code)


def test_git_ignores_files_of_keys() -> None:
    done = subprocess.run(["git", "-C", CHECKOUT, "check-ignore", "keys.env", "cluster/prod.env"], capture_output=True)
    assert done.stdout.split() == [b"keys.env", b"cluster/prod.env"]


def test_a_link_to_a_folder_of_data_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/huge.py", "project/a.py")
    (tmp_path / "project/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "project/gone.py").symlink_to(tmp_path / "nowhere")
    assert own(tmp_path / "project") == ["a.py"]


def test_a_repository_inside_the_repository_travels_by_its_own_rules(tmp_path: Path) -> None:
    make(tmp_path, "a.py", "inner/b.py", "inner/ignored.py")
    for folder in (tmp_path, tmp_path / "inner"):
        subprocess.run(["git", "init", "-q", folder], check=True)
    (tmp_path / "inner/.gitignore").write_text("ignored.py\n")
    assert own(tmp_path) == ["a.py", "inner/b.py"]


def test_a_tracked_file_that_was_deleted_does_not_travel(tmp_path: Path) -> None:
    make(tmp_path, "a.py", "b.py")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    (tmp_path / "b.py").unlink()
    assert own(tmp_path) == ["a.py"]


def test_the_installed_package_travels_where_the_folder_holds_none(tmp_path: Path) -> None:
    make(tmp_path, "a.py")
    files = source_files(tmp_path)
    here = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "bdkd_dist").rglob("*.py")}
    assert here <= set(files)
    assert not any("__pycache__" in name for name in files)


def test_a_folder_with_the_package_sends_its_own(tmp_path: Path) -> None:
    make(tmp_path, "bdkd_dist/__main__.py", "bdkd_dist/data/_jpeg.cpython-311-x86_64-linux-gnu.so")
    (tmp_path / ".gitignore").write_text("*.so\n")
    assert list(source_files(tmp_path)) == [
        "bdkd_dist/__main__.py",
        "bdkd_dist/data/_jpeg.cpython-311-x86_64-linux-gnu.so",
    ]


def test_an_archive_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    hashes = []
    for copy in ("one", "other"):
        make(tmp_path / copy, "a.py", "lib/b.py")
        files = {name: tmp_path / copy / name for name in ("a.py", "lib/b.py")}
        write_archive(files, tmp_path / f"{copy}.zip")
        hashes.append(hashlib.sha256((tmp_path / f"{copy}.zip").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.read("lib/b.py") == b"# lib/b.py\n"


def test_data_that_nobody_ignores_is_named_and_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.py")
    (tmp_path / "train").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(source_package, "LIMIT_BYTES", 2 * 2**20)
    with pytest.raises(UserError, match=r"largest file is train \(3 MiB\): list data in \.gitignore"):
        write_archive({"a.py": tmp_path / "a.py", "train": tmp_path / "train"}, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_a_home_folder_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="no project's folder"):
        source_files(tmp_path)
