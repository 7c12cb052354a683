"""Copies near the workers: made once, whole or not there, whatever happens meanwhile."""

import getpass
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_disk import small_disk as mounted

from bdkd_dist.data import prepared as prepared_room
from bdkd_dist.data import stage as stage_room
from bdkd_dist.data.prepared import MANIFEST, Part, Prepared, read_manifest, verify, write_manifest
from bdkd_dist.data.stage import stage
from bdkd_dist.errors import UserError

KIB = 1024
NAMES = ["train-00000.beton", "train-00001.beton", "test-00000.beton"]
BYTES = [3000 * KIB, 9000 * KIB + 17, 1]  # several pieces, a piece that is not whole, and one byte


@pytest.fixture
def source(tmp_path: Path) -> Prepared:
    """A prepared folder; what is in its files does not matter here."""
    folder = tmp_path / "source"
    folder.mkdir()
    parts = []
    for number, (name, size) in enumerate(zip(NAMES, BYTES, strict=True)):
        content = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8).tobytes()
        (folder / name).write_bytes(content)
        parts.append(Part(name, 1, size, hashlib.sha256(content).hexdigest()))
    prepared = Prepared(folder, "f" * 64, ("a", "b"), {"train": tuple(parts[:2]), "test": tuple(parts[2:])})
    write_manifest(prepared)
    return prepared


@pytest.fixture
def near(tmp_path: Path) -> Path:
    return tmp_path / "near"


def files(prepared: Prepared) -> dict[str, bytes]:
    return {part.file: (prepared.folder / part.file).read_bytes() for part in prepared.parts}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in NAMES}


def is_one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return len(str(error.value).splitlines()) == 1


