"""What travels with a job: the source tree of a folder as one archive, never data, runs, environments or keys."""

import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import bdkd_dist
from bdkd_dist.errors import UserError

PACKAGE = Path(bdkd_dist.__file__).parent
LIMIT_BYTES = 100 * 2**20
"""A source tree is smaller; Ray keeps the archive in the memory of the head node."""
LEFT_OUT_FOLDERS = ("runs", "__pycache__")
LEFT_OUT_SUFFIXES = (
    *(".beton", ".parquet", ".arrow", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".npy", ".npz", ".h5", ".pkl"),
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".pt", ".pt2", ".pth", ".safetensors", ".onnx"),
    *(".pem", ".key", ".p12", ".pfx", ".ppk"),
)
"""Data, weights and keys, wherever they lie."""
KEYS = re.compile(r"(id_(rsa|dsa|ecdsa|ed25519)|(.*[_.-])?(credentials?|secrets?|kubeconfig)|.*\.env)([_.-]|$)")
"""What a key file's name begins with, unless it is :data:`CODE`; so does ``application_default_credentials.json``."""
CODE = (".py", ".pyi", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".sh", ".md", ".rst")


def source_files(folder: Path) -> dict[str, Path]:
    """Return what of a folder travels, by its path in the archive.

    That is what git does not ignore, less hidden files, data and virtual environments; git ignores the native decoder
    too, but where it is built it travels. Where the folder does not hold this package, the installed one is added.

    Raises:
        UserError: The folder is not a project's, or git is absent.
    """
    if folder in (Path.home(), Path(folder.anchor)):
        raise UserError(f"{folder} is no project's folder: go to the one that holds your recipe or networks")
    files = {path.relative_to(folder).as_posix(): path for path in _not_ignored(folder)}
    environments = [path.parent for path in folder.glob("*/pyvenv.cfg")]
    files = {name: path for name, path in files.items() if _is_source(name) and path.is_file()}
    files = {name: path for name, path in files.items() if not any(path.is_relative_to(e) for e in environments)}
    for library in folder.glob("bdkd_dist/data/_jpeg*.so"):
        files[library.relative_to(folder).as_posix()] = library
    if "bdkd_dist/__main__.py" not in files:
        for path in PACKAGE.rglob("*"):
            name = path.relative_to(PACKAGE.parent).as_posix()
            if path.is_file() and _is_source(name):
                files[name] = path
    return dict(sorted(files.items()))


def write_archive(files: dict[str, Path], archive: Path) -> None:
    """Write a zip whose bytes depend on names and contents alone, so that Ray keeps one of each.

    Raises:
        UserError: The files are more than a source tree.
    """
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if (total := sum(sizes.values())) > LIMIT_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"the source tree is {total / 2**20:,.0f} MiB, at most {LIMIT_BYTES / 2**20:.0f} travel with a job; the "
            f"largest file is {largest} ({sizes[largest] / 2**20:,.0f} MiB): list data in .gitignore"
        )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for name, path in files.items():
            entry = zipfile.ZipInfo(name)  # of the year 1980
            entry.external_attr = (path.stat().st_mode & 0o777 | 0o600) << 16
            out.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


def _is_source(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") or part in LEFT_OUT_FOLDERS for part in parts)
    last = Path(name.lower())
    is_key = KEYS.match(last.name) is not None and last.suffix not in CODE
    return not hidden and not is_key and last.suffix not in LEFT_OUT_SUFFIXES


def _not_ignored(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that git does not ignore, in a repository or not; links to folders stay."""
    with tempfile.TemporaryDirectory() as scratch:
        inside = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        if inside is None:  # git reads .gitignore files of any folder, given a repository to look from
            _git(Path(scratch), "init", "--quiet", "--bare", ".")
            inside = _git(
                folder, f"--git-dir={scratch}", "--work-tree=.", "ls-files", "-z", "--others", "--exclude-standard"
            )
    if inside is None:
        raise UserError(f"{folder}: git cannot list its files, which says what is source and what is ignored")
    for name in dict.fromkeys(filter(None, inside.split("\0"))):  # a file in conflict is listed more than once
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            yield from _not_ignored(path)  # a repository inside this one
        else:
            yield path


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="surrogateescape")