def assert_whole(source: Prepared, staged: Prepared) -> None:
    for part in staged.parts:
        assert hashlib.sha256((staged.folder / part.file).read_bytes()).hexdigest() == part.sha256
    assert read_manifest(staged.folder) == staged == replace(source, folder=staged.folder)
    assert not list(staged.folder.glob("*.partial"))


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def change_a_byte(path: Path) -> None:
    content = np.fromfile(path, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(path)


# --- copying


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_copy_is_whole_and_named_by_its_contents(source: Prepared, near: Path, kind: Any) -> None:
    staged = stage(source, kind, near)
    assert staged.folder == near / source.content[:16]
    assert_whole(source, staged)
    other = replace(source, splits={"train": source.splits["train"]})
    assert stage(other, kind, near).folder != staged.folder


@pytest.mark.parametrize(("kind", "root"), [("local", None), ("memory", Path("/dev/shm"))])
def test_copies_lie_in_a_folder_of_the_user(
    source: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, root: Path | None
) -> None:
    if root is not None and not root.is_dir():
        pytest.skip("this machine has no /dev/shm")
    user = f"test-{os.getpid()}"
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = (root or tmp_path / "tmp") / f"bdkd-dist-{user}"
    try:
        assert stage(source, kind).folder.parent == folder
    finally:
        shutil.rmtree(folder)


def test_a_user_without_a_name_has_a_folder_too(
    source: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert stage(source, "local").folder.parent == tmp_path / f"bdkd-dist-{os.getuid()}"


def test_a_whole_copy_is_taken_without_reading_any_file(
    source: Prepared, near: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    staged = stage(source, "local", near)
    assert f"from {source.folder} to {staged.folder}" in caplog.text
    caplog.clear()
    shutil.rmtree(source.folder)
    monkeypatch.setattr(prepared_room, "sha256_of", lambda path: pytest.fail(f"{path} was read"))
    assert stage(source, "local", near) == staged
    verify(staged)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "damage",
    [change_a_byte, lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: path.unlink()],
    ids=["byte", "cut", "gone"],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_damaged_later_is_copied_again_and_no_other(
    source: Prepared, near: Path, damage: Callable[[Path], None], name: str
) -> None:
    staged = stage(source, "local", near)
    before = identities(staged.folder)
    damage(staged.folder / name)
    assert_whole(source, stage(source, "local", near))
    after = identities(staged.folder)
    assert {each for each in NAMES if before[each] != after[each]} == {name}
    with pytest.MonkeyPatch.context() as patch:  # the others were looked at, and are known again
        patch.setattr(prepared_room, "sha256_of", lambda path: pytest.fail(f"{path} was read"))
        stage(source, "local", near)


@pytest.mark.parametrize("lost", [[MANIFEST], [prepared_room.VERIFIED], [MANIFEST, prepared_room.VERIFIED]])
def test_files_are_kept_when_what_was_written_down_is_lost(source: Prepared, near: Path, lost: list[str]) -> None:
    staged = stage(source, "local", near)
    before = identities(staged.folder)
    for name in lost:
        (staged.folder / name).unlink()
    assert_whole(source, stage(source, "local", near))
    assert identities(staged.folder) == before


# --- what is wrong with the source


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change_a_byte, "was altered: its SHA-256 is not the manifest's"),
        (cut, "is truncated or grown: "),
        (grow, "is truncated or grown: "),
        (lambda path: path.unlink(), "cannot be read: No such file or directory"),
    ],
    ids=["byte", "cut", "grown", "gone"],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_source_file_is_named_and_leaves_nothing_under_its_name(
    source: Prepared, near: Path, damage: Callable[[Path], None], complaint: str, name: str
) -> None:
    whole = files(source)
    damage(source.folder / name)
    for _ in range(2):
        with pytest.raises(UserError, match=re.escape(f"{source.folder / name} {complaint}")) as error:
            stage(source, "local", near)
        assert is_one_line(error)
        left = {path.name for path in (near / source.content[:16]).iterdir()}
        assert left <= {*NAMES, prepared_room.VERIFIED} - {name}
    (source.folder / name).write_bytes(whole[name])
    staged = stage(source, "local", near)
    assert_whole(source, staged)


def pipe_instead(source: Prepared, name: str) -> tuple[Path, bytes]:
    """Put a pipe in a file's place, so that the test decides when and what is read; return it and the contents."""
    path = source.folder / name
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    return path, content


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda content: content[: len(content) // 2], "is truncated or grown"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "was altered"),
        (lambda content: content + b"x", "is truncated or grown"),
    ],
    ids=["cut", "byte", "grown"],
)
def test_a_source_that_changes_while_it_is_copied_is_named(
    source: Prepared, near: Path, change: Callable[[bytes], bytes], complaint: str
) -> None:
    path, content = pipe_instead(source, NAMES[1])

    def feed() -> None:
        with path.open("wb") as pipe:
            pipe.write(content[: 5000 * KIB])
            time.sleep(0.1)  # it was right so far
            pipe.write(change(content)[5000 * KIB :])

    feeder = threading.Thread(target=feed)
    feeder.start()
    with pytest.raises(UserError, match=f"{path} {complaint}"):
        stage(source, "local", near)
    feeder.join()
    assert not [left for left in (near / source.content[:16]).iterdir() if NAMES[1] in left.name]


def test_a_source_that_fails_midway_is_named(source: Prepared, near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        """A file on a server that went away."""

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def readinto(self, buffer: memoryview) -> int:
            raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "open", lambda path, *args, _open=Path.open, **options: (
        Failing() if path == source.folder / NAMES[1] else _open(path, *args, **options)
    ))  # fmt: skip
    with pytest.raises(UserError, match=rf"{source.folder / NAMES[1]} cannot be read: Stale file handle"):
        stage(source, "local", near)


# --- what is wrong with the place


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB; the files need 12."""
    with mounted(tmp_path / "disk", size_mib=8) as disk:
        yield disk


def test_too_small_a_disk_is_said_before_anything_is_copied(source: Prepared, small_disk: Path) -> None:
    with pytest.raises(UserError) as error:
        stage(source, "memory", small_disk)
    assert is_one_line(error)
    for words in ("data.stage=memory", str(small_disk), "0.0123 GB", "0.00839 GB", "data.stage_folder"):
        assert words in str(error.value)
    assert not list((small_disk / source.content[:16]).iterdir())


def test_only_what_is_missing_must_fit(source: Prepared, small_disk: Path) -> None:
    """Three of the twelve MiB are there; the rest does not fit, but less is asked for."""
    target = small_disk / source.content[:16]
    target.mkdir()
    shutil.copy(source.folder / NAMES[0], target)
    with pytest.raises(UserError, match=r"needs 0\.00922 GB more"):
        stage(source, "local", small_disk)


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_keeps_no_half_file(
    source: Prepared, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_room, "_check_space", lambda *args: None)
    with pytest.raises(UserError, match=rf"^data.stage=local: {small_disk}: No space left on device$"):
        stage(source, "local", small_disk)
    left = {path.name for path in (small_disk / source.content[:16]).iterdir()}
    assert left <= {NAMES[0], NAMES[2], prepared_room.VERIFIED}


def test_a_place_that_is_no_folder_is_named(source: Prepared, near: Path) -> None:
    near.write_text("mine")
    with pytest.raises(UserError, match=rf"data.stage=local: {near}: File exists"):
        stage(source, "local", near)
    assert near.read_text() == "mine"


# --- several processes

SCRIPT = """
import sys
from pathlib import Path
from bdkd_dist.data.prepared import read_manifest
from bdkd_dist.data.stage import stage
staged = stage(read_manifest(Path(sys.argv[1])), "local", Path(sys.argv[2]))
print(staged.folder)
"""


def begin(source: Prepared, near: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(source.folder), str(near)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err.strip()


def test_of_processes_that_stage_at_once_one_copies_and_the_others_wait(source: Prepared, near: Path) -> None:
    path, content = pipe_instead(source, NAMES[1])
    target = near / source.content[:16]
    first = begin(source, near)
    with path.open("wb") as pipe:  # opens when the first process reads
        pipe.write(content[: 5000 * KIB])
        others = [begin(source, near) for _ in range(2)]
        for other in others:
            assert other.stderr is not None
            want = f"waiting for another process of this node that copies the images to {target}\n"
            assert other.stderr.readline() == want
        pipe.write(content[5000 * KIB :])
    status, out, said = ended(first)
    assert (status, out) == (0, str(target))
    assert re.fullmatch(rf"copying 0\.0123 GB of images from {source.folder} to {target}, where they stay", said)
    assert [ended(other) for other in others] == [(0, str(target), "")] * 2  # they copied nothing
    assert_whole(source, replace(source, folder=target))


def test_a_waiting_process_copies_itself_when_the_first_is_killed_and_keeps_what_is_whole(
    source: Prepared, near: Path
) -> None:
    path, content = pipe_instead(source, NAMES[1])
    first = begin(source, near)
    target = near / source.content[:16]
    pipe = path.open("wb")
    pipe.write(content[: 5000 * KIB])
    pipe.flush()
    wait_for(lambda: all((target / name).exists() for name in (NAMES[0], NAMES[2])))
    wait_for(lambda: (target / f"{NAMES[1]}.partial").stat().st_size > 0)
    before = {name: (target / name).stat() for name in (NAMES[0], NAMES[2])}
    second = begin(source, near)
    waiting = second.stderr.readline() if second.stderr else ""
    assert waiting.startswith("waiting for another process")
    path.unlink()
    path.write_bytes(content)
    first.kill()
    first.communicate()
    pipe.close()
    status, out, _ = ended(second)
    assert (status, out) == (0, str(target))
    assert_whole(source, replace(source, folder=target))
    for name, stat in before.items():
        after = (target / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_a_killed_copy_is_not_taken_for_whole(source: Prepared, near: Path) -> None:
    path, content = pipe_instead(source, NAMES[1])
    process = begin(source, near)
    with path.open("wb") as pipe:
        pipe.write(content[: 5000 * KIB])
        pipe.flush()
        wait_for(lambda: (near / source.content[:16] / NAMES[0]).exists())
        process.kill()
        process.communicate()
    target = near / source.content[:16]
    assert not (target / NAMES[1]).exists()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        read_manifest(target)


def test_an_error_of_the_first_reaches_the_others_too(source: Prepared, near: Path) -> None:
    change_a_byte(source.folder / NAMES[0])
    results = [ended(process) for process in [begin(source, near), begin(source, near)]]
    for status, _, err in results:
        assert status == 1
        assert err.splitlines()[-1].endswith(
            f"{source.folder / NAMES[0]} was altered: its SHA-256 is not the manifest's"
        )


def test_messages_are_seen_without_configured_logging(
    source: Prepared, near: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage(source, "local", near)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
